"""A series of nested deltas from one run: the model at each n-th part of the budget.

ID3 never freezes an entry again, so the entries at a quarter of the budget are among those at a
half: one run gives models of several sizes, each with its measured quality (Agarwal et al. 2025,
introduction and section 3).

Each member is an ordinary delta, whole, so that everything that takes a delta takes it by itself.
Stored as increments they would take the same bytes: Adam moves every active entry at every step,
so that an increment has all of them again. The step of each entry's unmasking, which the run's own
delta has, is left out: 8 bytes an entry in float32. A series of n takes (n + 1) / 2 times the bytes
of its last member.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from sparse_optim.delta import Delta, load_delta, save_delta
from sparse_optim.finetune.errors import FinetuneError

NOTE = "series"  # in the delta's `method`


def write_series(
    members: Mapping[int, Delta], folder: Path, describe: Callable[[Delta], Delta]
) -> list[dict[str, Any]]:
    """Write the members, such as 025.safetensors for a quarter of the budget.

    Args:
        folder: made here.
        describe: adds how the model is built to a delta's note.

    Returns:
        what is known of each, as `facts_of_member`.
    """
    folder.mkdir()
    rows = []
    for part, delta in sorted(members.items()):
        path = folder / f"{round(100 * part / note_of(delta)['parts']):03d}.safetensors"
        save_delta(describe(delta), path)
        rows.append(facts_of_member(delta, path))
    return rows


def facts_of_member(delta: Delta, path: Path) -> dict[str, Any]:
    """file, share of the budget, step, entries without the head, bytes of the file, metric, value.

    Raises:
        FinetuneError: the delta is not of a series.
    """
    note = note_of(delta)
    return {
        "file": f"{path.parent.name}/{path.name}",
        "share": note["part"] / note["parts"],
        "step": note["step"],
        "entries": delta.num_entries,
        "bytes": path.stat().st_size,
        "metric": note["metric"],
        "value": note["value"],
    }


def find_members(folder: Path) -> list[Path]:
    """The files of a folder with a series, the smallest first; empty: it has none."""
    return sorted(file for file in folder.glob("*.safetensors") if file.stem.isdigit())


def read_series(folder: Path) -> list[dict[str, Any]]:
    """What is known of each member in a folder, as `facts_of_member`."""
    return [facts_of_member(load_delta(path), path) for path in find_members(folder)]


def note_of(delta: Delta) -> dict[str, Any]:
    """A member's note, checked: its file may come from a stranger.

    Raises:
        FinetuneError: there is none, or it is damaged.
    """
    note: Any = delta.method.get(NOTE)
    kinds: dict[str, Any] = {"metric": str, "value": (int, float)}
    kinds |= dict.fromkeys(("part", "parts", "step"), int)
    if (
        not isinstance(note, dict)
        or any(not isinstance(note.get(name), kind) for name, kind in kinds.items())
        or not 1 <= note["part"] <= note["parts"]
    ):
        raise FinetuneError(
            "not a member of a series, or its note is damaged: `finetune --series` writes members"
        )
    return note

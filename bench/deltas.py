"""Tables of what deltas cost, from the newest records: switches, patches, increments, merges.

Recorded by `bench.switching`, `bench.publishing`, `bench.increments` and `bench.merge`;
`bench.report --write` puts them into docs/benchmarks.md.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bench import merge, switching
from bench.environment import RESULTS
from bench.publishing import DIFF, LIMIT, NEW, NEW_LIMIT
from bench.results import newest
from bench.tables import table

MERGES = (("BERT-base", 0.001), ("BERT-base", 0.0005), ("MiniLM", 0.01))
SWITCH_GOAL, PATCH_GOAL, TIME_GOAL, BYTES_GOAL, INCREMENT_GOAL = 2.0, 2.0, 50, 20, 2.0


def section(folder: Path = RESULTS) -> str:
    """All tables, with the goals."""
    parts = [_switches(folder), _patches(folder), _increments(folder), _merges(folder)]
    return "\n\n".join(part for part in parts if part)


def _switches(folder: Path) -> str:
    data = newest("switching-*.json", folder)
    if data is None:
        return ""
    found = data["milliseconds"]
    limits = {dtype: times[switching.LIMIT] for dtype, times in found.items()}
    rows = [
        [
            name,
            *(
                cell
                for dtype, times in found.items()
                for cell in (f"{times[name]:.1f}", f"{times[name] / limits[dtype]:.2f}")
            ),
        ]
        for name in next(iter(found.values()))
    ]
    heads = [cell for dtype in found for cell in (f"{dtype}, ms", "/ bare scatter")]
    return (
        "**Switching** between two deltas, each of 1% of the Linear weights of BERT-base. The goal "
        f"of a switch was at most {SWITCH_GOAL:g} times the bare scatter.\n\n"
        f"{table(['', *heads], rows)}\n\n{_caption(data)}"
    )


def _patches(folder: Path) -> str:
    data = newest("publishing-*.json", folder)
    if data is None:
        return ""
    parts, goals = [], []
    shares = [key for key in data if key.endswith("%")]
    for share in shares:
        times, sizes = data[share]["milliseconds"], data[share]["bytes"]
        limit, diff = times[LIMIT], times[DIFF]
        own = {name: limit for name in times}
        own |= {name: times[NEW_LIMIT] for name in (NEW, NEW_LIMIT)}
        rows = [
            [name, f"{spent:.2f}", f"{spent / own[name]:.2f}", f"{diff / spent:.1f}"]
            for name, spent in times.items()
        ]
        parts.append(table([f"{share} active", "ms", "/ gather", "snapshot diff /"], rows))
        fewer = sizes[DIFF] / sizes["patch"]
        joining = times[NEW] / times[NEW_LIMIT]
        goals.append(
            f"at {share} {times['patch'] / limit:.1f} and {joining:.1f} times the gather, "
            f"{diff / times['patch']:.0f} times less time, {fewer:.0f} times fewer bytes"
        )
    return (
        f"**Publishing** a version of {data['model']} in bfloat16. Goals: a patch takes at most "
        f"{PATCH_GOAL:g} times as long as torch's gather of the active entries (also while entries "
        f"join), {TIME_GOAL} times less than a snapshot diff, and has {BYTES_GOAL} times fewer "
        f"bytes than a snapshot scheme. Measured: {'; '.join(goals)}.\n\n"
        + "\n\n".join(parts)
        + f"\n\n{_caption(data)}"
    )


def _increments(folder: Path) -> str:
    data = newest("increments-*.json", folder)
    if data is None:
        return ""
    hashing = data["ms"]["hashing"]
    rows = [[name, f"{ms:.1f}", f"{ms / hashing:.2f}"] for name, ms in data["ms"].items()]
    return (
        f"**Increments and nested budgets** of a delta of {data['entries']:,} entries in "
        f"{data['parameters']} parameters. The goal was below {INCREMENT_GOAL:g} times the hashing."
        f"\n\n{table(['', 'ms', '/ hashing'], rows)}\n\n{_caption(data)}"
    )


def _merges(folder: Path) -> str:
    found = [
        data
        for model, share in MERGES
        if (data := newest(f"cpu-merge-{model}-{share:g}-*.json", folder)) is not None
    ]
    if not found:
        return ""
    names = [name for name in found[0]["ms"] if not name.endswith("checkpoints")]
    rows = [[name, *(_times(data, name) for data in found)] for name in names]
    heads = [f"{data['model']}, {data['share']:.2%}" for data in found]
    return (
        "**Merging** two deltas, as a multiple of the speed of merging the checkpoints that they "
        f"stand for. The goal was {merge.GOAL}. A base is read once, to check its fingerprints, "
        "which bounds the merges with a base; in files, a delta's parameters cost more than its "
        f"entries.\n\n{table(['times faster', *heads], rows)}\n\n{_caption(found[0])}"
    )


def _times(data: dict[str, Any], name: str) -> str:
    found = data["times_faster"].get(name)
    return "" if found is None else f"{found:.0f}"


def _caption(data: dict[str, Any]) -> str:
    machine, threads = data["machine"], data["machine"]["threads"]
    return (
        f"{machine['cpu']}, {threads} thread{'s' if threads > 1 else ''}, torch "
        f"{data['versions']['torch']}, commit {data['commit'][:8]}, {data['date'][:10]}."
    )

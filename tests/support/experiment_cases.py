"""Tiny experiments on tiny models: what the tests of `sparse_optim.experiments` share."""

from __future__ import annotations

import io
import json
import random
from pathlib import Path
from typing import Any

from rich.console import Console
from tiny_models import save_encoder

from sparse_optim.experiments.presets import Block, Experiment, Row, TaskPreset
from sparse_optim.experiments.runner import Runner, RunOptions

LETTERS = "abcdefgh"


def write_classes(folder: Path, splits: tuple[str, ...] = ("train", "validation")) -> None:
    """Texts of letters, labelled by whether an 'a' is there."""
    folder.mkdir(parents=True)
    draw = random.Random(0)
    for split in splits:
        texts = [" ".join(draw.choices(LETTERS, k=5)) for _ in range(24)]
        rows = [{"sentence": text, "label": int("a" in text), "idx": 0} for text in texts]
        write_lines(folder / f"{split}.jsonl", rows)


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    """JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def tiny_task(name: str, **fields: Any) -> TaskPreset:
    """Two steps of four short texts."""
    defaults = {"max_length": 16, "steps": 2, "batch_size": 4}
    return TaskPreset(
        name, "no/such-set", "sequence-classification", "accuracy", **{**defaults, **fields}
    )


def tiny_experiment(folder: Path, **fields: Any) -> Experiment:
    """Two methods on one task, two learning rates."""
    if not (folder / "model").exists():
        save_encoder(folder / "model")
        write_classes(folder / "data" / "letters")
    rows = (Row("id3", (1e-3, 1e-2), "200"), Row("frozen", (1e-3,)))
    defaults: dict[str, Any] = {
        "name": "tiny",
        "title": "Tiny",
        "about": "For tests.",
        "model": str(folder / "model"),
        "blocks": (Block((tiny_task("letters"),), rows),),
        "seeds": (6, 7),
        "protocol": "grid",
        "kept": 3,
    }
    return Experiment(**{**defaults, **fields})


def runner(experiment: Experiment, folder: Path, **options: Any) -> Runner:
    """A runner into folder/out that prints nothing."""
    arguments = {"data_folder": folder / "data", "extra": {"cpu": True}, **options}
    return Runner(experiment, RunOptions(folder / "out", **arguments), Console(file=io.StringIO()))


def outcome(task: str, row: str, value: float | None, **more: Any) -> dict[str, Any]:
    """What a cell's file holds, as far as tables read it."""
    cell = {"task": task, "row": row, "stage": "run", "lr": 1e-3, "seed": 0}
    costs = {"active_entries": 110, "fresh_entries": 10, "state_bytes": 2_000_000, "step_ms": 5.0}
    return {"cell": cell, "values": {task: value}, **costs, **more}

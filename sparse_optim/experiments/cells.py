"""Cells of an experiment, and the one file that each leaves."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparse_optim.experiments.presets import ExperimentError, Row, TaskPreset
from sparse_optim.finetune.report import write_json

Outcome = dict[str, Any]  # what a cell's file holds


@dataclass(frozen=True)
class Cell:
    """One run: `stage` is "run", or "tune" for a run that only chooses a learning rate.

    `lr` is None where an unfinished tuning has yet to say.
    """

    task: TaskPreset
    row: Row
    lr: float | None
    seed: int
    stage: str = "run"

    @property
    def name(self) -> str:
        """Of the file, and for `--only`."""
        lr = "tuned" if self.lr is None else f"{self.lr:g}"
        tail = "-tune" if self.stage == "tune" else ""
        return f"{self.task.name}-{self.row.label}-seed{self.seed}-lr{lr}{tail}"


class CellStore:
    """The finished cells of a folder, a JSON file each.

    A file appears whole or not at all: it is written beside its place and then renamed.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._known: dict[Path, Outcome] = {}

    def path(self, cell: Cell) -> Path:
        """Where the cell's file lies once it is finished."""
        return self.folder / f"{cell.name}.json"

    def read(self, cell: Cell) -> Outcome | None:
        """What the cell left, None if it is not finished.

        Raises:
            ExperimentError: if the file cannot be read.
        """
        path = self.path(cell)
        if cell.lr is None or not path.exists():
            return None
        if path not in self._known:
            try:
                self._known[path] = json.loads(path.read_text())
            except (OSError, ValueError) as error:
                raise ExperimentError(f"{path} is no cell ({error}); remove it") from None
        return self._known[path]

    def write(self, cell: Cell, outcome: Outcome) -> None:
        """Write the cell's file in one piece."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.path(cell)
        unfinished = path.with_suffix(f".{os.getpid()}.tmp")
        try:
            write_json(outcome, unfinished)
            os.replace(unfinished, path)
        finally:
            unfinished.unlink(missing_ok=True)


def check_same(cell: Cell, stored: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Raise ExperimentError where a finished cell ran with other settings than are asked for."""
    differing = [name for name in wanted if stored.get(name) != wanted[name]]
    if differing:
        name = differing[0]
        raise ExperimentError(
            f"cell {cell.name} ran with {name}={stored.get(name)!r}, now {wanted[name]!r} is asked "
            "for; use another --output, or remove the cell's file"
        )

"""Cells of an experiment, and the file that each writes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from sparse_optim.experiments.presets import ExperimentError, Row, TaskPreset
from sparse_optim.files import replacing
from sparse_optim.finetune.config import FinetuneConfig
from sparse_optim.finetune.report import jsonable, write_json

Outcome = dict[str, Any]  # the content of a cell's file


@dataclass(frozen=True)
class Cell:
    """One run: `stage` is "run", or "tune" for a run that only chooses a learning rate.

    `lr` is None until the tuning that chooses it has finished.
    """

    task: TaskPreset
    row: Row
    lr: float | None
    seed: int
    stage: str = "run"

    @property
    def name(self) -> str:
        """The name of the file; `--only` selects by it."""
        lr = "tuned" if self.lr is None else f"{self.lr:g}"
        tail = "-tune" if self.stage == "tune" else ""
        return f"{self.task.name}-{self.row.label}-seed{self.seed}-lr{lr}{tail}"


class CellStore:
    """The finished cells of a folder, a JSON file each."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._known: dict[Path, Outcome] = {}

    def path(self, cell: Cell) -> Path:
        """The path of the cell's file."""
        return self.folder / f"{cell.name}.json"

    def read(self, cell: Cell) -> Outcome | None:
        """The content of the cell's file; None if the cell is not finished.

        Raises:
            ExperimentError: the file cannot be read.
        """
        path = self.path(cell)
        if cell.lr is None or not path.exists():
            return None
        if path not in self._known:
            try:
                self._known[path] = json.loads(path.read_text())
            except (OSError, ValueError) as error:
                raise ExperimentError(f"{path} is not a cell ({error}); remove it") from None
        return self._known[path]

    def write(self, cell: Cell, outcome: Outcome) -> None:
        """Write the cell's file."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with replacing(self.path(cell)) as temporary:
            write_json(outcome, temporary)


def differing_settings(stored: Mapping[str, Any], wanted: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a finished cell that differ from those asked for now.

    A setting that its file lacks is newer than the cell, which ran with the default.
    """
    defaults = {field.name: jsonable(field.default) for field in fields(FinetuneConfig)}
    known = defaults | dict(stored)
    return {name: known.get(name) for name in wanted if known.get(name) != wanted[name]}


def check_same(cell: Cell, stored: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Raise ExperimentError if a finished cell ran with other settings than those asked for."""
    differing = differing_settings(stored, wanted)
    if differing:
        name, ran_with = next(iter(differing.items()))
        raise ExperimentError(
            f"cell {cell.name} ran with {name}={ran_with!r}, now {wanted[name]!r} is asked "
            "for; use another --output, or remove the cell's file"
        )

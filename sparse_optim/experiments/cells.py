"""Cells of an experiment, and the file that keeps the finished ones."""

from __future__ import annotations

import fcntl
import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from operator import itemgetter
from pathlib import Path
from typing import Any

from sparse_optim.experiments.presets import ExperimentError, Row, TaskPreset
from sparse_optim.files import replacing
from sparse_optim.finetune.config import FinetuneConfig
from sparse_optim.finetune.report import jsonable

# Of cells from before these settings existed.
FORMER = {"rank": "all", "every": 1}

Outcome = dict[str, Any]  # the result of a finished cell

_order = itemgetter("task", "row", "stage", "seed", "lr")  # of the lines in a file of cells


@dataclass(frozen=True)
class Cell:
    """One run: `stage` is "run", or "tune" for a run that only chooses a learning rate.

    `lr` is None until tuning has chosen a rate.
    """

    task: TaskPreset
    row: Row
    lr: float | None
    seed: int
    stage: str = "run"

    @property
    def name(self) -> str:
        """Unique within an experiment; `--only` matches it."""
        return cell_name(self.task.name, self.row.label, self.stage, self.lr, self.seed)


def cell_name(task: str, row: str, stage: str, lr: float | None, seed: int) -> str:
    """Name a cell by its labels, as `Outcome["cell"]` records them."""
    rate = "tuned" if lr is None else f"{lr:g}"
    return f"{task}-{row}-seed{seed}-lr{rate}{'-tune' if stage == 'tune' else ''}"


class CellStore:
    """Keep finished cells in a JSON Lines file, one cell a line, sorted.

    Several processes may share the file: each write locks it, reads the lines of the others, and
    replaces the file as a whole. A process that is killed leaves the file as it was.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._known: dict[str, Outcome] = {}
        self._version: tuple[int, ...] | None = None  # of the file that was read last

    def read(self, cell: Cell) -> Outcome | None:
        """Return the cell's outcome, or None if it is not finished.

        Raises:
            ExperimentError: if the file holds a line that is not a cell.
        """
        return None if cell.lr is None else self._outcomes().get(cell.name)

    def write(self, cell: Cell, outcome: Outcome) -> None:
        """Add the outcome of a cell, or replace the one that is there."""
        with _locked(self.path):
            outcomes = {**self._outcomes(), cell.name: outcome}
            lines = sorted(outcomes.values(), key=lambda each: _order(each["cell"]))
            with replacing(self.path) as unfinished:
                unfinished.write_text("".join(map(_line, lines)))

    def _outcomes(self) -> dict[str, Outcome]:
        """Return the file's cells by name; parse it only if it changed."""
        try:
            found = self.path.stat()
        except FileNotFoundError:
            return {}
        version = (found.st_ino, found.st_size, found.st_mtime_ns)
        if version != self._version:
            lines = self.path.read_text().splitlines()
            self._known = dict(self._parse(number, line) for number, line in enumerate(lines, 1))
            self._version = version
        return self._known

    def _parse(self, number: int, line: str) -> tuple[str, Outcome]:
        try:
            outcome = json.loads(line)
            return cell_name(**outcome["cell"]), outcome
        except (ValueError, TypeError, KeyError) as error:
            raise ExperimentError(
                f"{self.path}, line {number}: not a cell ({error!r}); remove the line"
            ) from None


def _line(outcome: Outcome) -> str:
    return json.dumps(plain(outcome), allow_nan=False, separators=(",", ":")) + "\n"


def plain(value: Any) -> Any:
    """Prepare a value for strict JSON: a number that is not finite (diverged) becomes null."""
    if isinstance(value, Mapping):
        return {name: plain(item) for name, item in value.items()}
    if isinstance(value, list):
        return [plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Wait until no other process is inside this context for the same path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        with path.open("a") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            # Another process may have replaced the file between open and flock.
            if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
                yield
                return


def differing_settings(stored: Mapping[str, Any], wanted: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a finished cell that differ from the requested ones.

    A cell from before a setting existed ran with that setting's default.
    """
    defaults = {field.name: jsonable(field.default) for field in fields(FinetuneConfig)}
    known = defaults | FORMER | dict(stored)
    return {name: known.get(name) for name in wanted if known.get(name) != wanted[name]}


def check_same(cell: Cell, stored: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Raise ExperimentError if a finished cell ran with other settings than the requested ones."""
    differing = differing_settings(stored, wanted)
    if differing:
        name, ran_with = next(iter(differing.items()))
        raise ExperimentError(
            f"cell {cell.name} ran with {name}={ran_with!r}, now {wanted[name]!r} is asked "
            "for; use another --output, or remove the cell's line from cells.jsonl"
        )

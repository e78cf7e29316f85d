"""The record of a run, `allocation.jsonl`: the active entries of each tensor over the steps.

The first line is {"format", "method", "metric", "budget", "tensors": {name: shape}}, each further
line {"step", "active": [entries of each tensor, in that order], "metrics": {name: value}}.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path

from sparse_optim.analysis.measures import sparsity_entropy, tensor_sparsity
from sparse_optim.errors import SparseOptimError

ALLOCATION_FILE = "allocation.jsonl"
FORMAT = 1


class RecordError(SparseOptimError):
    """A record is missing or cannot be read: one line that says what is wrong and what to do."""


@dataclass
class Snapshot:
    """Active entries of each tensor after `step`, and the evaluation's metrics if there was one."""

    step: int
    active: list[int]
    metrics: dict[str, float] = field(default_factory=dict)


@dataclass
class AllocationRecord:
    """The record of a run.

    Attributes:
        method, metric: names of the method and of the reported metric.
        budget: entries that may be active.
        tensors: name -> shape of every tensor that competes for the budget.
        snapshots: in ascending order of their steps.
    """

    method: str
    metric: str
    budget: int
    tensors: dict[str, list[int]]
    snapshots: list[Snapshot]

    @property
    def sizes(self) -> dict[str, int]:
        """Entries of each tensor."""
        return {name: math.prod(shape) for name, shape in self.tensors.items()}

    @property
    def steps(self) -> list[int]:
        """The step of each snapshot."""
        return [snapshot.step for snapshot in self.snapshots]

    def counts(self, snapshot: Snapshot) -> dict[str, int]:
        """Active entries of each tensor, by name."""
        return dict(zip(self.tensors, snapshot.active, strict=True))

    def tensor_sparsity(self) -> list[float]:
        """Share of tensors without an active entry, at each snapshot."""
        return [tensor_sparsity(self.counts(snapshot)) for snapshot in self.snapshots]

    def sparsity_entropy(self) -> list[float]:
        """Sparsity entropy in nats, at each snapshot."""
        sizes = self.sizes
        return [sparsity_entropy(self.counts(snapshot), sizes) for snapshot in self.snapshots]

    def evaluations(self, metric: str) -> list[tuple[int, int, float]]:
        """(step, active entries, value) of the snapshots that have the metric."""
        return [
            (snapshot.step, sum(snapshot.active), snapshot.metrics[metric])
            for snapshot in self.snapshots
            if metric in snapshot.metrics
        ]


def save_record(record: AllocationRecord, folder: Path) -> Path:
    """Write `allocation.jsonl` into a folder; return its path."""
    header = {"format": FORMAT, **asdict(record)}
    rows = header.pop("snapshots")
    path = folder / ALLOCATION_FILE
    path.write_text("".join(json.dumps(row, allow_nan=False) + "\n" for row in (header, *rows)))
    return path


def load_record(folder: Path) -> AllocationRecord:
    """Read the record of a run.

    Raises:
        RecordError: no folder, no record, or a line that is cut or does not fit.
    """
    path = folder / ALLOCATION_FILE
    if not path.is_file():
        raise RecordError(
            f"{folder} has no {ALLOCATION_FILE}: `sparse-optim finetune` writes it for methods "
            "that unmask (not for full or frozen), AllocationRecorder.save for your own Trainer"
        )
    first, *rest = [*path.read_text().splitlines(), ""]
    try:
        header = json.loads(first)
        if header.pop("format") != FORMAT:
            raise RecordError(f"{path}: not of format {FORMAT}; update sparse-optim")
        record = AllocationRecord(**header, snapshots=[])
        sizes = list(record.sizes.values())
    except (AttributeError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise RecordError(f"{path}: line 1 is not a record's header; run the job again") from error
    for number, line in enumerate(filter(None, rest), start=2):
        record.snapshots.append(_snapshot(line, sizes, f"{path}: line {number}"))
    if not record.snapshots:
        raise RecordError(f"{path} has no steps; run the job again")
    return record


def _snapshot(line: str, sizes: list[int], where: str) -> Snapshot:
    try:
        snapshot = Snapshot(**json.loads(line))
        fits = len(snapshot.active) == len(sizes) and all(
            0 <= count <= size for count, size in zip(snapshot.active, sizes, strict=True)
        )
    except (TypeError, json.JSONDecodeError) as error:
        raise RecordError(f"{where} is cut or not a snapshot; delete it") from error
    if not fits:
        raise RecordError(f"{where} does not fit the tensors of line 1; run the job again")
    return snapshot

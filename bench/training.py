"""Measure memory and time of whole training steps: python -m bench.memory --training [MODEL ...]

    weights, gradients, state   bytes held, counted from tensors
    step                        maximum bytes within one step in addition to weights and state:
                                activations, gradients, temporaries
    resident                    maximum resident memory of the process (CPU), or maximum of torch's
                                allocator (CUDA)
    ms                          time of a step, median of TIMED

Each model and optimizer runs in a separate process, on the GPU if there is one.
"""

from __future__ import annotations

import multiprocessing
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch

from bench import allocations, backward, gpu_subjects, tables
from bench.models import MODELS

COLUMNS = ("weights", "gradients", "state", "step", "resident")
TIMED = 5


def kinds() -> list[str]:
    """Return the kinds of `bench.backward` and, on a GPU, the installed 8-bit optimizers."""
    absent = gpu_subjects.absent_kinds() if torch.cuda.is_available() else gpu_subjects.EIGHT_BIT
    return [*backward.KINDS, *(name for name in gpu_subjects.EIGHT_BIT if name not in absent)]


def rows(models: Sequence[str], snapshots: Path | None = None) -> list[dict[str, Any]]:
    """Measure every model and kind of optimizer, one after the other.

    Args:
        models: names in `bench.models`.
        snapshots: folder for torch's CUDA memory snapshots, or None.
    """
    return [row for name in models for row in of_model(name, snapshots)]


def of_model(
    name: str, snapshots: Path | None = None, budget: int = backward.BUDGET
) -> Iterator[dict[str, Any]]:
    """Measure every kind; a row of one that does not fit names the reason."""
    context = multiprocessing.get_context("spawn")
    for kind in kinds():
        with ProcessPoolExecutor(max_workers=1, mp_context=context) as process:
            try:
                yield process.submit(measure, name, kind, snapshots, budget).result()
            except torch.OutOfMemoryError:
                yield {"model": name, "kind": kind, "failed": "out of memory"}


def measure(
    name: str, kind: str, snapshots: Path | None = None, budget: int = backward.BUDGET,
    quota: int = backward.QUOTA,
) -> dict[str, Any]:  # fmt: skip
    """Measure one model with one kind of optimizer, in this process."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = MODELS[name].build(device)
    if snapshots is not None and device.type == "cuda":
        torch.cuda.memory._record_memory_history()
    under = backward.training(name, kind, model, budget, quota)
    under.step()  # allocates dense AdamW's state
    params = list(model.parameters())
    row = {
        "model": name,
        "kind": kind,
        "device": str(device),
        "weights": sum(param.nbytes for param in params),
        "gradients": backward.gradient_bytes(under),
        "state": under.state_bytes,
        "step": allocations.of_call(under.step, device).peak,
        "resident": allocations.peak_bytes(device),
        "us": [microseconds(under.step, device) for _ in range(TIMED)],
    }
    if snapshots is not None and device.type == "cuda":
        snapshots.mkdir(parents=True, exist_ok=True)
        torch.cuda.memory._dump_snapshot(str(snapshots / f"{name}-{kind}.pickle"))
    return row


def microseconds(call: Callable[[], object], device: torch.device) -> float:
    """Return the time of one call, until the device has finished."""
    begin = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return 1e6 * (time.perf_counter() - begin)


def table(found: Sequence[dict[str, Any]]) -> str:
    """Show megabytes and milliseconds as Markdown, without rows that were not measured."""
    lines = [
        [row["model"], row["kind"], *(f"{row[column] / 1e6:.1f}" for column in COLUMNS),
         f"{statistics.median(row['us']) / 1e3:.1f}"]
        for row in found if "us" in row
    ]  # fmt: skip
    return tables.table(["model", "MB under", *COLUMNS, "ms"], lines)

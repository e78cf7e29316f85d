"""Measure whole training steps for a GPU report: time and memory, also within less memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch

from bench import gpu_subjects, models, training
from bench.gpu_plan import CAPS, Phase
from bench.shapes import DTYPES
from sparse_optim.estimate import GIB, Estimate, estimate_of, gpu_bytes
from sparse_optim.footprint import Planner

Records = Iterator[dict[str, Any]]


def whole_steps(phase: Phase, device: torch.device) -> Records:
    """Measure training steps of one kind, on a transformer of the cell's size."""
    assert phase.cell is not None
    kind, cell = phase.which, phase.cell
    name = phase.name.removeprefix("training ")
    absent = gpu_subjects.absent_kinds()
    if kind in absent:
        yield {"name": name, "absent": absent[kind]}
        return
    row = _attempt(lambda: training.measure(cell.model, kind, budget=cell.budget, quota=cell.quota))
    row.pop("kind", None)
    yield {"name": name, "quota": cell.quota, **row, **_dtype(cell.model)}


def capped(phase: Phase, device: torch.device) -> Records:
    """Measure the peak of selection in backward within a smaller card's memory.

    torch's allocator gets no more than that memory. The estimate stands beside the peak. Times say
    nothing about the smaller card, and are not recorded.
    """
    assert phase.cell is not None
    cell, name = phase.cell, CAPS[phase.which]
    model, cap = models.MODELS[cell.model], int(phase.which) * GIB
    expected = estimate_in_backward(model, cell.budget)
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction(min(cap / total, 1.0), device)
    row = _attempt(lambda: training.measure(cell.model, "fused", budget=cell.budget))
    row.pop("us", None)
    yield {
        **row, **_dtype(cell.model), "name": name, "cap_bytes": cap,
        "peak_bytes": torch.cuda.max_memory_allocated(device),
        "reserved_bytes": torch.cuda.max_memory_reserved(device),
        "estimate_bytes": expected.peak, "fits": expected.fits(gpu_bytes(name) or cap),
    }  # fmt: skip


def estimate_in_backward(model: models.Model, budget: int) -> Estimate:
    """Estimate the memory of a step with `fuse_backward=True`, as `sparse-optim estimate` does."""
    planner = Planner(
        lambda: model.build("meta"), lambda batch: replace(model, batch=batch).inputs()
    )
    footprint = planner.footprint("in-backward", model.batch)
    return estimate_of("in-backward", footprint, model.dtype.itemsize, budget)


def _attempt(measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Return the row, or the reason if it cannot be measured."""
    try:
        with torch.enable_grad():
            return measure()
    except torch.OutOfMemoryError:
        return {"failed": "out of memory"}
    except Exception as error:  # a library, driver or kernel may raise anything
        return {"failed": (str(error).splitlines() or [type(error).__name__])[0]}


def _dtype(model: str) -> dict[str, str]:
    (label,) = (name for name, each in DTYPES.items() if each == models.MODELS[model].dtype)
    return {"dtype": label}

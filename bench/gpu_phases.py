"""What the GPU report runs, most important first: each phase in a process of its own.

A phase is a command with a time limit: a kernel that crashes or hangs loses its own phase alone.
Measuring phases call this module back (`python -m bench.gpu_phases NAME FILE`) and write their
records to a file, a line each.
"""

from __future__ import annotations

import gc
import json
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bench import gpu_subjects, memory
from bench.clocks import Clock, clock_of
from bench.shapes import DTYPES, MODELS, make_params, num_entries
from bench.timing import interleave
from sparse_optim import backends

Records = Iterator[dict[str, Any]]

ROUNDS, WARMUP = 15, 3
BANDWIDTH_BYTES = 1 << 30


@dataclass(frozen=True)
class Cell:
    """One model and dtype, and the settings around which one factor at a time is varied."""

    model: str
    dtype: str
    budget: int = 3_500_000
    quota: int = 466
    exp: float = 0.0


@dataclass(frozen=True)
class Phase:
    """A step of the report.

    Attributes:
        name: unique.
        kind: "build", "tests", "sanitizer" or a function of this module that measures.
        limit_s: seconds after which it is stopped.
        cell: for measuring phases.
        only: which tests to run (pytest -k).
        tool: of compute-sanitizer.
    """

    name: str
    kind: str
    limit_s: float
    cell: Cell | None = None
    only: str = ""
    tool: str = ""


ONE, SMALL, LARGE = "Llama-3.2-1B", "DeBERTa-base", "Llama-7B"
CENTRE = Cell(ONE, "bf16")

PHASES = (
    Phase("build", "build", 150),
    Phase("tests cuda", "tests", 120, only="cuda"),
    Phase("tests triton", "tests", 180, only="triton"),  # some eighty kernels to compile
    Phase("bandwidth", "bandwidth", 30),
    Phase("steps 1B bf16", "steps", 60, CENTRE),
    Phase("steps DeBERTa fp32", "steps", 40, Cell(SMALL, "fp32", 320_000)),
    Phase("memcheck", "sanitizer", 90, tool="memcheck"),
    Phase("steps 7B bf16", "steps", 60, Cell(LARGE, "bf16")),
    Phase("stages 7B bf16", "stages", 60, Cell(LARGE, "bf16")),
    Phase("stages 1B bf16", "stages", 30, CENTRE),
    Phase("factors 1B bf16", "factors", 60, CENTRE),
    Phase("steps DeBERTa bf16", "steps", 40, Cell(SMALL, "bf16", 320_000)),
    Phase("steps 1B fp32", "steps", 60, Cell(ONE, "fp32")),
    Phase("stages DeBERTa fp32", "stages", 30, Cell(SMALL, "fp32", 320_000)),
    Phase("racecheck", "sanitizer", 90, tool="racecheck"),
    Phase("synccheck", "sanitizer", 90, tool="synccheck"),
    Phase("tests reference", "tests", 90, only="not cuda and not triton"),
    Phase("steps 7B fp32", "steps", 90, Cell(LARGE, "fp32")),
)
TINY = Cell("tiny", "bf16", 2000, 32)
DRY_PHASES = (
    Phase("build", "build", 150),
    Phase("tests cpp", "tests", 200, only="cpp and fifty"),
    Phase("bandwidth", "bandwidth", 60),
    Phase("steps tiny bf16", "steps", 120, TINY),
    Phase("stages tiny bf16", "stages", 60, TINY),
    Phase("factors tiny bf16", "factors", 60, TINY),
    Phase("memcheck", "sanitizer", 90, tool="memcheck"),
)


def our_backends(device: torch.device) -> list[str]:
    """Compiled backends that are installed for this device; the C++ one on the CPU."""
    found = []
    for name in ("cpp",) if device.type == "cpu" else ("cuda", "triton"):
        try:
            found.append(backends.resolve(name, device))
        except RuntimeError as error:
            print(f"{name}: {error}")
    return found


def timed(builders: Iterator[gpu_subjects.Builder], clock: Clock) -> Records:
    """Records of all subjects, one after the other; one that fails says why, and is left out."""
    for build in builders:
        try:
            yield from interleave([build()], ROUNDS, WARMUP, clock)
        except Exception as error:  # whatever a compiler, a driver or a kernel raises
            yield {"failed": (str(error).splitlines() or [type(error).__name__])[0]}
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def bandwidth(cell: Cell | None, device: torch.device) -> Records:
    """Copy and read of 1 GiB (64 MiB in a dry run)."""
    size = BANDWIDTH_BYTES if device.type == "cuda" else BANDWIDTH_BYTES >> 4
    return timed(gpu_subjects.bandwidth(device, size), clock_of(device))


def steps(cell: Cell, device: torch.device) -> Records:
    """AdamW of all kinds and our step by backend, in every mode, exp 0 and 2; and memory."""
    params = make_params(MODELS[cell.model], DTYPES[cell.dtype], device=device)
    modes = [*gpu_subjects.MODES, *(["graph"] if device.type == "cuda" else [])]
    exps = (cell.exp, 2.0 - cell.exp)

    def ours(backend: str) -> Iterator[gpu_subjects.Builder]:
        for mode in modes:
            for exp in exps if mode == "clip" else exps[:1]:
                yield partial(gpu_subjects.our_step, params, backend, mode, cell.budget,
                              cell.quota, exp)  # fmt: skip

    def subjects() -> Iterator[gpu_subjects.Builder]:
        names = our_backends(device)
        yield from gpu_subjects.gradient_reads(params)
        for name in names[:1]:
            yield from ours(name)
        yield from gpu_subjects.baselines(params)
        for name in names[1:]:  # Triton compiles for a while
            yield from ours(name)

    yield from timed(subjects(), clock_of(device))
    yield from memory.of_optimizers(params, our_backends(device), cell.budget, cell.quota)


def stages(cell: Cell, device: torch.device) -> Records:
    """Each operation alone."""
    params = make_params(MODELS[cell.model], DTYPES[cell.dtype], device=device)
    for backend in our_backends(device):
        for exp in (0.0, 2.0):
            each = gpu_subjects.stages(params, backend, cell.budget, cell.quota, exp)
            yield from timed(each, clock_of(device))


def factors(cell: Cell, device: torch.device) -> Records:
    """Budget, then quota, varied around the cell."""
    params = make_params(MODELS[cell.model], DTYPES[cell.dtype], device=device)
    entries = num_entries(MODELS[cell.model])
    budgets = (320_000, 3_500_000, 35_000_000) if device.type == "cuda" else (1000, 4000)
    quotas = (32, 466, 8000) if device.type == "cuda" else (8, 64)
    settings = [(budget, cell.quota) for budget in budgets if budget < entries]
    settings += [(cell.budget, quota) for quota in quotas if quota < cell.budget]
    builders = (
        partial(gpu_subjects.our_step, params, backend, "clip", budget, quota, cell.exp)
        for backend in our_backends(device)
        for budget, quota in dict.fromkeys(settings)
    )
    return timed(builders, clock_of(device))


MEASURE: dict[str, Callable[[Any, torch.device], Records]] = {
    "bandwidth": bandwidth, "steps": steps, "stages": stages, "factors": factors,
}  # fmt: skip


def main() -> None:
    """Measure one phase; each record is a line of the file as soon as it is there."""
    name, path = sys.argv[1:]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    phases = PHASES if device.type == "cuda" else DRY_PHASES
    (phase,) = (phase for phase in phases if phase.name == name)
    cell = phase.cell
    labels = {"kind": phase.kind} | ({"model": cell.model, "dtype": cell.dtype} if cell else {})
    warnings.simplefilter("ignore", RuntimeWarning)  # that "auto" would take the reference
    with torch.no_grad(), Path(path).open("w") as file:
        for record in MEASURE[phase.kind](cell, device):
            print(json.dumps({**labels, **record}), file=file, flush=True)


if __name__ == "__main__":
    main()

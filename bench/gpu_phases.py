"""Define the phases of the GPU report, most important first; each runs in a separate process.

A phase is a command with a time limit, so that a kernel that crashes or hangs loses only its own
phase. Phases that measure run this module (`python -m bench.gpu_phases NAME FILE`), which writes
one record a line to FILE.

Estimated (not measured) times for an H200 (4 TB/s) and, in brackets, an A6000 (0.65 TB/s, 48 GB). A
process takes 8 s to start. A subject is called 20 times: 0.3 s for the device's head starts, 0.4 s
to build our optimizer, and 20 times its traffic, in multiples of the parameters' bytes P: ours 1.1,
fused AdamW 7, 10 and 12 in its three modes, foreach about 20, 23 and 25. One `steps` phase (10 of
ours, 6 of AdamW, the read) then takes 8 + 17 * 0.3 + 10 * 0.4 s, 2200 P of traffic, and memory:

    build 60, tests cuda 50, tests triton 120 (guessed); bandwidth 12           242 s (242 s)
    steps and stages 7B bf16, P = 13.5 GB     27 + 27 s (AdamW: no memory, 25 + 50)  296 s (317 s)
    steps DeBERTa fp32, 1B bf16               18 + 20 s (20 + 27)               334 s (364 s)
    memcheck 60 (guessed), factors 25 (35)                                      419 s (459 s)
    racecheck 60 (guessed)                                                      479 s (519 s)

The phases that the goals of a step need fit into 8 minutes, and on an H200 so do most of the
others. From `stages 1B` on, phases may be skipped; with whole training steps (120 s guessed) they
take 5 to 8 minutes more (--minutes 16). An A6000 cannot hold steps of 7B in fp32 (54 GB of
parameters and gradients) or AdamW on 7B in bf16 (54 GB); the report names both.
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
from torch import Tensor

from bench import gpu_subjects, memory, models, training
from bench.clocks import Clock, clock_of
from bench.shapes import DTYPES, MODELS, make_params, num_entries
from bench.timing import interleave
from sparse_optim.backends.registry import BackendName
from sparse_optim.engine.choose import choose

Records = Iterator[dict[str, Any]]

ROUNDS, WARMUP = 15, 3
BANDWIDTH_BYTES = 1 << 30


@dataclass(frozen=True)
class Cell:
    """A model, a dtype, and the settings around which `factors` varies one at a time."""

    model: str
    dtype: str
    budget: int = 3_500_000
    quota: int = 466
    exp: float = 0.0


@dataclass(frozen=True)
class Phase:
    """A step of the report.

    Attributes:
        name: unique name.
        kind: "build", "tests", "sanitizer" or a key of MEASURE.
        limit_s: time limit in seconds.
        cell: settings of a phase that measures.
        only: tests to run (pytest -k).
        tool: tool of compute-sanitizer to use.
    """

    name: str
    kind: str
    limit_s: float
    cell: Cell | None = None
    only: str = ""
    tool: str = ""

    @property
    def least_bytes(self) -> int:
        """Return the device memory of parameters, gradients, and the largest tensor in float32."""
        if self.cell is None:
            return 0
        shapes = MODELS[self.cell.model]
        largest = max(num_entries([shape]) for shape in shapes)
        return 2 * DTYPES[self.cell.dtype].itemsize * num_entries(shapes) + 4 * largest


ONE, SMALL, LARGE = "Llama-3.2-1B", "DeBERTa-base", "Llama-7B"
CENTRE = Cell(ONE, "bf16")

PHASES = (
    Phase("build", "build", 150),
    Phase("tests cuda", "tests", 120, only="cuda"),
    Phase("tests triton", "tests", 150, only="triton"),  # some eighty kernels to compile
    Phase("bandwidth", "bandwidth", 30),
    Phase("steps 7B bf16", "steps", 60, Cell(LARGE, "bf16")),
    Phase("stages 7B bf16", "stages", 60, Cell(LARGE, "bf16")),
    Phase("steps DeBERTa fp32", "steps", 40, Cell(SMALL, "fp32", 320_000)),
    Phase("steps 1B bf16", "steps", 60, CENTRE),
    Phase("memcheck", "sanitizer", 90, tool="memcheck"),
    Phase("factors 1B bf16", "factors", 60, CENTRE),
    Phase("racecheck", "sanitizer", 90, tool="racecheck"),
    Phase("stages 1B bf16", "stages", 30, CENTRE),
    Phase("steps DeBERTa bf16", "steps", 40, Cell(SMALL, "bf16", 320_000)),
    Phase("steps 1B fp32", "steps", 60, Cell(ONE, "fp32")),
    Phase("stages DeBERTa fp32", "stages", 30, Cell(SMALL, "fp32", 320_000)),
    Phase("synccheck", "sanitizer", 90, tool="synccheck"),
    Phase("tests reference", "tests", 90, only="not cuda and not triton"),
    Phase("training 7B bf16", "training", 300, Cell(LARGE, "bf16")),
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
    Phase("training tiny bf16", "training", 120, TINY),
    Phase("memcheck", "sanitizer", 90, tool="memcheck"),
)


def our_backends(device: torch.device) -> list[BackendName]:
    """Return the compiled backends that are installed for this device (on the CPU: C++)."""
    absent = absent_backends(device)
    return [name for name in _compiled(device) if name not in absent]


def absent_backends(device: torch.device) -> dict[str, str]:
    """Return the backends that are not installed, and why."""
    absent: dict[str, str] = {}
    for name in _compiled(device):
        try:
            choose(name, device)
        except RuntimeError as error:
            absent[name] = str(error)
    return absent


def _compiled(device: torch.device) -> tuple[BackendName, ...]:
    return ("cpp",) if device.type == "cpu" else ("cuda", "triton")


def _ours(
    params: list[Tensor], backend: str, mode: str, budget: int, quota: int, exp: float
) -> gpu_subjects.Builder:
    labels = {"name": backend, "mode": mode, "budget": budget, "quota": quota, "exp": exp}
    make = partial(gpu_subjects.our_step, params, backend, mode, budget, quota, exp)
    return gpu_subjects.Builder(labels, make)


def timed(builders: Iterator[gpu_subjects.Builder], clock: Clock) -> Records:
    """Time the subjects one after the other; the record of one that fails names the reason."""
    for build in builders:
        try:
            yield from interleave([build()], ROUNDS, WARMUP, clock)
        except torch.OutOfMemoryError:
            yield {**build.labels, "failed": "out of memory"}
        except Exception as error:  # a compiler, driver or kernel may raise anything
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            yield {**build.labels, "failed": reason}
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def bandwidth(cell: Cell | None, device: torch.device) -> Records:
    """Time a copy and a read of 1 GiB (64 MiB in a dry run)."""
    size = BANDWIDTH_BYTES if device.type == "cuda" else BANDWIDTH_BYTES >> 4
    return timed(gpu_subjects.bandwidth(device, size), clock_of(device))


def steps(cell: Cell, device: torch.device) -> Records:
    """Time every AdamW and our step on each backend, in every mode; count their memory."""
    params = make_params(MODELS[cell.model], DTYPES[cell.dtype], device=device)
    modes = [*gpu_subjects.MODES, *(["graph"] if device.type == "cuda" else [])]
    exps = (cell.exp, 2.0 - cell.exp)

    def ours(backend: str) -> Iterator[gpu_subjects.Builder]:
        for mode in modes:
            for exp in exps if mode == "clip" else exps[:1]:
                yield _ours(params, backend, mode, cell.budget, cell.quota, exp)

    def subjects() -> Iterator[gpu_subjects.Builder]:
        names = our_backends(device)
        yield from gpu_subjects.gradient_reads(params)
        for name in names[:1]:
            yield from ours(name)
        yield from gpu_subjects.baselines(params)
        for name in names[1:]:  # Triton compiles for a while
            yield from ours(name)

    yield from timed(subjects(), clock_of(device))
    absent = absent_backends(device) | gpu_subjects.absent_kinds()
    yield from ({"name": name, "absent": reason} for name, reason in absent.items())
    yield from memory.of_optimizers(params, our_backends(device), cell.budget, cell.quota)


def stages(cell: Cell, device: torch.device) -> Records:
    """Time each operation alone."""
    params = make_params(MODELS[cell.model], DTYPES[cell.dtype], device=device)
    for backend in our_backends(device):
        for exp in (0.0, 2.0):
            each = gpu_subjects.stages(params, backend, cell.budget, cell.quota, exp)
            yield from timed(each, clock_of(device))


def factors(cell: Cell, device: torch.device) -> Records:
    """Vary the budget, then the quota, around the cell."""
    params = make_params(MODELS[cell.model], DTYPES[cell.dtype], device=device)
    entries = num_entries(MODELS[cell.model])
    budgets = (320_000, 3_500_000, 35_000_000) if device.type == "cuda" else (1000, 4000)
    quotas = (32, 466, 8000) if device.type == "cuda" else (8, 64)
    settings = [(budget, cell.quota) for budget in budgets if budget < entries]
    settings += [(cell.budget, quota) for quota in quotas if quota < cell.budget]
    builders = (
        _ours(params, backend, "clip", budget, quota, cell.exp)
        for backend in our_backends(device)
        for budget, quota in dict.fromkeys(settings)
    )
    return timed(builders, clock_of(device))


def whole_training(cell: Cell, device: torch.device) -> Records:
    """Measure whole training steps of a transformer of this size, each kind in its own process."""
    dtype = models.MODELS[cell.model].dtype
    (label,) = (name for name, each in DTYPES.items() if each == dtype)
    for row in training.of_model(cell.model, budget=cell.budget):
        yield {"name": row.pop("kind"), **row, "dtype": label}


MEASURE: dict[str, Callable[[Any, torch.device], Records]] = {
    "bandwidth": bandwidth, "steps": steps, "stages": stages, "factors": factors,
    "training": whole_training,
}  # fmt: skip


def main() -> None:
    """Measure one phase; write each record to the file as soon as it is available."""
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

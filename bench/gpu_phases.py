"""Measure one phase of a GPU report: python -m bench.gpu_phases NAME FILE [--dry-run]

Writes one record a line to FILE, as soon as it is available. --dry-run measures on the CPU, with a
tiny model. Without it a GPU is needed: one that is lost during a report must not pass for measured.
"""

from __future__ import annotations

import gc
import json
import sys
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench import gpu_operations, gpu_subjects, gpu_training, memory
from bench.clocks import Clock, clock_of
from bench.gpu_plan import PHASES, Cell, Phase, dry
from bench.shapes import DTYPES, MODELS, make_params, num_entries
from bench.timing import interleave
from sparse_optim.backends.registry import BackendName
from sparse_optim.engine.choose import choose

Records = Iterator[dict[str, Any]]

ROUNDS, WARMUP = 15, 3
BANDWIDTH_BYTES = 1 << 30


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


def bandwidth(phase: Phase, device: torch.device) -> Records:
    """Time a copy and a read of 1 GiB (64 MiB in a dry run)."""
    size = BANDWIDTH_BYTES if device.type == "cuda" else BANDWIDTH_BYTES >> 4
    return timed(gpu_subjects.bandwidth(device, size), clock_of(device))


def steps(phase: Phase, device: torch.device) -> Records:
    """Time every AdamW and our step on each backend, in every mode; count their memory."""
    cell = _cell(phase)
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


def stages(phase: Phase, device: torch.device) -> Records:
    """Time each operation alone."""
    cell = _cell(phase)
    params = make_params(MODELS[cell.model], DTYPES[cell.dtype], device=device)
    for backend in our_backends(device):
        for exp in (0.0, 2.0):
            each = gpu_subjects.stages(params, backend, cell.budget, cell.quota, exp)
            yield from timed(each, clock_of(device))


def factors(phase: Phase, device: torch.device) -> Records:
    """Vary the budget, then the quota, around the cell."""
    cell = _cell(phase)
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


def sampled_grad(phase: Phase, device: torch.device) -> Records:
    """Time sampled weight gradients beside the dense product."""
    dtype = DTYPES[_cell(phase).dtype]
    builders = gpu_operations.sampled_grads(device, dtype, our_backends(device))
    return timed(builders, clock_of(device))


def topk(phase: Phase, device: torch.device) -> Records:
    """Time our selection in one tensor beside torch.topk."""
    dtype = DTYPES[_cell(phase).dtype]
    return timed(gpu_operations.selections(device, dtype, our_backends(device)), clock_of(device))


def _cell(phase: Phase) -> Cell:
    if phase.cell is None:
        raise ValueError(f"the phase {phase.name!r} has no model")
    return phase.cell


MEASURE: dict[str, Callable[[Phase, torch.device], Records]] = {
    "bandwidth": bandwidth, "steps": steps, "stages": stages, "factors": factors,
    "training": gpu_training.whole_steps, "capped": gpu_training.capped,
    "sampled_grad": sampled_grad, "topk": topk,
}  # fmt: skip


def freeze_modules() -> None:
    """Let the garbage collector pass over imported modules.

    Each subject takes three collections, of 0.1 to 0.3 s with all that torch imports.
    """
    torch.optim.AdamW([torch.zeros(1, requires_grad=True)])  # imports the rest
    gc.collect()
    gc.freeze()


def main() -> None:
    """Measure one phase; write each record to the file as soon as it is available."""
    name, path, *options = sys.argv[1:]
    is_dry = options == ["--dry-run"]
    if not is_dry and not torch.cuda.is_available():
        sys.exit("torch sees no CUDA device")
    device = torch.device("cpu" if is_dry else "cuda")
    (phase,) = (phase for phase in PHASES if phase.name == name)
    if is_dry:
        phase = dry(phase)
    cell = phase.cell
    labels = {"kind": phase.kind, "phase": phase.name} | (
        {"model": cell.model, "dtype": cell.dtype} if cell else {}
    )
    freeze_modules()
    warnings.simplefilter("ignore", RuntimeWarning)  # that "auto" would take the reference
    with torch.no_grad(), Path(path).open("w") as file:
        for record in MEASURE[phase.kind](phase, device):
            print(json.dumps({**labels, **record}), file=file, flush=True)


if __name__ == "__main__":
    main()

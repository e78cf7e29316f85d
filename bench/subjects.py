"""Build the subjects of bench.steps: our step and its scan, AdamW as users run it, plain reads."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import fields
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from bench.shapes import random_positions
from bench.timing import Subject
from sparse_optim import D3, IncrementalMaskedAdamW
from sparse_optim.delta import _fingerprint as fingerprint

D3_EPS = 1.0
LR = 1e-9  # so small that the timed steps do not change the parameters
NEVER_REACHED = 1e9  # norm to clip to: torch still multiplies the gradients by 1
METHODS = {"prepare": "begin"}  # of the engine, where a stage has another name in the records
STAGES = ("prepare", "scan", "cut", "append", "clip", "update")
NUMPY_CHUNK = 1 << 20  # int32 values that one call of numpy reduces


def reads(grads: Sequence[Tensor]) -> list[Subject]:
    """Read all gradients in three ways; "the read" is the fastest of them in a run.

    The ways are torch.linalg.vector_norm of float32 views, torch.max of int32 views and, as a check
    independent of torch, numpy.max of int32 views with torch's number of threads. They use views
    because reductions of bfloat16 convert each value, which is slower than the memory.
    """
    words = [as_words(grad) for grad in grads]
    floats = [view.view(torch.float32) for view in words]
    threads = torch.get_num_threads()
    chunks = [chunk.numpy() for view in words for chunk in view.split(NUMPY_CHUNK)]
    pool = ThreadPoolExecutor(threads)

    def numpy_max() -> None:
        left = iter(chunks)  # shared, so that a slower core takes fewer chunks
        list(pool.map(lambda _: [chunk.max() for chunk in left], range(threads)))

    calls: dict[str, Callable[[], object]] = {
        "torch.linalg.vector_norm": lambda: [torch.linalg.vector_norm(view) for view in floats],
        "torch.max": lambda: [view.max() for view in words],
        "numpy.max": numpy_max,
    }
    size = sum(grad.nbytes for grad in grads)
    return [
        Subject({"name": "read", "by": by}, call, moved_bytes=size) for by, call in calls.items()
    ]


def as_words(grad: Tensor) -> Tensor:
    """View a gradient as int32 (bfloat16 in pairs, without an odd last entry)."""
    flat = grad.view(-1)
    even = flat.numel() * flat.element_size() // 4 * 4 // flat.element_size()
    return flat[:even].view(torch.int32)


def adamw(params: Sequence[Tensor]) -> list[Subject]:
    """Build torch.optim.AdamW, fused and foreach, each alone and after clip_grad_norm_.

    AdamW moves 7 values per parameter (and writes three of them), clipping 3.
    """
    size = sum(param.nbytes for param in params)
    subjects = []
    for kind in ("fused", "foreach"):
        optimizer = torch.optim.AdamW(
            params, lr=LR, fused=kind == "fused", foreach=kind == "foreach"
        )
        subjects += [
            Subject({"name": kind}, optimizer.step, moved_bytes=7 * size),
            Subject({"name": f"clip+{kind}"}, clipped_step(optimizer, params), 10 * size),
        ]
    return subjects


def clipped_step(
    optimizer: torch.optim.Optimizer, params: Sequence[Tensor]
) -> Callable[[], object]:
    """Return a function that calls `clip_grad_norm_`, then the optimizer's step."""

    def run() -> None:
        torch.nn.utils.clip_grad_norm_(params, NEVER_REACHED)
        optimizer.step()

    return run


def ours(params: Sequence[Tensor], budget: int, quota: int, exp: float) -> Subject:
    """Build our step, clipping included, with half of the budget active.

    Each step unmasks exactly `quota` entries; then the active set is restored. Active entries are
    spread at random over the model, the most expensive case for the update.
    """
    optimizer = midway(params, budget, quota, exp)
    restore = snapshot(optimizer)
    active = int(optimizer.engine.active.progress[1])
    return Subject(
        {"name": "ours", "budget": budget, "quota": quota, "exp": exp, "active": active},
        optimizer.step,
        moved_bytes=_step_bytes(params, active, exp),
        prepare=restore,
        check=unmasks(optimizer, quota),
        stages=_time_stages(optimizer),
    )


def unmasks(optimizer: IncrementalMaskedAdamW, quota: int) -> Callable[[], None]:
    """Return a check that raises an error unless the step unmasked `quota` entries."""
    active = int(optimizer.engine.active.progress[1])

    def check() -> None:
        grown = int(optimizer.engine.active.progress[1]) - active
        if grown != quota:
            raise RuntimeError(f"the step unmasked {grown} entries, expected {quota}")

    return check


def scan_alone(params: Sequence[Tensor], budget: int, quota: int) -> Subject:
    """Build the first operation of our step, which reads the gradients."""
    optimizer = midway(params, budget, quota, exp=0.0)
    engine = optimizer.engine
    grads = engine.bind([])
    active = int(engine.active.progress[1])
    return Subject(
        {"name": "scan", "budget": budget, "active": active},
        lambda: engine.scan(grads),
        moved_bytes=scan_bytes(params, active),
    )


def scan_bytes(params: Sequence[Tensor], active: int, tile: int = 512) -> int:
    """Count gradients, a maximum per tile, and position and gradient of each active entry."""
    tiles = sum(-(-param.numel() // tile) for param in params)
    return sum(param.nbytes for param in params) + 4 * tiles + 8 * active


def _step_bytes(params: Sequence[Tensor], active: int, exp: float) -> int:
    """Count the scan, a second read of tile maxima, and the update."""
    tiles = sum(-(-param.numel() // 512) for param in params)
    tile_bytes = (8 if exp else 4) * tiles
    return scan_bytes(params, active) + tile_bytes + update_bytes(params, active)


def update_bytes(params: Sequence[Tensor], active: int) -> int:
    """Count position, age and gradient, and moments and value (or master) read and written."""
    value = 8 if params[0].dtype == torch.float32 else 8 + params[0].element_size()
    return (4 + 4 + 4 + 16 + value) * active


@contextmanager
def unhashed() -> Iterator[None]:
    """Build optimizers without hashing the base model, which takes seconds per gigabyte."""
    with mock.patch.object(fingerprint, "fingerprint", return_value="not taken"):
        yield


def midway(
    params: Sequence[Tensor],
    budget: int,
    quota: int,
    exp: float,
    max_grad_norm: float | None = 1.0,
    **options: Any,
) -> IncrementalMaskedAdamW:
    """Build an optimizer after half of its steps; each step unmasks exactly `quota` entries."""
    steps = math.ceil(budget / quota)
    taken = steps // 2
    with unhashed():
        optimizer = IncrementalMaskedAdamW(
            params,
            lr=LR,
            budget=budget,
            total_steps=steps,
            importance=D3(exp=exp, eps=D3_EPS),
            schedule=lambda step: min(quota * step, budget),
            unmask_steps=1.0,
            max_grad_norm=max_grad_norm,
            **options,
        )
    count = quota * taken
    generator = torch.Generator().manual_seed(2)
    segments = [
        {
            "position": position.int(),
            "exp_avg": torch.full((position.numel(),), 1e-4),
            "exp_avg_sq": torch.full((position.numel(),), 1e-6),
            "unmask_step": torch.randint(
                1, taken + 1, (position.numel(),), generator=generator
            ).int(),
            "master": param.detach().view(-1)[position.to(param.device)].float(),
        }
        for param, position in zip(
            params, random_positions([tuple(param.shape) for param in params], count), strict=True
        )
    ]
    optimizer.engine.active.fill(segments, torch.tensor([taken, count, 0]))
    return optimizer


def complete(
    params: Sequence[Tensor], budget: int, model: torch.nn.Module, sampled: bool = True
) -> IncrementalMaskedAdamW:
    """Build an optimizer whose budget is spent: its steps unmask nothing.

    Args:
        budget: active entries, at random positions.
        model: whose layers compute only the gradients of active entries, if `sampled`.
    """
    optimizer = midway(params, 2 * budget, budget, exp=0.0, norm="active", model=model)
    optimizer.engine.completion.known = True
    optimizer.sampled_backward = sampled
    return optimizer


def snapshot(optimizer: IncrementalMaskedAdamW) -> Callable[[], None]:
    """Return a function that restores the current active set."""
    active = optimizer.engine.active
    kept = {item.name: getattr(active, item.name).clone() for item in fields(active)}

    def restore() -> None:
        for name, values in kept.items():
            getattr(active, name).copy_(values)
        # Hide the writes from the step: in real use nothing else writes the parameters.
        optimizer.engine.accept_values()

    return restore


def _time_stages(optimizer: IncrementalMaskedAdamW) -> dict[str, list[int]]:
    """Make the optimizer record the nanoseconds of its stages, with two clock readings each."""
    engine = optimizer.engine
    stages: dict[str, list[int]] = {name: [] for name in STAGES}
    for name, calls in stages.items():
        method = METHODS.get(name, name)
        setattr(engine, method, _timed(getattr(engine, method), calls))
    return stages


def _timed(function: Callable[..., Any], calls: list[int]) -> Callable[..., Any]:
    def run(*arguments: Any) -> Any:
        start = time.perf_counter_ns()
        result = function(*arguments)
        calls.append(time.perf_counter_ns() - start)
        return result

    return run

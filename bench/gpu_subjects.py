"""Build the subjects of the GPU report: our step by backend and mode, AdamW as used, bandwidth.

A subject is built just before it is timed and dropped afterwards, so that memory never holds the
states of two optimizers at once.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench.shapes import grads_of
from bench.subjects import (
    LR,
    NEVER_REACHED,
    as_words,
    clipped_step,
    midway,
    scan_bytes,
    snapshot,
    unmasks,
    update_bytes,
)
from bench.timing import Subject
from sparse_optim import IncrementalMaskedAdamW
from sparse_optim.amp import GradScaler

# How users run a step: alone; clipped; unscaled and clipped.
MODES = ("alone", "clip", "scaler")
STAGES = ("bind", "scan", "cut", "append", "clip", "update")

EIGHT_BIT = {  # name -> module, class
    "bitsandbytes 8-bit": ("bitsandbytes.optim", "AdamW8bit"),
    "torchao 8-bit": ("torchao.optim", "AdamW8bit"),
}


@dataclass(frozen=True)
class Builder:
    """Build a subject when called; the labels identify it if that fails."""

    labels: dict[str, Any]
    make: Callable[[], Subject]

    def __call__(self) -> Subject:
        return self.make()


def bandwidth(device: torch.device, size: int) -> Iterator[Builder]:
    """Copy and read `size` bytes, to measure the bandwidth of the memory."""

    def copy() -> Subject:
        source, target = (torch.zeros(size // 4, device=device) for _ in range(2))
        return Subject({"name": "copy"}, lambda: target.copy_(source), moved_bytes=2 * size)

    def read(by: str, reduce: Callable[[Tensor], object], dtype: torch.dtype) -> Subject:
        source = torch.zeros(size // 4, device=device).view(dtype)
        return Subject({"name": "read", "by": by}, lambda: reduce(source), moved_bytes=size)

    norm = torch.linalg.vector_norm
    yield Builder({"name": "copy"}, copy)
    for by, reduce, dtype in (("torch.sum", torch.sum, torch.float32),
                              ("torch.max", torch.max, torch.int32),
                              ("torch.linalg.vector_norm", norm, torch.float32)):  # fmt: skip
        yield Builder({"name": "read", "by": by}, partial(read, by, reduce, dtype))


def gradient_reads(params: Sequence[Tensor]) -> Iterator[Builder]:
    """Read all gradients of a model with torch, tensor by tensor."""
    grads = grads_of(list(params))
    floats = [as_words(grad).view(torch.float32) for grad in grads]
    size = sum(grad.nbytes for grad in grads)
    labels = {"name": "read", "by": "torch._foreach_norm"}
    yield Builder(
        labels, lambda: Subject(labels, lambda: torch._foreach_norm(floats), moved_bytes=size)
    )


def _scaler(device: torch.device, kind: type[torch.amp.GradScaler]) -> torch.amp.GradScaler:
    """Build a loss scaler with a constant scale of 1, so that gradients keep their values."""
    scaler = kind(device.type, init_scale=1.0, growth_interval=1 << 30)
    scaler.scale(torch.ones((), device=device))
    return scaler


def adamw_kinds(params: Sequence[Tensor]) -> dict[str, Callable[[], torch.optim.Optimizer]]:
    """Return constructors by name; 8-bit ones only if their packages are importable."""
    kinds: dict[str, Callable[[], torch.optim.Optimizer]] = {
        "fused": lambda: torch.optim.AdamW(params, lr=LR, fused=True),
        "foreach": lambda: torch.optim.AdamW(params, lr=LR, foreach=True),
    }
    for name, place in EIGHT_BIT.items():
        found = _imported(*place)
        if not isinstance(found, str):
            kinds[name] = partial(found, params, lr=LR)
    return kinds


def absent_kinds() -> dict[str, str]:
    """Return the 8-bit optimizers that are not importable, and why."""
    found = {name: _imported(*place) for name, place in EIGHT_BIT.items()}
    return {name: reason for name, reason in found.items() if isinstance(reason, str)}


def _imported(module: str, attribute: str) -> Any:
    """Import an attribute of a module; return the reason as a line of text if that fails."""
    try:
        return getattr(importlib.import_module(module), attribute)
    except Exception as error:  # a module without its libraries may raise anything
        return (str(error).splitlines() or [type(error).__name__])[0]


def baselines(params: Sequence[Tensor]) -> Iterator[Builder]:
    """Build AdamW of every kind, in every mode.

    Records of bfloat16 in mode "scaler" have the label "unscale": "stand-in"; see `_stand_in_step`.
    """

    def build(name: str, make: Callable[[], torch.optim.Optimizer], mode: str) -> Subject:
        optimizer, labels = make(), {"name": name, "mode": mode}
        if mode == "alone":
            return Subject(labels, optimizer.step)
        if mode == "clip":
            return Subject(labels, clipped_step(optimizer, params))
        if params[0].dtype == torch.bfloat16:
            run = _stand_in_step(optimizer, params)
            return Subject({**labels, "unscale": "stand-in"}, run)
        return Subject(labels, _scaled_step(optimizer, params))

    for name, make in adamw_kinds(params).items():
        for mode in MODES:
            yield Builder({"name": name, "mode": mode}, partial(build, name, make, mode))


def _scaled_step(
    optimizer: torch.optim.Optimizer, params: Sequence[Tensor]
) -> Callable[[], object]:
    scaler = _scaler(params[0].device, torch.amp.GradScaler)

    def run() -> None:
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(params, NEVER_REACHED)
        scaler.step(optimizer)
        scaler.update()

    return run


def _stand_in_step(
    optimizer: torch.optim.Optimizer, params: Sequence[Tensor]
) -> Callable[[], object]:
    """Imitate the cost of `unscale_` in bfloat16: CUDA has no such kernel (pytorch #127176).

    One pass reads and writes every gradient, as in `unscale_`. The finiteness test uses the norm
    that clipping computes anyway, so that AdamW does not pay for another pass.
    """
    grads = grads_of(list(params))

    def run() -> None:
        torch._foreach_mul_(grads, 1.0)
        norm = torch.nn.utils.clip_grad_norm_(params, NEVER_REACHED)
        torch.isfinite(norm)
        optimizer.step()

    return run


def _graph_of(optimizer: IncrementalMaskedAdamW, restore: Callable[[], None]) -> Callable[[], None]:
    """Capture the whole step as a CUDA graph; return the function that replays it."""
    optimizer.step()
    restore()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    return lambda: graph.replay()


def _step_of(
    optimizer: IncrementalMaskedAdamW, mode: str, restore: Callable[[], None]
) -> Callable[[], object]:
    """Return the function to time: the step, its replay, or the step under our loss scaler."""
    if mode == "graph":
        return _graph_of(optimizer, restore)
    if mode != "scaler":
        return optimizer.step
    scaler = _scaler(optimizer.engine.pool.device, GradScaler)

    def run() -> None:
        scaler.step(optimizer)
        scaler.update()

    return run


def our_step(
    params: Sequence[Tensor], backend: str, mode: str, budget: int, quota: int, exp: float
) -> Subject:
    """Build our step with half of the budget active (see `bench.subjects.ours`).

    Every mode except "alone" clips.
    """
    optimizer = midway(
        params, budget, quota, exp, None if mode == "alone" else 1.0, backend=backend,
        capturable=mode == "graph",
    )  # fmt: skip
    restore, check = snapshot(optimizer), unmasks(optimizer, quota)
    labels = {"name": backend, "mode": mode, "budget": budget, "quota": quota, "exp": exp}
    run = _step_of(optimizer, mode, restore)
    size = sum(param.nbytes for param in params)
    return Subject(labels, run, moved_bytes=size, prepare=restore, check=check)


def stages(
    params: Sequence[Tensor], backend: str, budget: int, quota: int, exp: float
) -> Iterator[Builder]:
    """Build each operation alone; it starts from the results of those before it.

    Scan and update also count the bytes that they must move.
    """

    def build(stage: str) -> Subject:
        optimizer = midway(params, budget, quota, exp, backend=backend)
        restore = snapshot(optimizer)
        engine = optimizer.engine
        grads = engine.bind([])

        def call(name: str) -> None:
            # Each stage of a CPU backend is timed with the bind of its step.
            if name == "bind" or backend in ("reference", "cpp"):
                engine.bind([])
            if name != "bind":
                argument = optimizer.max_grad_norm if name == "clip" else grads
                getattr(engine, name)(argument)

        def prepare() -> None:
            restore()
            with torch.no_grad():
                engine.begin(optimizer.param_groups)
                for earlier in STAGES[: STAGES.index(stage)]:
                    call(earlier)

        labels = {"budget": budget, "quota": quota, "exp": exp, "stage": stage}
        active = int(engine.active.progress[1])
        moved = {
            "scan": scan_bytes(params, active, engine.ops.TILE),
            "update": update_bytes(params, active + quota),
        }.get(stage, 0)
        return Subject({"name": backend, **labels}, partial(call, stage), moved, prepare)

    for stage in STAGES:
        yield Builder({"name": backend, "exp": exp, "stage": stage}, partial(build, stage))

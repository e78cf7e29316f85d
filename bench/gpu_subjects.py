"""Subjects of the GPU report: our step by backend and mode, AdamW as users run it, bandwidth.

Each is built when its turn comes and dropped after it, so that the states of two optimizers never
stand in memory together.
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
from sparse_optim.optim.grad_scaler import GradScaler
from sparse_optim.optim.groups import readable_grads

# As users run a step: alone; clipped; with the loss scale taken out of the gradients, and clipped.
MODES = ("alone", "clip", "scaler")
STAGES = ("bind", "scan", "cut", "append", "clip", "update")

EIGHT_BIT = {  # name -> module, class
    "bitsandbytes 8-bit": ("bitsandbytes.optim", "AdamW8bit"),
    "torchao 8-bit": ("torchao.optim", "AdamW8bit"),
}


@dataclass(frozen=True)
class Builder:
    """Makes a subject when called; the labels tell which, if it cannot be made or timed."""

    labels: dict[str, Any]
    make: Callable[[], Subject]

    def __call__(self) -> Subject:
        return self.make()


def bandwidth(device: torch.device, size: int) -> Iterator[Builder]:
    """Copy and read of `size` bytes: what the memory gives, without tricks."""

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
    """All gradients of a model read by torch, tensor by tensor."""
    grads = grads_of(list(params))
    floats = [as_words(grad).view(torch.float32) for grad in grads]
    size = sum(grad.nbytes for grad in grads)
    labels = {"name": "read", "by": "torch._foreach_norm"}
    yield Builder(
        labels, lambda: Subject(labels, lambda: torch._foreach_norm(floats), moved_bytes=size)
    )


def _scaler(device: torch.device, kind: type[torch.amp.GradScaler]) -> torch.amp.GradScaler:
    """A loss scaler whose scale is and stays 1, so that gradients keep their values."""
    scaler = kind(device.type, init_scale=1.0, growth_interval=1 << 30)
    scaler.scale(torch.ones((), device=device))
    return scaler


def adamw_kinds(params: Sequence[Tensor]) -> dict[str, Callable[[], torch.optim.Optimizer]]:
    """Constructors by name; 8-bit ones where their packages are importable."""
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
    """8-bit AdamWs that are not importable, and why."""
    found = {name: _imported(*place) for name, place in EIGHT_BIT.items()}
    return {name: reason for name, reason in found.items() if isinstance(reason, str)}


def _imported(module: str, attribute: str) -> Any:
    """What a module holds; a line that says why it cannot be had, if it cannot."""
    try:
        return getattr(importlib.import_module(module), attribute)
    except Exception as error:  # whatever a module without its libraries raises
        return (str(error).splitlines() or [type(error).__name__])[0]


def baselines(params: Sequence[Tensor]) -> Iterator[Builder]:
    """AdamW of every kind, in every mode.

    Records of bfloat16 in mode "scaler" say "unscale": "stand-in" (see `_stand_in_step`).
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
    """What `unscale_` would cost in bfloat16, for which CUDA has no such kernel (pytorch #127176).

    One pass that reads and writes every gradient, as `unscale_` makes; whether all are finite is
    taken from the norm that clipping computes anyway, so that AdamW is not charged a further pass.
    """
    grads = grads_of(list(params))

    def run() -> None:
        torch._foreach_mul_(grads, 1.0)
        norm = torch.nn.utils.clip_grad_norm_(params, NEVER_REACHED)
        torch.isfinite(norm)
        optimizer.step()

    return run


def _graph_of(optimizer: IncrementalMaskedAdamW, restore: Callable[[], None]) -> Callable[[], None]:
    """A CUDA graph of the whole step; replaying it is the step."""
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
    """What is timed: the step, a replay of it, or the step under our loss scaler."""
    if mode == "graph":
        return _graph_of(optimizer, restore)
    if mode != "scaler":
        return optimizer.step
    scaler = _scaler(optimizer._device, GradScaler)

    def run() -> None:
        scaler.step(optimizer)
        scaler.update()

    return run


def our_step(
    params: Sequence[Tensor], backend: str, mode: str, budget: int, quota: int, exp: float
) -> Subject:
    """Our step in the middle of its run (see `bench.subjects.ours`); every mode but one clips."""
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
    """Each operation alone, on what those before it left; bytes that scan and update must move."""

    def build(stage: str) -> Subject:
        optimizer = midway(params, budget, quota, exp, backend=backend)
        restore = snapshot(optimizer)
        grads = readable_grads(optimizer._pool, optimizer._names)

        def call(name: str) -> None:
            bound = optimizer._work.table
            if name == "bind" or backend in ("reference", "cpp"):
                bound = optimizer._ops.bind(grads, optimizer._pool, optimizer._work.table)
            if name != "bind":
                arguments = {"scan": [bound, []], "cut": [bound, grads], "clip": []}
                getattr(optimizer, f"_{name}")(*arguments.get(name, [bound]))

        def prepare() -> None:
            restore()
            with torch.no_grad():
                optimizer._prepare()
                for earlier in STAGES[: STAGES.index(stage)]:
                    call(earlier)

        labels = {"budget": budget, "quota": quota, "exp": exp, "stage": stage}
        active = int(optimizer._active.progress[1])
        moved = {
            "scan": scan_bytes(params, active, optimizer._ops.TILE),
            "update": update_bytes(params, active + quota),
        }.get(stage, 0)
        return Subject({"name": backend, **labels}, partial(call, stage), moved, prepare)

    for stage in STAGES:
        yield Builder({"name": backend, "exp": exp, "stage": stage}, partial(build, stage))

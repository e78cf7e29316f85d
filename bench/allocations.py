"""Bytes that a call allocates: at most at once, and what is left after it.

On CUDA by torch's allocator; on the CPU from the profiler's record of every allocation and release,
so that temporaries inside of operations and what autograd saves count too.
"""

from __future__ import annotations

import resource
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch.profiler import ProfilerActivity, profile


@dataclass(frozen=True)
class Allocated:
    """Bytes on top of what was held before the call."""

    peak: int
    left: int


def of_call(run: Callable[[], object], device: torch.device) -> Allocated:
    """Run it, and count. What it returns is still held when `left` is taken."""
    return _on_cuda(run, device) if device.type == "cuda" else _on_cpu(run)


def _on_cuda(run: Callable[[], object], device: torch.device) -> Allocated:
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    kept = run()
    torch.cuda.synchronize(device)
    left = torch.cuda.memory_allocated(device) - before
    peak = torch.cuda.max_memory_allocated(device) - before
    del kept
    return Allocated(peak, left)


def _on_cpu(run: Callable[[], object]) -> Allocated:
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        kept = run()
    recorded = profiler.profiler.kineto_results.events()
    memory = (event for event in recorded if event.name() == "[memory]")
    changes = sorted((each.start_ns(), order, each.nbytes()) for order, each in enumerate(memory))
    live = list(accumulate((size for *_, size in changes), initial=0))
    del kept
    return Allocated(max(live), live[-1])


def peak_bytes(device: torch.device) -> int:
    """The most ever held: by torch's allocator on CUDA, else by this process (resident)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

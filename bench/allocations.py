"""Count the bytes that a call allocates: the peak, and what is left after it.

On CUDA, torch's allocator counts. On the CPU, the profiler records every allocation and release,
including temporaries inside operations and tensors that autograd saves.
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
    """Bytes in addition to those held before the call."""

    peak: int
    left: int


def of_call(run: Callable[[], object], device: torch.device) -> Allocated:
    """Run the call and count. `left` includes the returned value."""
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
    """Return the maximum ever held: by torch's allocator on CUDA, else resident in this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

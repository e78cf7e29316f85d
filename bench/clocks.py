"""Time one call on cold caches: by the CPU's clock, or by events on a CUDA stream."""

from __future__ import annotations

import ctypes
import gc
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from bench.environment import run_delay_ns

# Bytes written before each timed call, because a step follows a backward pass, which leaves neither
# gradients nor optimizer state in the caches. At least twice the last-level cache of common hosts
# and of an H200 (50 MB).
FLUSH_BYTES = 1 << 26
CUDA_FLUSH_BYTES = 1 << 28
# The device waits this long before a timed call, so that the host can launch all kernels: the time
# is then the device's, not the host's. The host's time is recorded separately.
CUDA_HEAD_START_MS = 15
WARM_UP_CALLS = 20  # before the cycles of the head start are calibrated


@dataclass
class Spent:
    """One call, in nanoseconds.

    Attributes:
        total: from beginning to end, on the device that does the work.
        delay: the part of `total` in which threads of this process waited for a core.
        host: until the call returned; the device may still be working.
    """

    total: int
    delay: int = 0
    host: int = 0


class Clock(Protocol):
    """Times calls on one device."""

    def flush(self) -> None:
        """Evict from the caches what a step after a backward pass would not find there."""

    def time(self, run: Callable[[], object]) -> Spent:
        """Time one call."""

    def peak_bytes(self, run: Callable[[], object]) -> int | None:
        """Return the peak bytes of one call in addition to those before it, or None if unknown."""


class CpuClock:
    """Read the monotonic clock, and the memory that the kernel counts (Linux)."""

    def __init__(self) -> None:
        self._flush = torch.zeros(FLUSH_BYTES // 4)

    def flush(self) -> None:
        self._flush.add_(1.0)

    def time(self, run: Callable[[], object]) -> Spent:
        delay = run_delay_ns()
        start = time.perf_counter_ns()
        run()
        total = time.perf_counter_ns() - start
        return Spent(total, run_delay_ns() - delay, total)

    def peak_bytes(self, run: Callable[[], object]) -> int | None:
        if not sys.platform.startswith("linux"):
            return None
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        before = _status_bytes("VmRSS")
        run()
        return max(_status_bytes("VmHWM") - before, 0)


class CudaClock:
    """Record CUDA events around a call that the host launches while the device waits."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._flush = torch.zeros(CUDA_FLUSH_BYTES // 4, device=device)
        self._cycles = 1_000_000
        self._warm_up()
        self._cycles = int(CUDA_HEAD_START_MS * self._cycles / (self.time(self._sleep).total / 1e6))

    def _warm_up(self) -> None:
        """Raise the clocks and load the kernels, or the calibration would see neither as later."""
        for _ in range(WARM_UP_CALLS):
            self.flush()
            self.time(self._sleep)

    def _sleep(self) -> None:
        torch.cuda._sleep(self._cycles)

    def flush(self) -> None:
        self._flush.add_(1.0)

    def time(self, run: Callable[[], object]) -> Spent:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._sleep()
        start.record()
        begin = time.perf_counter_ns()
        run()
        host = time.perf_counter_ns() - begin
        end.record()
        torch.cuda.synchronize(self._device)
        return Spent(int(start.elapsed_time(end) * 1e6), host=host)

    def peak_bytes(self, run: Callable[[], object]) -> int | None:
        torch.cuda.synchronize(self._device)
        torch.cuda.reset_peak_memory_stats(self._device)
        before = torch.cuda.memory_allocated(self._device)
        run()
        torch.cuda.synchronize(self._device)
        return torch.cuda.max_memory_allocated(self._device) - before


def clock_of(device: torch.device) -> Clock:
    """Return the clock for a device."""
    return CudaClock(device) if device.type == "cuda" else CpuClock()


def _status_bytes(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {name}")

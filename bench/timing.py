"""Interleaved timing: every subject once a round, in a shuffled order, each on cold caches."""

from __future__ import annotations

import ctypes
import gc
import random
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from bench.environment import run_delay_ns

# Written before each timed call. A step follows a backward pass, which leaves neither gradients nor
# optimizer state in the caches; twice the last-level cache of common hosts.
FLUSH_BYTES = 1 << 26


def nothing() -> None:
    """Prepare or check nothing."""


@dataclass
class Subject:
    """Something to time, with what must happen around it.

    Attributes:
        labels: what it is, for the results file; `name` at least.
        run: timed.
        moved_bytes: memory traffic that it cannot avoid, counted by hand; 0 if unknown.
        prepare: before each call, not timed.
        check: after each call, not timed; raises if the call did not do what it should.
        stages: name -> nanoseconds of each call, which `run` adds to.
    """

    labels: dict[str, Any]
    run: Callable[[], object]
    moved_bytes: int = 0
    prepare: Callable[[], None] = nothing
    check: Callable[[], None] = nothing
    stages: dict[str, list[int]] = field(default_factory=dict)


@dataclass
class Timing:
    """Raw measurements of one subject: nanoseconds of each round."""

    spent: list[int] = field(default_factory=list)
    delay: list[int] = field(default_factory=list)


def interleave(subjects: Sequence[Subject], rounds: int, warmup: int) -> list[dict[str, Any]]:
    """Time all subjects, `rounds` times each.

    Returns:
        For each subject its labels and raw times in microseconds ("us"), the time its threads
        waited for a core ("delay_us"), stages, unavoidable bytes and peak bytes of one call.
    """
    flush = torch.zeros(FLUSH_BYTES // 4)
    timings = [Timing() for _ in subjects]
    for subject in subjects:
        _once(subject, flush)
    peaks = [_peak_bytes(subject) for subject in subjects]
    gc.collect()
    gc.disable()
    try:
        for number in range(warmup + rounds):
            if number == warmup:
                for subject in subjects:
                    for calls in subject.stages.values():
                        calls.clear()
            for index in random.Random(number).sample(range(len(subjects)), len(subjects)):
                spent, delay = _once(subjects[index], flush)
                if number >= warmup:
                    timings[index].spent.append(spent)
                    timings[index].delay.append(delay)
    finally:
        gc.enable()
    return [_record(*entry) for entry in zip(subjects, timings, peaks, strict=True)]


def _once(subject: Subject, flush: torch.Tensor) -> tuple[int, int]:
    """Nanoseconds spent in one call, and of these waiting for a core."""
    subject.prepare()
    flush.add_(1.0)
    delay = run_delay_ns()
    start = time.perf_counter_ns()
    subject.run()
    spent = time.perf_counter_ns() - start
    delay = run_delay_ns() - delay
    subject.check()
    return spent, delay


def _record(subject: Subject, timing: Timing, peak: int | None) -> dict[str, Any]:
    record = {
        **subject.labels,
        "moved_bytes": subject.moved_bytes,
        "peak_bytes": peak,
        "us": [round(spent / 1e3) for spent in timing.spent],
        "delay_us": [round(delay / 1e3) for delay in timing.delay],
    }
    if subject.stages:
        record["stages_us"] = {
            name: [round(spent / 1e3) for spent in calls] for name, calls in subject.stages.items()
        }
    return record


def _peak_bytes(subject: Subject) -> int | None:
    """Memory that one call takes on top of what is held before it; None where unknown.

    Linux: resident memory before the call against the high-water mark after it.
    """
    if not sys.platform.startswith("linux"):
        return None
    subject.prepare()
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = _status_bytes("VmRSS")
    subject.run()
    after = _status_bytes("VmHWM")
    subject.check()
    return max(after - before, 0)


def _status_bytes(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status does not tell {name}")

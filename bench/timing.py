"""Interleaved timing: every subject once a round, in a shuffled order, each on cold caches."""

from __future__ import annotations

import gc
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from bench.clocks import Clock, CpuClock, Spent


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


def interleave(
    subjects: Sequence[Subject], rounds: int, warmup: int, clock: Clock | None = None
) -> list[dict[str, Any]]:
    """Time all subjects, `rounds` times each, by the CPU's clock unless another is given.

    Returns:
        For each subject its labels and raw times in microseconds ("us"), the time its threads
        waited for a core ("delay_us"), stages, unavoidable bytes and peak bytes of one call.
    """
    clock = clock or CpuClock()
    timings: list[list[Spent]] = [[] for _ in subjects]
    for subject in subjects:
        _once(subject, clock)
    peaks = [_peak_bytes(subject, clock) for subject in subjects]
    gc.collect()
    gc.disable()
    try:
        for number in range(warmup + rounds):
            if number == warmup:
                for subject in subjects:
                    for calls in subject.stages.values():
                        calls.clear()
            for index in random.Random(number).sample(range(len(subjects)), len(subjects)):
                spent = _once(subjects[index], clock)
                if number >= warmup:
                    timings[index].append(spent)
    finally:
        gc.enable()
    return [_record(*entry) for entry in zip(subjects, timings, peaks, strict=True)]


def _once(subject: Subject, clock: Clock) -> Spent:
    subject.prepare()
    clock.flush()
    spent = clock.time(subject.run)
    subject.check()
    return spent


def _peak_bytes(subject: Subject, clock: Clock) -> int | None:
    subject.prepare()
    peak = clock.peak_bytes(subject.run)
    subject.check()
    return peak


def _record(subject: Subject, timing: list[Spent], peak: int | None) -> dict[str, Any]:
    record = {
        **subject.labels,
        "moved_bytes": subject.moved_bytes,
        "peak_bytes": peak,
        "us": [round(spent.total / 1e3) for spent in timing],
        "delay_us": [round(spent.delay / 1e3) for spent in timing],
    }
    if any(spent.host != spent.total for spent in timing):
        record["host_us"] = [round(spent.host / 1e3) for spent in timing]
    if subject.stages:
        record["stages_us"] = {
            name: [round(spent / 1e3) for spent in calls] for name, calls in subject.stages.items()
        }
    return record

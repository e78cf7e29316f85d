"""Time subjects interleaved: each once a round, in a shuffled order, on cold caches."""

from __future__ import annotations

import gc
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from bench.clocks import Clock, CpuClock, Spent


def nothing() -> None:
    """Do nothing."""


@dataclass
class Subject:
    """A function to time, with preparation and check.

    Attributes:
        labels: identify the subject in the results file; at least `name`.
        run: the function to time.
        moved_bytes: memory traffic that the function cannot avoid, counted by hand; 0 if unknown.
        prepare: runs before each call, untimed.
        check: runs after each call, untimed; raises an error if the call did the wrong thing.
        stages: name -> nanoseconds of each call; `run` appends to them.
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
    """Time all subjects, `rounds` times each; use the CPU's clock by default.

    Returns:
        For each subject: labels, raw times in microseconds ("us"), the time that its threads waited
        for a core ("delay_us"), stages, unavoidable bytes and peak bytes of one call.
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

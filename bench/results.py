"""Recorded results: medians and ratios of raw times."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterable
from operator import itemgetter
from pathlib import Path
from typing import Any

from bench.environment import RESULTS

SCHEMA = 1

# A call is clean if its threads waited for a core for at most this share of its time: other
# processes were out of its way. Medians are over clean calls, where there are any.
CLEAN_DELAY = 0.02

Run = dict[str, Any]
Record = dict[str, Any]


def newest(pattern: str, folder: Path = RESULTS) -> dict[str, Any] | None:
    """Return the content of the newest results file of a kind, or None if there is none."""
    found = (json.loads(path.read_text()) for path in folder.glob(pattern))
    return max(found, key=itemgetter("date"), default=None)


def clean_times(record: Record) -> list[int]:
    """Microseconds of the clean calls."""
    pairs = zip(record["us"], record["delay_us"], strict=True)
    return [spent for spent, delay in pairs if delay <= CLEAN_DELAY * spent]


def median_us(record: Record) -> float:
    """Median of the clean calls, of all if none is clean."""
    return float(statistics.median(clean_times(record) or record["us"]))


def find(run: Run, name: str, **labels: Any) -> list[Record]:
    """Subjects of a run by name and further labels."""
    wanted = {"name": name, **labels}
    return [
        record
        for record in run["subjects"]
        if all(record.get(key) == value for key, value in wanted.items())
    ]


def time_us(run: Run, name: str, **labels: Any) -> float:
    """Median of one subject of a run; of "read", which is timed several ways, the fastest.

    Raises:
        LookupError: no such subject was measured.
    """
    found = find(run, name, **labels)
    if not found:
        raise LookupError(f"{run['model']} {run['dtype']}: no subject {name} {labels}")
    return min(median_us(record) for record in found)


class Results:
    """One results file.

    Args:
        data: as bench.steps wrote it.

    Raises:
        ValueError: a file of another schema.
    """

    def __init__(self, data: dict[str, Any]) -> None:
        if data.get("schema") != SCHEMA:
            raise ValueError(
                f"expected a results file of schema {SCHEMA}, got {data.get('schema')}"
            )
        self.data = data

    @staticmethod
    def load(path: Path | None = None) -> Results:
        """Read a results file of bench.steps, by default the newest.

        Raises:
            FileNotFoundError: if nothing is recorded yet.
        """
        data = newest("cpu-steps-*.json") if path is None else json.loads(path.read_text())
        if data is None:
            raise FileNotFoundError("nothing is recorded yet: run python -m bench.steps")
        return Results(data)

    def cases(self) -> list[tuple[str, str]]:
        """(model, dtype) of what was measured, in order."""
        return list(dict.fromkeys((run["model"], run["dtype"]) for run in self.data["runs"]))

    def runs(self, model: str, dtype: str) -> list[Run]:
        """All processes that measured this model and dtype."""
        runs = self.data["runs"]
        return [run for run in runs if (run["model"], run["dtype"]) == (model, dtype)]

    def over_runs(self, model: str, dtype: str, value: Callable[[Run], float]) -> float:
        """Median over runs of a value of each run.

        Raises:
            LookupError: nothing was measured.
        """
        runs = self.runs(model, dtype)
        if not runs:
            raise LookupError(f"{model} {dtype} was not measured")
        return statistics.median(value(run) for run in runs)

    def time(self, model: str, dtype: str, name: str, **labels: Any) -> float:
        """Microseconds: median over runs of the medians of rounds."""
        return self.over_runs(model, dtype, lambda run: time_us(run, name, **labels))

    def slowest_exp(self, model: str, dtype: str, **labels: Any) -> float:
        """The exp with which our step took longest."""
        exps: list[float] = self.data["settings"]["exps"]
        return max(exps, key=lambda exp: self.time(model, dtype, "ours", exp=exp, **labels))

    def ratio(self, model: str, dtype: str, baseline: str, name: str, **labels: Any) -> float:
        """Time of a subject over time of a baseline in the same run; median over runs."""
        return self.over_runs(
            model, dtype, lambda run: time_us(run, name, **labels) / time_us(run, baseline)
        )

    def quartiles(self, model: str, dtype: str, name: str, **labels: Any) -> tuple[float, float]:
        """First and third quartile in microseconds, over the clean calls of all runs."""
        times: list[int] = []
        for run in self.runs(model, dtype):
            best = min(find(run, name, **labels), key=median_us)
            times += clean_times(best) or best["us"]
        if len(times) < 2:
            return float(times[0]), float(times[0])
        first, _, third = statistics.quantiles(times, n=4, method="inclusive")
        return first, third

    def clean_share(self, cases: Iterable[tuple[str, str]] | None = None) -> float:
        """Share of all calls that were clean."""
        kept = set(cases or self.cases())
        records = [
            record
            for run in self.data["runs"]
            if (run["model"], run["dtype"]) in kept
            for record in run["subjects"]
        ]
        total = sum(len(record["us"]) for record in records)
        return sum(len(clean_times(record)) for record in records) / max(total, 1)

    def stages(self, model: str, dtype: str, **labels: Any) -> dict[str, float]:
        """Microseconds of each stage of our step, and "python": what lies between them."""
        runs = self.runs(model, dtype)
        stages: dict[str, list[float]] = {}
        for run in runs:
            for record in find(run, "ours", **labels):
                known = {
                    name: statistics.median(calls) for name, calls in record["stages_us"].items()
                }
                known["python"] = max(statistics.median(record["us"]) - sum(known.values()), 0.0)
                for name, value in known.items():
                    stages.setdefault(name, []).append(value)
        return {name: statistics.median(values) for name, values in stages.items()}

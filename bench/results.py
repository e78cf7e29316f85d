"""Compute medians and ratios from the raw times of a results file."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterable, Sequence
from operator import itemgetter
from pathlib import Path
from typing import Any

from bench.environment import RESULTS

SCHEMA = 1

# Kinds of gradients. Runs that name none are synthetic.
SYNTHETIC, ROW_SCALED = "synthetic", "row-scaled"
REAL = ("trec50@1", "trec50@20", "trec50@80", "conll2003@1", "conll2003@20", "conll2003@80")

# A call is clean if its threads waited for a core for at most this share of its time, so that other
# processes did not slow it down. Medians are over clean calls if there are any.
CLEAN_DELAY = 0.02

Run = dict[str, Any]
Record = dict[str, Any]


def newest(pattern: str, folder: Path = RESULTS) -> dict[str, Any] | None:
    """Return the content of the newest results file of a kind, or None if there is none."""
    found = (json.loads(path.read_text()) for path in folder.glob(pattern))
    return max(found, key=itemgetter("date"), default=None)


def clean_times(record: Record) -> list[int]:
    """Return the microseconds of the clean calls."""
    pairs = zip(record["us"], record["delay_us"], strict=True)
    return [spent for spent, delay in pairs if delay <= CLEAN_DELAY * spent]


def clean_share(records: Sequence[Record]) -> float:
    """Return the share of the calls of these records that were clean."""
    calls = sum(len(record["us"]) for record in records)
    return sum(len(clean_times(record)) for record in records) / max(calls, 1)


def median_us(record: Record) -> float:
    """Return the median of the clean calls, or of all calls if none is clean."""
    return float(statistics.median(clean_times(record) or record["us"]))


def find(run: Run, name: str, **labels: Any) -> list[Record]:
    """Return the subjects of a run with this name and further labels."""
    wanted = {"name": name, **labels}
    return [
        record
        for record in run["subjects"]
        if all(record.get(key) == value for key, value in wanted.items())
    ]


def time_us(run: Run, name: str, **labels: Any) -> float:
    """Return the median of one subject of a run; for "read" the fastest of several ways.

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
        data: the content that bench.steps wrote.

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

    def of(self, grads: str) -> Results:
        """Return the results with one kind of gradients alone."""
        runs = [run for run in self.data["runs"] if run.get("grads", SYNTHETIC) == grads]
        return Results({**self.data, "runs": runs})

    def grads(self) -> list[str]:
        """Return the kinds of gradients in the order measured."""
        return list(dict.fromkeys(run.get("grads", SYNTHETIC) for run in self.data["runs"]))

    def cases(self) -> list[tuple[str, str]]:
        """Return each (model, dtype) in the order measured."""
        return list(dict.fromkeys((run["model"], run["dtype"]) for run in self.data["runs"]))

    def runs(self, model: str, dtype: str) -> list[Run]:
        """Return the runs of all processes that measured this model and dtype."""
        runs = self.data["runs"]
        return [run for run in runs if (run["model"], run["dtype"]) == (model, dtype)]

    def over_runs(self, model: str, dtype: str, value: Callable[[Run], float]) -> float:
        """Compute a value of each run; return the median over runs.

        Raises:
            LookupError: nothing was measured.
        """
        runs = self.runs(model, dtype)
        if not runs:
            raise LookupError(f"{model} {dtype} was not measured")
        return statistics.median(value(run) for run in runs)

    def time(self, model: str, dtype: str, name: str, **labels: Any) -> float:
        """Return microseconds: the median over runs of the medians of rounds."""
        return self.over_runs(model, dtype, lambda run: time_us(run, name, **labels))

    def slowest_exp(self, model: str, dtype: str, **labels: Any) -> float:
        """Return the exp with which our step took longest."""
        exps: list[float] = self.data["settings"]["exps"]
        return max(exps, key=lambda exp: self.time(model, dtype, "ours", exp=exp, **labels))

    def ratio(self, model: str, dtype: str, baseline: str, name: str, **labels: Any) -> float:
        """Divide a subject's time by a baseline's in the same run; return the median over runs."""
        return self.over_runs(
            model, dtype, lambda run: time_us(run, name, **labels) / time_us(run, baseline)
        )

    def quartiles(self, model: str, dtype: str, name: str, **labels: Any) -> tuple[float, float]:
        """Return the first and third quartile in microseconds, over the clean calls of all runs."""
        times: list[int] = []
        for run in self.runs(model, dtype):
            best = min(find(run, name, **labels), key=median_us)
            times += clean_times(best) or best["us"]
        if len(times) < 2:
            return float(times[0]), float(times[0])
        first, _, third = statistics.quantiles(times, n=4, method="inclusive")
        return first, third

    def clean_share(self, cases: Iterable[tuple[str, str]] | None = None) -> float:
        """Return the share of all calls that were clean."""
        kept = set(cases or self.cases())
        runs = (run for run in self.data["runs"] if (run["model"], run["dtype"]) in kept)
        return clean_share([record for run in runs for record in run["subjects"]])

    def stages(self, model: str, dtype: str, **labels: Any) -> dict[str, float]:
        """Return the microseconds of each stage of our step, and "python": the rest."""
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

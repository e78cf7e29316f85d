"""The table of an experiment: means and deviations over runs, beside the paper's own figures."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from sparse_optim.experiments.cells import Outcome, plain
from sparse_optim.experiments.plan import value_of
from sparse_optim.experiments.presets import Experiment, Row
from sparse_optim.files import replacing

Summary = dict[str, Any]

FORGETTING = (
    " Last column: a skill of the base model, before -> after fine-tuning, mean over the tasks "
    "that do not train it."
)

SHIFTED = (
    " A -> B: trained on A, tested on B (typos: the test set of A with two letters swapped in some "
    "words); not in the average."
)


def top_mean(values: Sequence[float], kept: int) -> tuple[float, float | None, int]:
    """Mean and sample deviation of the `kept` highest values, and how many there were.

        mean = sum(top) / n,  deviation = sqrt(sum((top - mean)^2) / (n - 1))

    The deviation is None for a single value. Diverged runs are -inf: they do not count if there are
    `kept` others; otherwise the mean is -inf.

    Examples:
        >>> top_mean([0.5, 0.9, 0.7, 0.8], 3)
        (0.8, 0.1, 3)

    Reference: Agarwal et al. 2025, TACL 13:1767-1788, caption of Table 1 (which does not say
    whether its deviations divide by n or n - 1).
    """
    top = sorted(values, reverse=True)[:kept]
    if -math.inf in top:
        return -math.inf, None, len(top)
    deviation = round(statistics.stdev(top), 12) if len(top) > 1 else None
    return round(statistics.fmean(top), 12), deviation, len(top)


def summarise(experiment: Experiment, outcomes: Iterable[Outcome]) -> list[Summary]:
    """One summary for each row of the experiment that has finished runs."""
    runs = [outcome for outcome in outcomes if outcome["cell"]["stage"] == "run"]
    averaged = averaged_columns(experiment, {column for run in runs for column in run["values"]})
    found = []
    for row in experiment.rows:
        mine = [run for run in runs if run["cell"]["row"] == row.label]
        if mine:
            found.append(summarise_row(experiment, row, mine, averaged))
    return found


def averaged_columns(experiment: Experiment, filled: Collection[str]) -> list[str]:
    """The columns that the average is of: those with a value in any row, without shifted sets; of
    these, those that the experiment names, if it names any.

    Args:
        filled: columns in which any row has a value.
    """
    found = set(filled) - experiment.shifted_columns
    wanted = found.intersection(experiment.averaged) or found
    return [column for column in experiment.columns if column in wanted]


def filled_columns(summaries: Iterable[Summary]) -> set[str]:
    """The columns in which any row has a value."""
    return {column for summary in summaries for column in summary["columns"]}


def summarise_row(
    experiment: Experiment, row: Row, runs: list[Outcome], averaged: Sequence[str]
) -> Summary:
    """Means by column, their average if the row fills its columns, and medians of costs.

    "lr" is the rate of the best run (the first of equals) by task.

    Args:
        averaged: the columns of the average.
    """
    columns: dict[str, Any] = {}
    best_rates: dict[str, float] = {}
    for task in experiment.tasks:
        mine = [run for run in runs if run["cell"]["task"] == task.name]
        if mine:
            best = max(mine, key=partial(value_of, column=task.table_columns[0]))
            best_rates[task.name] = best["cell"]["lr"]
        for column in task.table_columns if mine else ():
            values = [value_of(run, column) for run in mine if column in run["values"]]
            if values:
                mean, deviation, count = top_mean(values, experiment.kept)
                columns[column] = {"mean": mean, "deviation": deviation, "runs": count}
    means = [columns[name]["mean"] for name in averaged if name in columns]
    sizes = [run["delta_bytes"] for run in runs if "delta_bytes" in run]
    return {
        "row": row.label,
        "method": row.name,
        "budget": row.budget,
        "lr": best_rates,
        "columns": columns,
        "average": statistics.fmean(means) if len(means) == len(averaged) else None,
        "entries": statistics.median(run["active_entries"] - run["fresh_entries"] for run in runs),
        "state_bytes": statistics.median(run["state_bytes"] for run in runs),
        "step_ms": statistics.median(run["step_ms"] for run in runs),
        "delta_bytes": statistics.median(sizes) if sizes else None,
        "forgetting": forgotten(runs),
        "paper": dict(experiment.paper.get(row.label, {})),
    }


def forgotten(runs: Iterable[Outcome]) -> Summary | None:
    """What the models could do before and after, the mean over tasks of the mean over seeds.

    None if it was not measured; "after" is None if a run diverged.
    """
    by_task: dict[str, list[Mapping[str, Any]]] = {}
    for run in runs:
        if "forgetting" in run:
            by_task.setdefault(run["cell"]["task"], []).append(run["forgetting"])
    if not by_task:
        return None
    tasks = list(by_task.values())

    def mean(when: str) -> float | None:
        values = [[one[when] for one in task] for task in tasks]
        if any(value is None or not math.isfinite(value) for task in values for value in task):
            return None
        return statistics.fmean(map(statistics.fmean, values))

    return {
        "score": tasks[0][0]["score"],
        "before": mean("before"),
        "after": mean("after"),
        "tasks": list(by_task),
    }


def number(value: float | None, scale: float = 100.0) -> str:
    """The value with two decimals; empty for None."""
    if value is None:
        return ""
    return "diverged" if math.isinf(value) else f"{scale * value:.2f}"


def measured(entry: Mapping[str, Any] | None, kept: int) -> str:
    """'88.13 ± 0.21', with the number of runs if some are missing."""
    if entry is None:
        return ""
    deviation = "" if entry["deviation"] is None else f" ± {number(entry['deviation'])}"
    missing = "" if entry["runs"] == kept else f" (n = {entry['runs']})"
    return f"{number(entry['mean'])}{deviation}{missing}"


def rate(value: float) -> str:
    """A learning rate as the papers write it.

    Examples:
        >>> rate(0.015), rate(5e-4)
        ('1.5e-2', '5e-4')
    """
    mantissa, exponent = f"{value:e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}"


def rates(found: Mapping[str, float], tasks: Sequence[str]) -> str:
    """The rate; if tasks differ, one for each task in order, '-' for a task without a run.

    Examples:
        >>> rates({"a": 5e-3, "c": 1.5e-2}, ["a", "b", "c"])
        '5e-3/-/1.5e-2'
    """
    if len(set(found.values())) == 1:
        return rate(next(iter(found.values())))
    return "/".join(rate(found[task]) if task in found else "-" for task in tasks)


def markdown(experiment: Experiment, summaries: Sequence[Summary]) -> str:
    """The table as Markdown: our line, and below it the paper's if it has one."""
    filled = filled_columns(summaries)
    shown = [column for column in experiment.columns if column in filled]
    averaged = averaged_columns(experiment, filled)
    is_whole = len(averaged) == len(experiment.columns) - len(experiment.shifted_columns)
    average = ["average"] if len(averaged) > 1 else []
    tasks = [task.name for task in experiment.tasks if any(task.name in s["lr"] for s in summaries)]
    head = ["method", "budget", "lr", *shown, *average, "entries", "state MB", "ms a step"]
    has_size = any(summary["delta_bytes"] is not None for summary in summaries)
    losses = [summary["forgetting"] for summary in summaries if summary["forgetting"] is not None]
    head += ["delta MB"] if has_size else []
    head += [losses[0]["score"]] if losses else []
    lines = [head, [":--", ":--", ":--", *("--:" for _ in head[3:])]]
    for summary in summaries:
        start = [summary["method"], summary["budget"], rates(summary["lr"], tasks)]
        further = [megabytes(summary["delta_bytes"])] if has_size else []
        further += [change(summary["forgetting"])] if losses else []
        lines.append(start + our_figures(summary, shown, bool(average), experiment.kept) + further)
        if summary["paper"]:
            theirs = [number(summary["paper"].get(name), 1.0) for name in shown]
            whole = summary["paper"].get("average") if is_whole else None
            theirs += [number(whole, 1.0)] if average else []
            lines.append(["*the paper*", "", "", *theirs, *[""] * (len(head) - 3 - len(theirs))])
    body = "".join(f"| {' | '.join(line)} |\n" for line in lines)
    notes = legend(experiment, summaries) + (SHIFTED if experiment.shifted_columns & filled else "")
    notes += FORGETTING if losses else ""
    if average and experiment.averaged and set(shown) != set(averaged):
        notes += f" Average: of {', '.join(averaged)}."
    return f"**{experiment.title}**\n\n{body}\n{notes}\n"


def megabytes(size: float | None) -> str:
    """A size with two decimals; empty for None."""
    return "" if size is None else f"{size / 1e6:.2f}"


def change(forgetting: Mapping[str, Any] | None) -> str:
    """'0.812 -> 0.433'; empty for None."""
    if forgetting is None:
        return ""
    after = forgetting["after"]
    return f"{forgetting['before']:.3f} -> " + ("diverged" if after is None else f"{after:.3f}")


def our_figures(summary: Summary, shown: Sequence[str], average: bool, kept: int) -> list[str]:
    """Our figures for one row."""
    columns = [measured(summary["columns"].get(name), kept) for name in shown]
    columns += [number(summary["average"])] if average else []
    entries, state = f"{summary['entries']:,.0f}", f"{summary['state_bytes'] / 1e6:.2f}"
    return [*columns, entries, state, f"{summary['step_ms']:.0f}"]


def legend(experiment: Experiment, summaries: Sequence[Summary]) -> str:
    """The text below the table; of means and deviations only where a value has several runs."""
    found = [entry for summary in summaries for entry in summary["columns"].values()]
    several = any(entry["runs"] > 1 for entry in found)
    how = {
        "grid": "one run for each learning rate; "
        + (
            "the best one."
            if experiment.kept == 1
            else f"mean and sample deviation of the best {experiment.kept} of them."
        ),
        "tuned": "mean and sample deviation over seeds; the learning rate of each method and task "
        "was chosen on a part of train with one seed.",
    }[experiment.protocol]
    if found and not several:
        how = "one run for each value."
    lr = "lr: rate of the best run; if tasks differ, in their order."
    entries = (
        "Entries: active at the end, less the fresh head, which every method trains densely; "
        "methods that choose a new set at each step have touched more."
    )
    return f"Per cent; {how} {lr} {entries} {experiment.paper_note}".strip()


def write_table(experiment: Experiment, outcomes: Sequence[Outcome], folder: Path) -> list[Summary]:
    """Write table.md and table.json; return the summaries."""
    summaries = summarise(experiment, outcomes)
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(folder / "table.md") as path:
        path.write_text(markdown(experiment, summaries))
    with replacing(folder / "table.json") as path:
        path.write_text(json.dumps(plain(summaries), indent=2) + "\n")
    return summaries

"""The pictures of an experiment, from the rows of its table."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from sparse_optim.analysis.line_plot import LinePanel, Point, draw_lines
from sparse_optim.analysis.pareto_plot import Tradeoff, draw_pareto
from sparse_optim.experiments.presets import Experiment, TaskPreset
from sparse_optim.experiments.table import Summary, averaged_columns, filled_columns
from sparse_optim.finetune.config import parse_budget

SWEPT = {"d3_eps": "eps", "d3_exp": "exp"}


def write_pictures(
    experiment: Experiment, summaries: Sequence[Summary], folder: Path
) -> list[Path]:
    """Draw the experiment's pictures into the folder; return those that had something to show."""
    return [
        folder / f"{name}.png"
        for name in experiment.pictures
        if PICTURES[name](experiment, summaries, folder / f"{name}.png")
    ]


def percent(value: float | None) -> float | None:
    """A share in per cent; None without one, or if the runs diverged."""
    return None if value is None or not math.isfinite(value) else 100 * value


def metric_label(task: TaskPreset) -> str:
    """The metric, in per cent."""
    return f"{task.metric.replace('_', ' / ')} (%)"


def lines_of(
    summaries: Sequence[Summary], column: str, places: Mapping[str, float], label: str
) -> dict[str, list[Point]]:
    """The lines of a panel: a point for each summary that has a place and a value.

    Args:
        places: label of a row -> its value on the x axis.
        label: key of a summary that names its line.
    """
    lines: dict[str, list[Point]] = {}
    for summary in summaries:
        entry = summary["columns"].get(column, {})
        mean = percent(entry.get("mean"))
        if mean is not None and summary["row"] in places:
            point = Point(places[summary["row"]], mean, percent(entry["deviation"]))
            lines.setdefault(summary[label], []).append(point)
    return lines


def diverged(summaries: Sequence[Summary]) -> str:
    """A note on the means that a picture cannot show; "" if there are none."""
    found = [
        f"{summary['row']} on {column}"
        for summary in summaries
        for column, entry in summary["columns"].items()
        if not math.isfinite(entry["mean"])
    ]
    return f"not shown, diverged: {', '.join(found)}" if found else ""


def budget_entries(summary: Summary) -> float:
    """The budget in entries; of a share, the entries that were active."""
    budget = parse_budget(summary["budget"])
    return budget if isinstance(budget, int) else summary["entries"]


def budget_panels(experiment: Experiment, summaries: Sequence[Summary]) -> list[LinePanel]:
    """A panel for each task with a value: metric against budget, a line for each method."""
    places = {one["row"]: budget_entries(one) for one in summaries if one["budget"]}
    # Shares are labelled as they were given, where their entries are.
    given = {places[one["row"]]: one["budget"] for one in summaries if one["row"] in places}
    ticks = {place: budget for place, budget in given.items() if "%" in budget}
    found = [
        LinePanel(
            task.name,
            "budget" if ticks else "budget (entries)",
            metric_label(task),
            lines_of(summaries, task.name, places, "method"),
            counts=True,
            ticks=ticks,
        )
        for task in experiment.tasks
    ]
    return [panel for panel in found if panel.lines]


def draw_budgets(experiment: Experiment, summaries: Sequence[Summary], path: Path) -> bool:
    """Figure 6 of the ID3 paper."""
    panels = budget_panels(experiment, summaries)
    if panels:
        draw_lines([panels], experiment.title, path, diverged(summaries))
    return bool(panels)


def swept_values(experiment: Experiment, setting: str) -> dict[str, float]:
    """Label -> value of the setting, for the rows of ID3 in which nothing else is changed."""
    return {
        row.label: {**experiment.settings, **row.settings}[setting]
        for row in experiment.rows
        if row.method == "id3" and set(row.settings) <= {setting}
    }


def sweep_panels(experiment: Experiment, summaries: Sequence[Summary]) -> list[list[LinePanel]]:
    """Rows of panels, one for each setting: metric against it, a line for each budget.

    A task without a value for either setting has no panel.
    """
    grid = []
    for letter, (setting, name) in zip("ab", SWEPT.items(), strict=True):
        (other,) = SWEPT.keys() - {setting}
        held = f"{SWEPT[other]} = {experiment.settings[other]:g}"
        places = swept_values(experiment, setting)
        panels = [
            LinePanel(
                f"({letter}) {task.name}, {held}",
                name,
                metric_label(task),
                lines_of(summaries, task.name, places, "budget"),
            )
            for task in experiment.tasks
        ]
        grid.append(panels)
    kept = [at for at, column in enumerate(zip(*grid, strict=True)) if any(p.lines for p in column)]
    return [[row[at] for at in kept] for row in grid] if kept else []


def draw_sweeps(experiment: Experiment, summaries: Sequence[Summary], path: Path) -> bool:
    """Figure 4 of the ID3 paper, with a panel for each task."""
    grid = sweep_panels(experiment, summaries)
    if grid:
        draw_lines(grid, experiment.title, path, diverged(summaries))
    return bool(grid)


def tradeoffs(summaries: Sequence[Summary]) -> tuple[list[Tradeoff], str]:
    """The rows of Figure 1 by their average, and a note on those without one."""
    averages = [(summary, percent(summary["average"])) for summary in summaries]
    rows = [
        Tradeoff(summary["method"], summary["entries"], value)
        for summary, value in averages
        if value is not None
    ]
    missing = [summary["row"] for summary, value in averages if value is None]
    note = f"not shown, a value is missing or diverged: {', '.join(missing)}" if missing else ""
    return rows, note


def draw_tradeoffs(experiment: Experiment, summaries: Sequence[Summary], path: Path) -> bool:
    """Figure 1 of the ID3 paper, if rows differ in their number of entries."""
    rows, note = tradeoffs(summaries)
    if len({row.entries for row in rows if row.entries > 0}) < 2:
        return False
    columns = averaged_columns(experiment, filled_columns(summaries))
    draw_pareto(rows, *pareto_text(experiment, columns), path, note)
    return True


def pareto_text(experiment: Experiment, columns: Sequence[str]) -> tuple[str, str]:
    """The label of the y axis, and the title: of one column its metric, and with its name."""
    if len(columns) > 1:
        return f"average of {len(columns)} columns (%)", experiment.title
    (column,) = columns
    (task,) = (task for task in experiment.tasks if column in task.table_columns)
    return metric_label(task), f"{experiment.title}: {column}"


Draw = Callable[[Experiment, Sequence[Summary], Path], bool]

PICTURES: Mapping[str, Draw] = {
    "budgets": draw_budgets,
    "sweeps": draw_sweeps,
    "pareto": draw_tradeoffs,
}

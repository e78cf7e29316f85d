"""The picture of an evaluation metric against unmasked entries, and against budgets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

from matplotlib.axes import Axes
from matplotlib.ticker import EngFormatter

from sparse_optim.analysis.plot_style import new_figure, plain, run_colours, save
from sparse_optim.analysis.record import AllocationRecord

LABELS = 8  # of steps, beside the points of a line


@dataclass(frozen=True)
class MetricPanel:
    """Runs that were evaluated on the same data.

    Attributes:
        data: names the data; "" if unknown.
        metric: the evaluation metric to draw.
        records: by the name that the legend shows.
    """

    data: str
    metric: str
    records: Mapping[str, AllocationRecord]

    @property
    def budgets_differ(self) -> bool:
        """Whether the runs have several budgets."""
        return len({record.budget for record in self.records.values()}) > 1


def draw_metric(panels: Sequence[MetricPanel], path: Path) -> None:
    """Draw each panel: the metric against the entries unmasked so far (Figure 5), a line per run.

    Points are labelled with their step (see `labelled`). Where all evaluations of a run have the
    same number, a dashed line carries its last value over to the other runs. Runs with different
    budgets add the last value against the budget (Figure 6).
    """
    rows = sum(1 + panel.budgets_differ for panel in panels)
    names = [name for panel in panels for name in panel.records]
    only = f": {names[0]}" if len(names) == 1 else ""
    figure = new_figure(7.2, 0.6 + 3.6 * rows, f"Metric and unmasked entries{only}")
    remaining = iter(figure.subplots(rows, 1, squeeze=False)[:, 0])
    for panel in panels:
        axes = next(remaining)
        if panel.data:
            axes.set_title(panel.data, fontsize=10, loc="left")
        _draw_runs(axes, panel)
        axes.set_xlabel("active entries")
        _finish(axes, panel.metric, len(names) > 1)
        if panel.budgets_differ:
            axes = next(remaining)
            _draw_budgets(axes, panel)
            _finish(axes, panel.metric, len(names) > 1)
    save(figure, path)


def _finish(axes: Axes, metric: str, legend: bool) -> None:
    axes.set_ylabel(metric.replace("_", " / "))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.margins(y=0.15)
    if legend:
        axes.legend(frameon=False, fontsize=9)
    plain([axes])


def _draw_runs(axes: Axes, panel: MetricPanel) -> None:
    colours = run_colours(len(panel.records))
    for colour, (name, record) in zip(colours, panel.records.items(), strict=True):
        found = record.evaluations(panel.metric)
        active, values = [row[1] for row in found], [row[2] for row in found]
        alone = len(set(active)) == 1 and len(panel.records) > 1
        axes.plot(active, values, color=colour, marker="o", markersize=4.5,
                  label=f"{name} (dashed: its last value)" if alone else name)  # fmt: skip
        if alone:
            axes.axhline(values[-1], color=colour, linestyle="--", linewidth=1.0)
        _note_steps(axes, found, colour)
    axes.margins(x=0.12)


def _note_steps(axes: Axes, found: Sequence[tuple[int, int, float]], colour: str) -> None:
    for step, active, value in labelled(found):
        axes.annotate(f"step {step}", (active, value), xytext=(7, 6), textcoords="offset points",
                      ha="left", va="center", color=colour, fontsize=8.5)  # fmt: skip


def labelled(found: Sequence[tuple[int, int, float]]) -> list[tuple[int, int, float]]:
    """The evaluations (step, active entries, value) that are labelled with their step.

    All, but for those between the first and the last of equal numbers of entries: once the budget
    is spent, points are above one another. Of more than LABELS only some, with the first and last.

    Examples:
        >>> labelled([(5, 10, 0.1), (10, 20, 0.2), (15, 20, 0.3), (20, 20, 0.4)])
        [(5, 10, 0.1), (10, 20, 0.2), (20, 20, 0.4)]
    """
    end = len(found) - 1
    ends = [
        row
        for at, row in enumerate(found)
        if at in (0, end) or not found[at - 1][1] == row[1] == found[at + 1][1]
    ]
    every = -(-len(ends) // LABELS)
    return [row for at, row in enumerate(ends) if at % every == 0 or at == len(ends) - 1]


def _draw_budgets(axes: Axes, panel: MetricPanel) -> None:
    """Last value of the metric against the budget, a line for each method and model.

    The line joins the means where several runs (seeds) have the same budget.
    """
    lines: dict[tuple[str, int], list[tuple[int, float]]] = {}
    colours: dict[tuple[str, int], str] = {}  # of the method's first run
    for colour, record in zip(run_colours(len(panel.records)), panel.records.values(), strict=True):
        line = record.method, sum(record.sizes.values())
        colours.setdefault(line, colour)
        last = record.evaluations(panel.metric)[-1][2]
        lines.setdefault(line, []).append((record.budget, last))
    size = EngFormatter(places=1, sep="")
    several = len({model for _, model in lines}) > 1
    for (method, model), ends in lines.items():
        colour = colours[method, model]
        budgets = sorted({budget for budget, _ in ends})
        means = [mean(value for at, value in ends if at == budget) for budget in budgets]
        axes.plot(budgets, means, color=colour, linewidth=1.4)
        axes.plot(*zip(*ends, strict=True), color=colour, marker="s", markersize=4.5, linestyle="",
                  label=f"{method} ({size(model)} entries)" if several else method)  # fmt: skip
    axes.set_xscale("log")
    axes.set_xticks(sorted({record.budget for record in panel.records.values()}))
    axes.minorticks_off()
    axes.set_xlabel("budget (entries)")

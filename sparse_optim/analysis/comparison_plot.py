"""The picture of a comparison: metric curves, and below them step time, state and delta size."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import SubFigure

from sparse_optim.analysis.compare import Run, groups_of
from sparse_optim.analysis.plot_style import new_figure, plain, run_colours, save, steps_below

NAME_LENGTH = 34  # characters of a run's name beside a bar
COSTS: tuple[tuple[str, Callable[[Run], float]], ...] = (
    ("step (ms)", lambda run: run.step_ms),
    ("optimizer state (MB)", lambda run: run.state_bytes / 1e6),
    ("delta file (MB)", lambda run: run.delta_bytes / 1e6),
)


def draw_comparison(runs: Sequence[Run], path: Path) -> None:
    """Draw each group of comparable runs: its curves above, its costs below.

    Args:
        runs: each has one colour in all panels of its group.
        path: file to write; its suffix is the format.
    """
    groups = groups_of(runs)
    heights = [3.6 + 0.5 + 0.3 * len(group) + 0.5 for group in groups.values()]
    figure = new_figure(10.0, 0.5 + sum(heights), "Comparison of runs")
    parts = figure.subfigures(len(groups), 1, squeeze=False, height_ratios=heights)[:, 0]
    for part, (data, group) in zip(parts, groups.items(), strict=True):
        part.suptitle(data.title, fontsize=10.5, x=0.02, ha="left")
        curves, bars = part.subfigures(2, 1, height_ratios=(3.6, 1.0 + 0.3 * len(group)))
        colours = run_colours(len(group))
        _draw_curves(curves.subplots(), group, colours)
        _draw_costs(bars, group, colours)
    save(figure, path)


def _draw_curves(axes: Axes, runs: Sequence[Run], colours: Sequence[str]) -> None:
    """The metric at each evaluation."""
    for run, colour in zip(runs, colours, strict=True):
        steps, values = zip(*run.evaluations, strict=True) if run.evaluations else ((), ())
        axes.plot(steps, values, color=colour, marker="o", markersize=4, linewidth=1.6,
                  label=_short(run.name))  # fmt: skip
    axes.set_ylabel(runs[0].data.metric.replace("_", " / "))
    axes.margins(y=0.1)
    plain([axes])
    steps_below(axes)
    axes.legend(frameon=False, fontsize=8.5, loc="center left", bbox_to_anchor=(1.0, 0.5))


def _draw_costs(figure: SubFigure, runs: Sequence[Run], colours: Sequence[str]) -> None:
    """A bar for each run, its value written beside it."""
    panels = figure.subplots(1, len(COSTS), sharey=True)
    for axes, (title, cost) in zip(panels, COSTS, strict=True):
        values = [cost(run) for run in runs]
        bars = axes.barh(range(len(runs)), values, height=0.62, color=colours)
        axes.bar_label(bars, [f"{value:.3g}" if value < 1000 else f"{value:,.0f}"
                              for value in values], padding=3, fontsize=8.5)  # fmt: skip
        axes.set_title(title, fontsize=9.5, loc="left")
        axes.set_yticks(range(len(runs)), [_short(run.name) for run in runs])
        axes.set_xlim(0, 1.25 * max(*values, 1e-9))  # room for the numbers
        plain([axes])
        axes.grid(False)
        axes.set_xticks([])
    panels[0].invert_yaxis()


def _short(name: str) -> str:
    """Both ends of a long name."""
    half = NAME_LENGTH // 2
    return name if len(name) <= NAME_LENGTH else f"{name[: half - 1]}…{name[-half:]}"

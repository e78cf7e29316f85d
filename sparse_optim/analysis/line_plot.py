"""A picture of panels with lines: a metric against a budget or another setting."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.ticker import EngFormatter, FuncFormatter

from sparse_optim.analysis.plot_style import GREY, new_figure, plain, run_colours, save

PANEL = (3.5, 3.0)  # inches


@dataclass(frozen=True)
class Point:
    """A mean over runs at one value of the x axis; its deviation is None for a single run."""

    x: float
    mean: float
    deviation: float | None = None


@dataclass(frozen=True)
class LinePanel:
    """One pair of axes.

    Attributes:
        title: above the axes.
        x_label, y_label: beside them.
        lines: by the name that the legend shows.
        counts: whether x counts entries: a log axis, labelled 80k. Else the values are labelled as
            they are, on a log axis if they span more than a factor of ten.
    """

    title: str
    x_label: str
    y_label: str
    lines: Mapping[str, Sequence[Point]] = field(default_factory=dict)
    counts: bool = False

    @property
    def values(self) -> list[float]:
        """The values of the x axis, each once."""
        return sorted({point.x for line in self.lines.values() for point in line})

    @property
    def logarithmic(self) -> bool:
        """Whether the x axis is logarithmic."""
        values = self.values
        return self.counts or (min(values) > 0 and max(values) > 10 * min(values))


def draw_lines(grid: Sequence[Sequence[LinePanel]], title: str, path: Path, note: str = "") -> None:
    """Draw rows of panels; a line has one colour in all of them, bars are one deviation each way.

    Args:
        grid: rows of panels, of equal length.
        note: a line below the panels.
    """
    panels = [panel for row in grid for panel in row]
    names = list(dict.fromkeys(name for panel in panels for name in panel.lines))
    colours = dict(zip(names, run_colours(len(names)), strict=True))
    rows, columns = len(grid), len(grid[0])
    figure = new_figure(max(5.0, PANEL[0] * columns), 0.8 + PANEL[1] * rows, title)
    for axes, panel in zip(figure.subplots(rows, columns, squeeze=False).flat, panels, strict=True):
        _draw_panel(axes, panel, colours)
        if len(panel.lines) > 1:
            axes.legend(frameon=False, fontsize=9)
    if note:
        figure.supxlabel(note, fontsize=8.5, color=GREY, x=0.02, ha="left")
    save(figure, path)


def _draw_panel(axes: Axes, panel: LinePanel, colours: Mapping[str, str]) -> None:
    for name, line in panel.lines.items():
        points = sorted(line, key=lambda point: point.x)
        axes.errorbar([point.x for point in points], [point.mean for point in points],
                      yerr=[point.deviation or 0.0 for point in points], label=name,
                      color=colours[name], marker="o", markersize=4.5, linewidth=1.6,
                      elinewidth=0.9, capsize=2.5)  # fmt: skip
    axes.set_title(panel.title, fontsize=10, loc="left")
    axes.set_xlabel(panel.x_label)
    axes.set_ylabel(panel.y_label)
    if panel.values:
        axes.set_xscale("log" if panel.logarithmic else "linear")
        axes.set_xticks(panel.values)
        axes.minorticks_off()
    plainly = FuncFormatter(lambda value, _: f"{value:g}")
    axes.xaxis.set_major_formatter(EngFormatter(sep="") if panel.counts else plainly)
    axes.tick_params(axis="x", labelrotation=45 if panel.counts else 0)
    axes.margins(y=0.12)
    plain([axes])

"""A picture of panels with lines: a metric against a budget or another setting."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.ticker import EngFormatter, FuncFormatter

from sparse_optim.analysis.plot_style import footnote, new_figure, plain, run_colours, save

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
        ticks: value of the x axis -> its label, where the value has a better one.
    """

    title: str
    x_label: str
    y_label: str
    lines: Mapping[str, Sequence[Point]] = field(default_factory=dict)
    counts: bool = False
    ticks: Mapping[float, str] = field(default_factory=dict)

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
    """Draw rows of panels; a line has one colour in all of them.

    Bars are one deviation each way; the mean of a single run has none.

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
    footnote(figure, note)
    save(figure, path)


def _draw_panel(axes: Axes, panel: LinePanel, colours: Mapping[str, str]) -> None:
    for name, line in panel.lines.items():
        points = sorted(line, key=lambda point: point.x)
        axes.plot([point.x for point in points], [point.mean for point in points], label=name,
                  color=colours[name], marker="o", markersize=4.5, linewidth=1.6)  # fmt: skip
        bars = [(point.x, point.mean, point.deviation) for point in points if point.deviation]
        if bars:
            places, means, deviations = zip(*bars, strict=True)
            axes.errorbar(places, means, yerr=deviations, color=colours[name], linestyle="",
                          elinewidth=0.9, capsize=2.5)  # fmt: skip
    axes.set_title(panel.title, fontsize=10, loc="left")
    axes.set_xlabel(panel.x_label)
    axes.set_ylabel(panel.y_label)
    if panel.values:
        axes.set_xscale("log" if panel.logarithmic else "linear")
        axes.set_xticks(panel.values)
        axes.minorticks_off()
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: x_text(panel, value)))
    axes.tick_params(axis="x", labelrotation=45 if panel.counts else 0)
    axes.margins(y=0.12)
    plain([axes])


def x_text(panel: LinePanel, value: float) -> str:
    """The label of a value of the x axis: as it was given, or three digits of it.

    Examples:
        >>> counts = LinePanel("", "", "", counts=True, ticks={22565: "0.1%"})
        >>> x_text(counts, 22565), x_text(counts, 112823), x_text(LinePanel("", "", ""), 0.5)
        ('0.1%', '113k', '0.5')
    """
    if value in panel.ticks:
        return panel.ticks[value]
    return EngFormatter(sep="")(float(f"{value:.3g}")) if panel.counts else f"{value:g}"

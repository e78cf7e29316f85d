"""The picture of quality against trained entries: Figure 1 of the ID3 paper."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter

from sparse_optim.analysis.plot_style import COLOURS, GREY, footnote, new_figure, plain, save

SHAPES = "osD^vPX*<>hp"  # markers of the methods, in order; with the colours 24 pairs
SIZE_NOTE = "Larger marker: more trained entries. Dotted: the best with as few entries."
AREAS = (45.0, 330.0)  # of the markers with the fewest and the most entries, in square points


@dataclass(frozen=True)
class Tradeoff:
    """A row of a table: a method, its trained entries (0: the head alone), and its value."""

    method: str
    entries: float
    value: float


def frontier(rows: Sequence[Tradeoff]) -> list[Tradeoff]:
    """The rows that no other row beats with as few entries, from few entries to many.

    Example:
        >>> rows = [Tradeoff("a", 10, 0.5), Tradeoff("b", 20, 0.4), Tradeoff("c", 30, 0.6)]
        >>> [row.method for row in frontier(rows)]
        ['a', 'c']
    """
    best: list[Tradeoff] = []
    for row in sorted(rows, key=lambda row: (row.entries, -row.value)):
        if not best or row.value > best[-1].value:
            best.append(row)
    return best


def marker_areas(rows: Sequence[Tradeoff]) -> list[float]:
    """Area of each marker: it grows with the logarithm of the entries."""
    logs = [math.log(row.entries) for row in rows]
    low, high = min(logs), max(logs)
    small, large = AREAS
    return [small + (large - small) * (one - low) / (high - low or 1.0) for one in logs]


def is_narrow(rows: Sequence[Tradeoff]) -> bool:
    """Whether the entries span less than a factor of a hundred: powers of ten would be too few."""
    entries = [row.entries for row in rows]
    return max(entries) < 100 * min(entries)


def draw_pareto(
    rows: Sequence[Tradeoff], value_label: str, title: str, path: Path, note: str = ""
) -> None:
    """Draw value against entries on a log axis: a marker for each row, its area by the entries.

    The dotted line joins the rows that no other row beats with as few entries. A row without
    entries (only the fresh head is trained) is a dashed line.

    Args:
        rows: at least one with entries.
        note: a line below the axes, after that on the markers.
    """
    placed = [row for row in rows if row.entries > 0]
    names = list(dict.fromkeys(row.method for row in placed))
    figure = new_figure(7.8, max(4.4, 1.6 + 0.27 * len(names)), title)
    axes = figure.subplots()
    best = frontier(placed)
    axes.plot([row.entries for row in best], [row.value for row in best], color=GREY,
              linestyle=":", linewidth=1.2, zorder=1)  # fmt: skip
    areas = dict(zip(map(id, placed), marker_areas(placed), strict=True))
    for index, name in enumerate(names):
        mine = [row for row in placed if row.method == name]
        axes.scatter([row.entries for row in mine], [row.value for row in mine],
                     s=[areas[id(row)] for row in mine], marker=SHAPES[index % len(SHAPES)],
                     color=COLOURS[index % len(COLOURS)], alpha=0.7,
                     edgecolors="white", linewidths=0.9, label=name)  # fmt: skip
    for row in rows:
        if row.entries <= 0:
            axes.axhline(row.value, color=GREY, linestyle="--", linewidth=1.1,
                         label=f"{row.method} (no entries)")  # fmt: skip
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if is_narrow(placed) else (1.0,)))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.margins(x=0.09, y=0.12)
    axes.set_xlabel("trained entries (active at the end, without the fresh head)")
    axes.set_ylabel(value_label)
    plain([axes])
    legend = figure.legend(loc="outside right upper", frameon=False, fontsize=9)
    for handle in legend.legend_handles:
        if handle is not None and hasattr(handle, "set_sizes"):
            handle.set_sizes([60.0])
    footnote(figure, SIZE_NOTE, note)
    save(figure, path)

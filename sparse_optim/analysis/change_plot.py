"""Draw where a delta changed a model: layers x modules."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import ListedColormap, LogNorm
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from sparse_optim.analysis.change_map import ChangeMap, change_maps
from sparse_optim.analysis.plot_style import GREY, new_figure, save
from sparse_optim.delta import Change, DeltaError

COLOURS = "YlGnBu"
NONE = "#eceef0"  # of a tensor without changed entries
LABELLED_LAYERS = 24  # with more, numbers in the cells would not be legible
LABELLED_TICKS = 40
OTHERS = 16  # tensors outside the layers, those with the most entries


def draw_changes(
    changes: Mapping[str, Change], title: str, path: Path, *, size: bool = False
) -> None:
    """A heat map for each stack of layers, and a bar for each tensor outside them.

    Args:
        changes: by tensor, as `sparse_optim.delta.tensor_changes` gives them.
        title: of the picture.
        path: its suffix is the format.
        size: draw the size of the changes beside the base's values (with `sizes=True`), not the
            share of the entries that changed.

    Raises:
        DeltaError: no entry changed, or with `size`, none of them has a value in the base.
    """
    maps, others = change_maps(changes)
    rows = [(name, change) for name, change in others.items() if change.entries]
    rows = sorted(rows, key=lambda row: -row[1].entries)[:OTHERS]
    shares = [_number(change, size) for each in maps for change in each.cells.values()]
    shares += [_number(change, size) for _, change in rows]
    known = [share for share in shares if math.isfinite(share) and share > 0]
    if not known:
        raise DeltaError(f"no entry changed, so there is nothing to draw in {path}")
    lowest, highest = min(known), max(max(known), 1.01 * min(known))
    norm = LogNorm(lowest, highest)
    panels = [_shown(each) for each in maps]
    heights = [len(modules) + 2.2 for modules in panels] + ([len(rows) + 2.2] if rows else [])
    widest = max((len(each.layers) for each in maps), default=0)
    width, height = 3.4 + min(12.0, max(4.2, 0.42 * widest)), max(2.8, 0.9 + 0.26 * sum(heights))
    figure = new_figure(width, height, title)
    grid = figure.subplots(len(heights), 1, squeeze=False, height_ratios=heights).reshape(-1)
    for axes, each, modules in zip(grid, maps, panels, strict=False):
        _draw_map(axes, each, modules, norm, size)
    if rows:
        _draw_bars(grid[-1], rows, norm, size)
        if maps:
            grid[-1].set_title("outside the layers (entries changed)", fontsize=10, loc="left")
    bar = figure.colorbar(ScalarMappable(norm, COLOURS), ax=list(grid), shrink=0.6, pad=0.01)
    if highest < 20 * lowest:  # there is at most one power of ten
        bar.ax.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{100 * share:g}%"))
    bar.ax.yaxis.set_minor_formatter(NullFormatter())
    bar.set_label(_label(size) + " (grey: none)", fontsize=9)
    bar.ax.tick_params(labelsize=8)
    bar.outline.set_visible(False)
    save(figure, path)


def _label(size: bool) -> str:
    return "size of the change /\nsize of the base's values" if size else "entries changed"


def _number(change: Change | None, size: bool) -> float:
    """0 without a changed entry; infinite where the base has no values, or zeros alone."""
    if change is None or not change.entries:
        return 0.0
    if not size:
        return change.share
    return math.inf if change.relative is None else change.relative


def _shown(found: ChangeMap) -> list[str]:
    """The modules with changed entries."""
    there = {module for (_, module), cell in found.cells.items() if cell.entries}
    return [module for module in found.modules if module in there]


def _draw_map(
    axes: Axes, found: ChangeMap, modules: Sequence[str], norm: LogNorm, size: bool
) -> None:
    share = np.array(
        [
            [_number(found.cells.get((layer, module)), size) for layer in found.layers]
            for module in modules
        ]
    ).reshape(len(modules), len(found.layers))
    axes.imshow(np.zeros_like(share), aspect="auto", cmap=ListedColormap([NONE]))
    drawn = np.where((share > 0) & np.isfinite(share), share, np.nan)
    axes.imshow(drawn, aspect="auto", cmap=COLOURS, norm=norm)
    axes.set_yticks(range(len(modules)), modules, fontsize=8)
    every = -(-len(found.layers) // LABELLED_TICKS)
    ticks = range(0, len(found.layers), every)
    names = [".".join(map(str, found.layers[at])) for at in ticks]
    axes.set_xticks(ticks, names, fontsize=8)
    axes.set_xlabel("layer", fontsize=9)
    axes.tick_params(length=0, colors="#4a4f57")
    axes.spines[:].set_visible(False)
    # White lines between the cells.
    axes.set_xticks(np.arange(len(found.layers) + 1) - 0.5, minor=True)
    axes.set_yticks(np.arange(len(modules) + 1) - 0.5, minor=True)
    axes.grid(which="minor", color="white", linewidth=1.2)
    axes.tick_params(which="minor", length=0)
    entries = found.total.entries
    axes.set_title(f"{found.stack}: {entries:,} entries changed", fontsize=10, loc="left")
    if len(found.layers) > LABELLED_LAYERS:
        return
    for (row, column), number in np.ndenumerate(share):
        dark = 0 < number < math.inf and norm(number) > 0.55
        axes.text(column, row, _percent(number), ha="center", va="center", fontsize=6.5,
                  color="white" if dark else "#30343a")  # fmt: skip


def _draw_bars(axes: Axes, rows: Sequence[tuple[str, Change]], norm: LogNorm, size: bool) -> None:
    """A bar for each tensor, on the scale of the colours."""
    numbers = [_number(change, size) for _, change in rows]
    lowest, highest = norm.vmin or 0.0, norm.vmax or 1.0  # numbers, says `draw_changes`
    left = lowest / 2  # so that the shortest bar is seen
    lengths = [number if math.isfinite(number) else left for number in numbers]
    colours = ScalarMappable(norm, COLOURS).to_rgba(np.array(lengths))
    axes.barh(range(len(rows)), [length - left for length in lengths], left=left, height=0.72,
              color=colours, edgecolor=GREY, linewidth=0.4)  # fmt: skip
    for row, (number, (_, change)) in enumerate(zip(numbers, rows, strict=True)):
        text = f" {_percent(number)}%  ({change.entries:,})" if math.isfinite(number) else " new"
        axes.text(lengths[row], row, text, va="center", fontsize=7.5, color="#30343a")
    axes.set_xscale("log")
    axes.set_xlim(left, highest * (highest / left) ** 0.35)
    axes.set_yticks(range(len(rows)), [name for name, _ in rows], fontsize=8)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.spines[["top", "right", "bottom"]].set_visible(False)
    axes.spines["left"].set_color(GREY)
    axes.tick_params(colors="#4a4f57", labelsize=8, length=0, which="both")
    axes.set_xticks([])
    axes.set_xticks([], minor=True)


def _percent(number: float) -> str:
    if number == 0:
        return "·"
    if math.isinf(number):
        return "new"
    percent = 100 * number
    return f"{percent:.0f}" if percent >= 9.95 else f"{percent:#.2g}"

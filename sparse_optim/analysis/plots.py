"""Pictures of records: sparsity and entropy, allocation, growth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import BoundaryNorm, ListedColormap, LogNorm, to_hex
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, FuncFormatter, PercentFormatter

from sparse_optim.analysis.measures import AllocationGrid, allocation_grid
from sparse_optim.analysis.plot_style import (
    COLOURS,
    GREY,
    new_figure,
    plain,
    run_colours,
    save,
    steps_below,
)
from sparse_optim.analysis.record import AllocationRecord, Snapshot

Records = Mapping[str, AllocationRecord]  # by the name that the legend shows

LISTED_LAYERS = 8  # more layers have a scale of colours instead of a legend
SHOWN_MODULES = 7  # in the picture of growth; the rest is added up
OTHERS = "#c9cdd2"
LABELLED_LAYERS = 16  # with more, numbers in the cells would not be legible
LABELLED_TICKS = 40  # a heat map has numbers below at most this many layers
WIDEST = 14.0  # inches of a heat map


def draw_sparsity(records: Records, path: Path) -> None:
    """Tensor sparsity and sparsity entropy against the step (Figures 8 and 9), one line a run."""
    figure = new_figure(7.2, 6.2, _title("Where the active entries are", records))
    sparsity_axes, entropy_axes = figure.subplots(2, 1, sharex=True)
    colours = run_colours(len(records))
    for colour, (name, record) in zip(colours, records.items(), strict=True):
        style = {"color": colour, "linewidth": 1.8, "label": name, "drawstyle": "steps-post"}
        sparsity_axes.plot(record.steps, record.tensor_sparsity(), **style)
        # Before the first entry is unmasked there is no entropy to draw.
        drawn = [
            (snapshot.step, entropy)
            for snapshot, entropy in zip(record.snapshots, record.sparsity_entropy(), strict=True)
            if any(snapshot.active)
        ]
        entropy_axes.plot([step for step, _ in drawn], [value for _, value in drawn], **style)
        maximum = float(np.log(len(record.tensors)))
        entropy_axes.axhline(maximum, color=colour, linewidth=0.9, linestyle=":")
    entropy_axes.annotate(
        "dotted: all tensors alike", (0.99, 0.03), xycoords="axes fraction", ha="right",
        color=GREY, fontsize=8.5,
    )  # fmt: skip
    sparsity_axes.set_ylabel("tensors without an active entry")
    sparsity_axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    sparsity_axes.set_ylim(0, 1.03)
    entropy_axes.set_ylabel("sparsity entropy (nats)")
    entropy_axes.set_ylim(bottom=0)
    plain((sparsity_axes, entropy_axes))
    if len(records) > 1:
        sparsity_axes.legend(frameon=False, fontsize=9)
    steps_below(entropy_axes)
    save(figure, path)


def draw_allocation(record: AllocationRecord, title: str, path: Path) -> None:
    """Layer x module heat maps (Figure 7): the first snapshot with active entries, and the last."""
    grids = {
        snapshot.step: allocation_grid(record.counts(snapshot), record.sizes)
        for snapshot in _first_and_last(record)
    }
    rows, columns = next(iter(grids.values())).size.shape
    down, across = (len(grids), 1) if columns > LABELLED_LAYERS else (1, len(grids))
    width = 2.6 + across * min(WIDEST, max(2.6, 0.42 * columns))
    height = min(60.0, 1.2 + down * (0.4 + 0.24 * rows))
    figure = new_figure(width, height, f"Allocation: {title}")
    panels = figure.subplots(down, across, sharey=True, squeeze=False).reshape(-1)
    shares = [grid.active / grid.size for grid in grids.values()]
    positive = np.concatenate([share[share > 0] for share in shares])
    norm = LogNorm(positive.min(), max(positive.max(), 1.01 * positive.min()))
    for axes, (step, grid) in zip(panels, grids.items(), strict=True):
        there = np.where(np.isnan(grid.size), np.nan, 0.0)
        axes.imshow(there, aspect="auto", cmap=ListedColormap(["#eceef0"]))
        axes.imshow(grid.active / grid.size, aspect="auto", cmap="YlGnBu", norm=norm)
        _label_cells(axes, grid, norm)
        axes.set_title(f"step {step}: {int(np.nansum(grid.active)):,} entries", fontsize=10)
        axes.set_yticks(range(rows), grid.modules, fontsize=8)
    bar = figure.colorbar(panels[-1].images[-1], ax=list(panels), shrink=0.6, pad=0.01)
    bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{100 * share:g}%"))
    bar.set_label("active share of the tensor (grey: none)", fontsize=9)
    bar.ax.tick_params(labelsize=8)
    save(figure, path)


def _label_cells(axes: Axes, grid: AllocationGrid, norm: LogNorm) -> None:
    """Number of active entries in each cell; a dot where a tensor has none."""
    rows, columns = grid.size.shape
    short = EngFormatter(places=0, sep="")
    every = -(-columns // LABELLED_TICKS)
    ticks = range(0, columns, every)
    names = ["no layer" if grid.layers[at] is None else str(grid.layers[at]) for at in ticks]
    axes.set_xticks(ticks, names, fontsize=8)
    axes.set_xlabel("layer", fontsize=9)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    if columns > LABELLED_LAYERS:
        return
    for row in range(rows):
        for column in range(columns):
            active, size = grid.active[row, column], grid.size[row, column]
            if np.isnan(size):
                continue
            dark = active > 0 and norm(active / size) > 0.55
            axes.text(column, row, short(active) if active else "·", ha="center", va="center",
                      fontsize=6.5, color="white" if dark else "#30343a")  # fmt: skip


def draw_growth(record: AllocationRecord, title: str, path: Path) -> None:
    """Active entries against the step, stacked by module and by layer."""
    grids = [
        allocation_grid(record.counts(snapshot), record.sizes).active
        for snapshot in record.snapshots
    ]
    last = allocation_grid(record.counts(record.snapshots[-1]), record.sizes)
    by_module = np.stack([np.nansum(grid, axis=1) for grid in grids], axis=1)
    by_layer = np.stack([np.nansum(grid, axis=0) for grid in grids], axis=1)
    figure = new_figure(9.0, 6.6, f"Growth: {title}")
    module_axes, layer_axes = figure.subplots(2, 1, sharex=True)
    modules, bands = _largest(last.modules, by_module)
    colours = [*COLOURS[:SHOWN_MODULES], OTHERS][: len(modules)]
    module_axes.stackplot(record.steps, bands, labels=modules, colors=colours, step="post")
    names = ["no layer" if layer is None else f"layer {layer}" for layer in last.layers]
    layer_axes.stackplot(record.steps, by_layer, colors=_layer_colours(last.layers), labels=names,
                         step="post")  # fmt: skip
    for axes in (module_axes, layer_axes):
        axes.yaxis.set_major_formatter(EngFormatter(sep=""))
        axes.set_ylabel("active entries")
        axes.margins(x=0)
    _legend_at_the_right(module_axes)
    numbered = [layer for layer in last.layers if layer is not None]
    if len(numbered) > LISTED_LAYERS:
        _layer_scale(figure, layer_axes, numbered, outside=None in last.layers)
    else:
        _legend_at_the_right(layer_axes)
    plain((module_axes, layer_axes))
    steps_below(layer_axes)
    save(figure, path)


def _legend_at_the_right(axes: Axes) -> None:
    """The bands by name, the topmost first."""
    handles, labels = axes.get_legend_handles_labels()
    axes.legend(handles[::-1], labels[::-1], frameon=False, fontsize=8, loc="center left",
                bbox_to_anchor=(1.0, 0.5))  # fmt: skip


def _layer_scale(figure: Figure, axes: Axes, layers: list[int], outside: bool) -> None:
    """A scale of the layers' colours; the grey band below them is outside the layers."""
    colours = ListedColormap(_layer_colours(layers))
    edges = np.arange(len(layers) + 1) - 0.5
    bar = figure.colorbar(ScalarMappable(BoundaryNorm(edges, len(layers)), colours),
                          cax=axes.inset_axes((1.02, 0.0, 0.025, 1.0)))  # fmt: skip
    bar.minorticks_off()
    every = -(-len(layers) // LABELLED_LAYERS)
    at = range(0, len(layers), every)
    bar.set_ticks(list(at), labels=[str(layers[index]) for index in at])
    bar.set_label("layer" + (" (grey: in no layer)" if outside else ""), fontsize=9)
    bar.ax.tick_params(labelsize=8, length=0)
    bar.outline.set_visible(False)


def _largest(modules: list[str], by_module: np.ndarray) -> tuple[list[str], np.ndarray]:
    """The modules with the most entries at the end, largest first, and the sum of the others."""
    order = np.argsort(-by_module[:, -1], kind="stable")
    shown, others = order[:SHOWN_MODULES], order[SHOWN_MODULES:]
    names, bands = [modules[at] for at in shown], by_module[shown]
    if others.size:
        names.append(f"{others.size} others")
        bands = np.concatenate([bands, by_module[others].sum(axis=0, keepdims=True)])
    return names, bands


def _layer_colours(layers: Sequence[int | None]) -> list[str]:
    """Grey for tensors outside the layers, then light to dark."""
    numbered = [layer for layer in layers if layer is not None]
    shades = colormaps["YlGnBu"](np.linspace(0.25, 0.95, max(1, len(numbered))))
    return [
        *[OTHERS] * (len(layers) - len(numbered)),
        *(to_hex(shade) for shade in shades[: len(numbered)]),
    ]


def _first_and_last(record: AllocationRecord) -> list[Snapshot]:
    """The first snapshot with active entries and the last one; only one if they are the same."""
    active = [snapshot for snapshot in record.snapshots if any(snapshot.active)]
    return list({snapshot.step: snapshot for snapshot in active[:1] + active[-1:]}.values())


def _title(text: str, records: Records) -> str:
    """The title, with the name of the run if there is only one, and so no legend."""
    return f"{text}: {next(iter(records))}" if len(records) == 1 else text

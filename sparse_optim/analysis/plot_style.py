"""The style of the pictures: colours, plain axes, a title; no display is needed."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from textwrap import fill

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from sparse_optim.files import replacing

BLUE, ORANGE, GREEN, GREY = "#2563a8", "#d9730d", "#2f8f5b", "#8a8f98"
COLOURS = (BLUE, ORANGE, GREEN, "#8b4fb3", "#c23b4e", "#0f8b8d", "#b08900", "#6b4f3a")


def new_figure(width: float, height: float, title: str) -> Figure:
    """A figure, in inches, with its title at the left."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=12, fontweight="bold", x=0.02, ha="left")
    return figure


def run_colours(number: int) -> list[str]:
    """A colour for each run; no two are equal."""
    if number <= len(COLOURS):
        return list(COLOURS[:number])
    shades = colormaps["turbo"]
    return [to_hex(shades(0.04 + 0.92 * at / (number - 1))) for at in range(number)]


def plain(axes: Iterable[Axes]) -> None:
    """A light grid, no box."""
    for one in axes:
        one.grid(True, color="#e6e8eb", linewidth=0.8)
        one.set_axisbelow(True)
        one.spines[["top", "right"]].set_visible(False)
        one.spines[["left", "bottom"]].set_color(GREY)
        one.tick_params(colors="#4a4f57", labelsize=9)


def steps_below(axes: Axes) -> None:
    """The x axis is the step: whole numbers, from 0."""
    axes.set_xlabel("step")
    axes.set_xlim(left=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def footnote(figure: Figure, *notes: str) -> None:
    """Notes below the axes, each on lines of its own that fit the figure; empty ones are left
    out."""
    characters = int(15 * figure.get_figwidth())  # 8.5 points: about a fifteenth of an inch each
    lines = [fill(note, characters, break_on_hyphens=False) for note in notes if note]
    if lines:
        figure.supxlabel("\n".join(lines), fontsize=8.5, color=GREY, x=0.02, ha="left")


def save(figure: Figure, path: Path) -> None:
    """Write the figure, whole or not at all; the suffix is the format (none: PNG)."""
    target = path if path.suffix else path.with_suffix(".png")
    with replacing(target) as temporary:
        figure.savefig(temporary, dpi=130, format=target.suffix[1:])

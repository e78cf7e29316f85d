"""The heat maps of `inspect`: where a delta changed the model, layers down and modules across."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from sparse_optim.cli.console import plain
from sparse_optim.cli.delta_tables import SHOWN, fold_name

if TYPE_CHECKING:
    from sparse_optim.analysis.change_map import ChangeMap
    from sparse_optim.delta import Change

# Light to dark: matplotlib's YlGnBu, as in the pictures; letters are white on the dark ones.
SHADES = ("#edf8b1", "#c7e9b4", "#7fcdbb", "#41b6c4", "#1d91c0", "#225ea8", "#0c2c84")
DARK = 4
WORDS = (13, 10)  # characters of a heading's line, where the map fits the terminal, and where not
NUMBER = 5  # characters of a cell
NAMES = 48  # characters of a line of a tensor's name
PIECES = re.compile(r"(?<=_)|(?<=[a-z])(?=[A-Z])")  # a long word may be broken here

Measure = Callable[["Change"], "float | None"]


@dataclass(frozen=True)
class Heat:
    """Which number of a change is shown, and its scale of colours.

    Attributes:
        measure: the number; None or infinite: the base has no values to compare with.
        title: what it is.
        lowest, highest: ends of the logarithmic scale.
    """

    measure: Measure
    title: str
    lowest: float
    highest: float

    @classmethod
    def of(cls, changes: Iterable[Change], size: bool) -> Heat:
        """The scale over these changes.

        Args:
            size: show the size of the changes, not the share of the entries.
        """
        measure: Measure = relative_of if size else share_of
        title = "size of the change, % of the base's values" if size else "entries changed, %"
        known = [number for each in changes if (number := measure(each)) and math.isfinite(number)]
        return cls(measure, title, min(known, default=1.0), max(known, default=1.0))

    def cell(self, change: Change | None, width: int) -> Text:
        """A coloured number, right-justified; None: no tensor, and so no change."""
        if change is None or not change.entries:
            return Text("·".rjust(width), "bright_black")
        number = self.measure(change)
        if number is None or math.isinf(number):
            return Text("new".rjust(width), "bright_black")
        text = in_percent(number).rjust(width)
        shade = self._shade(number)
        return Text(text, f"{'white' if shade >= DARK else 'black'} on {SHADES[shade]}")

    def _shade(self, number: float) -> int:
        if number <= self.lowest or self.highest <= self.lowest:
            return 0 if number <= self.lowest and self.highest > self.lowest else len(SHADES) // 2
        if number >= self.highest:
            return len(SHADES) - 1
        place = math.log(number / self.lowest) / math.log(self.highest / self.lowest)
        return min(int(place * len(SHADES)), len(SHADES) - 1)


def share_of(change: Change) -> float | None:
    """The share of the entries that changed."""
    return change.share


def relative_of(change: Change) -> float | None:
    """The size of the change, relative to the base's values."""
    return change.relative


def in_percent(number: float) -> str:
    """A share as a percentage in at most NUMBER characters.

    Examples:
        >>> [in_percent(x) for x in (1.0, 0.123, 0.0123, 0.00123, 0.0000123, 0.0000001, 12.3)]
        ['100', '12', '1.2', '0.12', '0.001', '<.001', '1230']
    """
    percent = 100 * number
    if percent >= 9.95:
        return f"{percent:.0f}" if percent < 99_999 else ">1e5"
    if 0 < percent < 0.0005:
        return "<.001"
    return f"{percent:.{1 if percent >= 0.995 else 2 if percent >= 0.0995 else 3}f}"


def show_changes(
    console: Console, changes: Mapping[str, Change], *, size: bool = False, every: bool = False
) -> None:
    """Print a map for each stack of layers, and a table of the tensors in none; nothing where
    there is no stack.

    Args:
        changes: by tensor.
        size: show the size of the changes, not the share of the entries.
        every: show all tensors outside the layers, not the first SHOWN.
    """
    from sparse_optim.analysis.change_map import change_maps

    maps, others = change_maps(changes)
    if not maps and not size:
        return  # the list of parameters says it all
    cells = [change for each in maps for change in each.cells.values()]
    heat = Heat.of([*cells, *others.values()], size)
    for each in maps:
        console.print(Group(*map_tables(each, heat, console.width)))
    if any(change.entries for change in others.values()):
        if maps:
            console.print("\n[bold]outside the layers[/]:", heat.title, highlight=False)
        console.print(others_table(others, heat, every))


def map_tables(found: ChangeMap, heat: Heat, width: int) -> Iterator[RenderableType]:
    """The tables of a stack, each as wide as the terminal allows.

    Args:
        width: columns of the terminal.
    """
    from sparse_optim.analysis.change_map import short_names, total

    sums = {
        module: total(cell for (_, of), cell in found.cells.items() if of == module)
        for module in found.modules
    }
    shown = [module for module in found.modules if sums[module].entries]
    short = short_names(found.modules)
    labels = [".".join(map(str, layer)) for layer in found.layers]
    first = max(map(len, ("layer", *labels)))
    for word in WORDS:
        headings = {module: fold_heading(short[module], word) for module in shown}
        chunks = list(_chunks(headings, width - first - NUMBER - 1)) or [[]]
        if len(chunks) == 1:
            break
    title = plain(found.stack)
    title.stylize("bold")
    title.append(f": {heat.title}", "not bold")
    for number, chunk in enumerate(chunks):
        last = number == len(chunks) - 1
        yield Text("\n") + title if number == 0 else Text("")
        table = Table(box=None, padding=(0, 1, 0, 0), header_style="", pad_edge=False)
        table.add_column("layer", justify="right", vertical="bottom", no_wrap=True)
        for module in chunk:
            heading = Text("\n").join(map(plain, headings[module]))
            table.add_column(heading, justify="right", no_wrap=True)
        if last:
            table.add_column("all", justify="right", no_wrap=True)
        widths = [_width(headings[module]) for module in chunk]
        for layer, label in zip(found.layers, labels, strict=True):
            here = total(cell for (of, _), cell in found.cells.items() if of == layer)
            cells = [heat.cell(found.cells.get((layer, module)), wide)
                     for module, wide in zip(chunk, widths, strict=True)]  # fmt: skip
            table.add_row(label, *cells, *([heat.cell(here, NUMBER)] if last else ()))
        bottom = [heat.cell(sums[module], wide) for module, wide in zip(chunk, widths, strict=True)]
        table.add_row("all", *bottom, *([heat.cell(found.total, NUMBER)] if last else ()))
        yield table
    still = [short[module] for module in found.modules if module not in headings]
    if still:
        yield plain(f"no entry changed: {', '.join(still)}")


def others_table(changes: Mapping[str, Change], heat: Heat, every: bool) -> Table:
    """A row for each tensor with changed entries; `every`: not only the first SHOWN."""
    rows = {name: change for name, change in changes.items() if change.entries}
    shown = list(rows)[: None if every else SHOWN]
    more = f"{len(rows) - len(shown):,} more: --all" if len(shown) < len(rows) else ""
    table = Table(box=None, padding=(0, 1, 0, 0), show_header=False, pad_edge=False,
                  caption=more or None, caption_justify="left")  # fmt: skip
    table.add_column(overflow="fold")
    table.add_column(justify="right", no_wrap=True)
    table.add_column(justify="right", no_wrap=True)
    for name in shown:
        label = Text("\n").join(map(plain, fold_name(name, NAMES)))
        change = rows[name]
        table.add_row(label, f"{change.entries:,} of {change.numel:,}", heat.cell(change, NUMBER))
    return table


def fold_heading(name: str, most: int) -> list[str]:
    """The lines of a module's name above its column, none longer than `most`.

    Examples:
        >>> fold_heading("attention.output.dense", 10)
        ['attention.', 'output.', 'dense']
        >>> fold_heading("layer.1.EncDecAttention.q", 10)
        ['layer.1.', 'EncDec', 'Attention.', 'q']
    """
    lines = [""]
    for part in re.split(r"(?<=\.)", name):
        for piece in [part] if len(part) <= most else PIECES.split(part):
            short = piece if len(piece) <= most else f"{piece[: most - 1]}…"
            if lines[-1] and len(lines[-1] + short) > most:
                lines.append("")
            lines[-1] += short
    return lines


def _width(heading: Sequence[str]) -> int:
    return max(NUMBER, *map(len, heading))


def _chunks(headings: Mapping[str, Sequence[str]], room: int) -> Iterator[list[str]]:
    """Modules whose columns fit side by side into `room` characters; at least one each."""
    chunk: list[str] = []
    taken = 0
    for module, heading in headings.items():
        wide = _width(heading) + 1
        if chunk and taken + wide > room:
            yield chunk
            chunk, taken = [], 0
        chunk.append(module)
        taken += wide
    if chunk:
        yield chunk

"""The tables of `inspect`: the tensors of a delta, the largest first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

from sparse_optim.cli.console import plain

if TYPE_CHECKING:
    from sparse_optim.delta import Delta

SHOWN = 10  # rows of a table without --all
NARROWEST = 16  # characters of a line of a name, also on a narrow terminal


def sparse_table(delta: Delta, every: bool, width: int) -> Table:
    """Parameters with entries, those with the most first.

    Args:
        every: show all rows instead of the first SHOWN.
        width: columns of the terminal.
    """
    parts = [(name, part) for name, part in delta.sparse.items() if part.num_entries]
    rows = [
        [
            name,
            shape_of(part),
            dtype_of(part),
            f"{part.num_entries:,}",
            f"{part.num_entries / part.numel:.4%}",
            f"{part.nbytes:,}",
        ]
        for name, part in sorted(parts, key=lambda item: -item[1].num_entries)
    ]
    without = len(delta.sparse) - len(parts)
    note = f"{without:,} parameters without entries" if without else ""
    headings = ("parameter", "shape", "dtype", "entries", "share", "bytes")
    return build_table(headings, rows, every, width, note)


def dense_table(delta: Delta, every: bool, width: int) -> Table:
    """Tensors that are stored whole, the largest first; arguments as of `sparse_table`."""
    rows = [
        [name, shape_of(tensor), dtype_of(tensor), f"{tensor.nbytes:,}"]
        for name, tensor in sorted(delta.dense.items(), key=lambda item: -item[1].nbytes)
    ]
    return build_table(("dense tensor", "shape", "dtype", "bytes"), rows, every, width)


def fact_table(title: str) -> Table:
    """An empty table of facts and their values."""
    table = Table(title=plain(title), show_header=False, title_justify="left")
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    return table


def build_table(
    headings: Sequence[str], rows: Sequence[Sequence[str]], every: bool, width: int, note: str = ""
) -> Table:
    """A table with names folded at dots, and a line on the rows that it leaves out."""
    shown = rows if every else rows[:SHOWN]
    more = f"{len(rows) - len(shown):,} more: --all" if len(shown) < len(rows) else ""
    table = Table(caption="; ".join(filter(None, (more, note))) or None)
    taken = sum(max(len(row[at]) for row in (headings, *shown)) for at in range(1, len(headings)))
    room = max(NARROWEST, width - taken - 3 * len(headings) - 1)  # two spaces, a line
    table.add_column(headings[0], overflow="fold")
    for heading in headings[1:]:
        is_text = heading in ("shape", "dtype")
        table.add_column(heading, justify="left" if is_text else "right", no_wrap=True)
    for name, *cells in shown:
        table.add_row(Text("\n").join(map(plain, fold_name(name, room))), *cells)
    return table


def fold_name(name: str, width: int) -> list[str]:
    """The lines of a name, broken after dots; a part between dots is never broken.

    Examples:
        >>> fold_name("encoder.layer.0.output.dense.weight", 20)
        ['encoder.layer.0.', 'output.dense.weight']
    """
    *parts, last = name.split(".")
    lines = [""]
    for part in [*(f"{part}." for part in parts), last]:
        if lines[-1] and len(lines[-1] + part) > width:
            lines.append("")
        lines[-1] += part
    return lines


def shape_of(values: Any) -> str:
    """'384x384', or 'scalar'."""
    return "x".join(map(str, values.shape)) or "scalar"


def dtype_of(values: Any) -> str:
    """'float32'."""
    return str(values.dtype).removeprefix("torch.")


def in_words(value: object) -> str:
    """A value of a delta's note without brackets and quotes.

    Examples:
        >>> in_words({"text": "review", "label": "stars"}), in_words(["a", "b"]), in_words(0.5)
        ('text: review, label: stars', 'a, b', '0.5')
    """
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {in_words(part)}" for key, part in value.items())
    if isinstance(value, list):
        return ", ".join(map(in_words, value))
    words = {None: "none", True: "yes", False: "no"}
    return words[value] if value is None or isinstance(value, bool) else str(value)

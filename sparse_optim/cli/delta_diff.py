"""The tables of `diff`: which entries two deltas share, and how their changes agree."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

from sparse_optim.cli.console import plain
from sparse_optim.cli.delta_facts import common_facts
from sparse_optim.cli.delta_tables import NARROWEST, SHOWN, fact_table, fold_name

if TYPE_CHECKING:
    from sparse_optim.delta import Comparison

HEADINGS = ("in A", "in B", "in\nboth", "by\nchance", "Jac-\ncard")
MEASURED = ("same\nsign", "cosine", "cosine\nin both")  # where the base's values are known


def diff_summary(facts: Mapping[str, Any]) -> Table:
    """What `overlap_facts` gives, in all parameters."""
    total, table = facts["total"], fact_table("A and B")
    table.add_row("entries in A", f"{total['entries_a']:,} ({total['share_a']:.2%} in both)")
    table.add_row("entries in B", f"{total['entries_b']:,} ({total['share_b']:.2%} in both)")
    table.add_row("entries in both", f"{total['both']:,}")
    table.add_row("in both by chance", _chance(total))
    table.add_row("Jaccard", f"{total['jaccard']:.4f}")
    if total["cosine"] is not None:
        table.add_row("same sign, in both", _same_sign(total))
        table.add_row("cosine", f"{total['cosine']:.4f}")
        table.add_row("cosine, in both", f"{total['cosine_both']:.4f}")
    table.add_row("in both, equal bits", f"{facts['equal']:,}")
    table.add_row("largest |a - b|", f"{facts['max_difference']:.6g}")
    table.add_row("mean |a - b|", f"{facts['mean_difference']:.6g}")
    table.add_row("dense in both", f"{facts['dense_in_both']:,}")
    table.add_row("same base", "yes" if facts["same_base"] else "no, where they overlap")
    return table


def diff_table(found: Comparison, every: bool, width: int) -> Table:
    """A row for each module or parameter, those with the most entries in both first.

    Args:
        every: show all rows, not the first ten.
        width: columns of the terminal.
    """
    from sparse_optim.analysis.change_map import short_names

    ordered = sorted(found.parameters.items(), key=lambda item: -item[1].both)
    shown = ordered[: None if every else SHOWN]
    more = f"{len(ordered) - len(shown):,} more: --all" if len(shown) < len(ordered) else None
    cells = [_cells(common_facts(part)) for _, part in shown]
    headings = [*HEADINGS, *MEASURED][: len(cells[0])]
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, caption=more,
                  caption_justify="left")  # fmt: skip
    table.add_column("parameter" if every else "module", vertical="bottom", overflow="fold")
    taken = 0
    for at, heading in enumerate(headings):
        table.add_column(heading, justify="right", vertical="bottom", no_wrap=True)
        taken += 1 + max(len(part) for part in (*heading.split("\n"), *(row[at] for row in cells)))
    room = max(NARROWEST, width - taken)
    names = {name: name for name, _ in shown}
    if not every and max(map(len, names)) > room:
        names = short_names(found.parameters)
    for (name, _), row in zip(shown, cells, strict=True):
        table.add_row(Text("\n").join(map(plain, fold_name(names[name], room))), *row)
    return table


def _cells(facts: Mapping[str, Any]) -> list[str]:
    cells = [f"{facts[key]:,}" for key in ("entries_a", "entries_b", "both")]
    cells += [_number(facts["expected"]), f"{facts['jaccard']:.3f}"]
    if facts["cosine"] is not None:
        cells += [_same_sign(facts), f"{facts['cosine']:.3f}", f"{facts['cosine_both']:.3f}"]
    return cells


def _chance(total: Mapping[str, Any]) -> str:
    """The expected number, and how many times as many there are."""
    number = _number(total["expected"])
    if not total["both"] or not total["expected"]:
        return number
    return f"{number} (found: {total['both'] / total['expected']:,.3g} times that)"


def _number(expected: float) -> str:
    return f"{expected:,.0f}" if expected >= 100 or not expected else f"{expected:.2g}"


def _same_sign(facts: Mapping[str, Any]) -> str:
    """The share of the entries in both that do not move in opposite directions."""
    return f"{1 - facts['opposite'] / facts['both']:.1%}" if facts["both"] else "-"

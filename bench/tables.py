"""Format Markdown tables and short numbers."""

from __future__ import annotations

from collections.abc import Sequence


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Format a Markdown table; align the first column left, the others right."""
    lines = [header, [":--"] + ["--:"] * (len(header) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def count(number: int) -> str:
    """Shorten a number: 320000 -> 320K, 3500000 -> 3.5M."""
    for size, suffix in ((1_000_000, "M"), (1000, "K")):
        if number >= 10 * size or (number >= size and number % (size // 10) == 0):
            return f"{number / size:.4g}{suffix}"
    return str(number)

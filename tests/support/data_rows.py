"""Rows of a data set as files."""

from __future__ import annotations

import json
from pathlib import Path


def write_jsonl(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def rows_of(columns: dict, count: int = 4) -> list[dict]:
    """The same row several times; of a tuple, its two values in turn."""
    return [
        {
            name: value[row % 2] if isinstance(value, tuple) else value
            for name, value in columns.items()
        }
        for row in range(count)
    ]

"""Check that the texts and labels of a data set are what the task can use."""

from __future__ import annotations

import ast
import math
from collections.abc import Callable
from typing import Any

from datasets import Dataset

from sparse_optim.finetune.columns import Columns
from sparse_optim.finetune.errors import FinetuneError
from sparse_optim.finetune.messages import is_conversation


def check_values(split: Dataset, name: str, columns: Columns, task: str) -> None:
    """Raise FinetuneError if a text or a label is missing or of a kind that the task cannot use."""
    for column, source in vars(columns).items():
        if source is None:
            continue
        values, where = split[column][:], f"split {name!r}: column {source!r}"
        empty = [row for row, value in enumerate(values) if is_missing(value)]
        if empty and not is_context(task, column):
            raise FinetuneError(
                f"{where} has no value in {len(empty)} of {len(split)} rows (first: row "
                f"{empty[0]}); drop them"
            )
        wanted, fits = wanted_kind(task, column, columns)
        wrong = [row for row, value in enumerate(values) if not (is_missing(value) or fits(value))]
        if wrong:
            raise FinetuneError(
                f"{where} holds {short(values[wrong[0]])} in row {wrong[0]}, expected {wanted}: "
                "name another column or another --task"
            )
        written = column == "label" and task in ("causal-lm", "summarization")
        if not written and all(map(spells_list, values)):
            raise FinetuneError(
                f"{where} holds lists that are written as text, such as {short(values[0])}: save "
                "the data as JSON lines or parquet, with real lists"
            )
    if task == "token-classification" and columns.label is not None:
        lengths = zip(split["text"], split["label"], strict=True)
        uneven = [row for row, (words, tags) in enumerate(lengths) if len(words) != len(tags)]
        if uneven:
            raise FinetuneError(
                f"split {name!r}: {len(uneven)} of {len(split)} rows do not have one tag per word "
                f"(first: row {uneven[0]})"
            )


def describe_empty(split: Dataset, name: str, columns: Columns, task: str) -> list[str]:
    """A line for each column with texts that have no character but white space."""
    lines = []
    for column, source in vars(columns).items():
        if source is None or is_context(task, column):
            continue
        empty = sum(isinstance(value, str) and not value.strip() for value in split[column])
        if empty:
            lines.append(
                f"split {name!r}: column {source!r} is empty in {empty} of {len(split)} rows; they "
                "are kept"
            )
    return lines


def wanted_kind(task: str, column: str, columns: Columns) -> tuple[str, Callable[[Any], bool]]:
    """What a task needs in a canonical column: in words, and as a test of one value."""
    if task == "token-classification":
        if column == "label":
            return "a list of tags", is_list
        return (
            "a list of words",
            lambda value: is_list(value) and all(isinstance(word, str) for word in value),
        )
    if column == "label" and task == "causal-lm":
        return "text", lambda value: isinstance(value, (str, int)) and not isinstance(value, bool)
    if column == "label" and task == "summarization":
        return "text", is_text
    if column == "label" and task == "multi-label-classification":
        return "a list of labels", is_list
    if column == "label":
        return "one label an example (of several: multi-label-classification)", is_single
    text = "text (in JSON, numbers in quotes are text)"
    if task == "causal-lm" and columns.label is None:
        return (
            f"{text} or a list of messages",
            lambda value: is_text(value) or is_conversation(value),
        )
    return text, is_text


def is_context(task: str, column: str) -> bool:
    """Whether a column has what instructions refer to: not every instruction has that."""
    return task == "causal-lm" and column == "text_pair"


def is_text(value: Any) -> bool:
    """Whether a value is text."""
    return isinstance(value, str)


def is_list(value: Any) -> bool:
    """Whether a value is a list."""
    return isinstance(value, (list, tuple))


def is_single(value: Any) -> bool:
    """Whether a value is neither a list nor a mapping."""
    return not isinstance(value, (list, tuple, dict))


def is_missing(value: Any) -> bool:
    """Whether a value is None, or the NaN that a CSV reader returns for an empty cell."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def spells_list(value: Any) -> bool:
    """Whether a value is text such as "['a', 'b']": what pandas writes to a CSV file for a list."""
    if not (isinstance(value, str) and value.startswith("[") and value.endswith("]")):
        return False
    try:
        return isinstance(ast.literal_eval(value), list)
    except (SyntaxError, ValueError):
        return False


def short(value: Any) -> str:
    """A value for a message, cut to 80 characters."""
    shown = repr(value)
    return shown if len(shown) <= 80 else f"{shown[:77]}..."

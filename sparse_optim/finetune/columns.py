"""Find the text and the label among the columns of a data set."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from sparse_optim.finetune.errors import FinetuneError

TEXT_PAIRS = (
    ("sentence1", "sentence2"),
    ("question1", "question2"),
    ("premise", "hypothesis"),
    ("question", "sentence"),
    ("question", "passage"),
    ("text1", "text2"),
    ("text_a", "text_b"),
)
TEXTS = ("text", "sentence", "content", "review", "tweet", "question", "comment", "document")
LABELS = ("label", "labels", "target", "class", "score", "sentiment", "rating", "stars", "category")
TOKENS = ("tokens", "words")
TAGS = ("ner_tags", "tags", "ner", "labels", "label", "pos_tags")
PROMPTS = (
    ("prompt", "response"),
    ("prompt", "completion"),
    ("instruction", "output"),
    ("instruction", "response"),
    ("question", "answer"),
    ("input", "output"),
)

TaskName = Literal["sequence-classification", "regression", "token-classification", "causal-lm"]
TASK_NAMES: tuple[str, ...] = get_args(TaskName)


@dataclass(frozen=True)
class Columns:
    """Column names of a data set, chosen by the user or guessed; None: the task has no such column.

    `text` has lists of words for token classification. For a causal LM with responses, `text` has
    the prompts and `label` the responses.
    """

    text: str | None = None
    text_pair: str | None = None
    label: str | None = None


def guess_task(found: Sequence[str], label_kind: str | None, chosen: Columns) -> str:
    """Guess the task from the columns.

    Args:
        found: column names of the data set.
        label_kind: "list", "float" or "class"; None: there is no label column.
        chosen: columns that the user named.
    """
    if label_kind == "list":
        return "token-classification"
    if label_kind is not None and not (chosen.label is None and first_pair(PROMPTS, found)):
        return "regression" if label_kind == "float" else "sequence-classification"
    return "causal-lm"


def guess_label(found: Sequence[str], chosen: Columns) -> str | None:
    """The label column, before the task is known."""
    if chosen.label is not None:
        return chosen.label
    names = TAGS if first(TOKENS, found) else LABELS
    return first(names, found)


def resolve_columns(found: Sequence[str], task: str, chosen: Columns) -> Columns:
    """Guess the columns that the user did not name.

    Raises:
        FinetuneError: a named column is missing, or none can be guessed; lists the columns.
    """
    for option, name in (
        ("--text-column", chosen.text),
        ("--text-pair-column", chosen.text_pair),
        ("--label-column", chosen.label),
    ):
        if name is not None and name not in found:
            raise FinetuneError(f"{option}: no column {name!r}; the data set has {listed(found)}")
    columns = guess_columns(found, task, chosen)
    used = [name for name in (columns.text, columns.text_pair, columns.label) if name is not None]
    if len(set(used)) < len(used):
        raise FinetuneError(
            f"column {max(used, key=used.count)!r} cannot have two uses: --text-column is "
            f"{columns.text!r}, --text-pair-column {columns.text_pair!r}, --label-column "
            f"{columns.label!r}; the data set has {listed(found)}"
        )
    return columns


def guess_columns(found: Sequence[str], task: str, chosen: Columns) -> Columns:
    """The columns that the user named, and guesses for the rest."""
    if task == "causal-lm":
        return resolve_causal(found, chosen)
    if task == "token-classification":
        text = chosen.text or first(TOKENS, found)
        label = chosen.label or first(TAGS, found)
        return required(found, Columns(text, None, label), "words", "tags")
    pair = (None, None) if chosen.text else first_pair(TEXT_PAIRS, found) or (None, None)
    text = chosen.text or pair[0] or first(TEXTS, found)
    label = chosen.label or first(LABELS, found)
    return required(found, Columns(text, chosen.text_pair or pair[1], label), "text", "labels")


def resolve_causal(found: Sequence[str], chosen: Columns) -> Columns:
    """Prompt and response, or one text column."""
    prompts = first_pair(PROMPTS, found)
    if chosen.text is None and chosen.label is None and prompts:
        return Columns(prompts[0], None, prompts[1])
    text = chosen.text or first(TEXTS, found)
    return required(found, Columns(text, None, chosen.label), "text", None)


def required(
    found: Sequence[str], columns: Columns, text_about: str, label_about: str | None
) -> Columns:
    """`columns`; a FinetuneError names the option to add if a column is missing."""
    if columns.text is None:
        raise FinetuneError(
            f"no column of {text_about} recognised; name it with --text-column; the data set has "
            + listed(found)
        )
    if columns.label is None and label_about is not None:
        raise FinetuneError(
            f"no column of {label_about} recognised; name it with --label-column; the data set has "
            + listed(found)
        )
    return columns


def first(names: Sequence[str], found: Sequence[str]) -> str | None:
    """The first of `names` that is in `found`."""
    return next((name for name in names if name in found), None)


def first_pair(
    pairs: Sequence[tuple[str, str]], found: Sequence[str]
) -> tuple[str, str] | tuple[None, None] | None:
    """The first pair with both names in `found`."""
    return next((pair for pair in pairs if pair[0] in found and pair[1] in found), None)


def listed(names: Sequence[str]) -> str:
    """'columns a, b', for messages."""
    return "columns " + ", ".join(names) if names else "no columns"

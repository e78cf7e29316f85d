"""Find the text and the label among the columns of a data set."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from sparse_optim.finetune.errors import FinetuneError
from sparse_optim.finetune.hub import did_you_mean

# Names as `spelling` returns them: "Review Text" is review_text.
TEXT_PAIRS = (
    ("sentence1", "sentence2"),
    ("sentence_1", "sentence_2"),
    ("sentence_a", "sentence_b"),
    ("question1", "question2"),
    ("premise", "hypothesis"),
    ("question", "sentence"),
    ("question", "passage"),
    ("query", "passage"),
    ("query", "document"),
    ("claim", "evidence"),
    ("text1", "text2"),
    ("text_1", "text_2"),
    ("text_a", "text_b"),
    ("text", "text_pair"),
)
TEXTS = (
    *("text", "texts", "sentence", "content", "review", "review_text", "tweet", "question"),
    *("comment", "comment_text", "document", "body", "message", "utterance", "query", "headline"),
)
LABELS = (
    *("label", "labels", "target", "class", "score", "sentiment", "rating", "stars", "category"),
    *("categories", "emotion", "emotions", "intent", "topic", "topics", "genres", "y"),
)
TOKENS = ("tokens", "words")
TAGS = ("ner_tags", "tags", "ner", "labels", "label", "pos_tags")
PROMPTS = (
    ("prompt", "response"),
    ("prompt", "completion"),
    ("instruction", "output"),
    ("instruction", "response"),
    ("question", "answer"),
    ("query", "response"),
    ("problem", "solution"),
    ("input", "output"),
)
SUMMARIES = (
    ("document", "summary"),
    ("article", "highlights"),
    ("text", "summary"),
    ("dialogue", "summary"),
    ("article", "summary"),
    ("article", "abstract"),
    ("report", "summary"),
)
PARALLEL = ("source", "target")  # texts of any task from sequence to sequence
MESSAGES = ("messages", "conversations", "conversation")
INSTRUCTION = "instruction"
CONTEXTS = ("input", "context")  # the second part of an instruction: Alpaca's name, Dolly's name

TaskName = Literal[
    "sequence-classification",
    "multi-label-classification",
    "regression",
    "token-classification",
    "causal-lm",
    "summarization",
]
TASK_NAMES: tuple[str, ...] = get_args(TaskName)


@dataclass(frozen=True)
class Columns:
    """Column names of a data set, chosen by the user or guessed; None: the task has no such column.

    `text` has lists of words for token classification. For summarization, `label` has the
    summaries. For a causal LM, `text` has plain texts or
    conversations if there is no `label`, else prompts with their responses in `label`; `text_pair`
    then has what an instruction refers to (Alpaca's `input`).
    """

    text: str | None = None
    text_pair: str | None = None
    label: str | None = None


def guess_task(
    found: Sequence[str], label_kind: str | None, chosen: Columns, *, words: bool
) -> str:
    """Guess the task from the columns.

    Args:
        found: column names of the data set.
        label_kind: "list", "float", "text" or "class"; None: there is no label column.
        chosen: columns that the user named.
        words: whether the text is lists of words.

    Raises:
        FinetuneError: the columns fit several tasks.
    """
    generates = first(MESSAGES, found) if chosen.text is None else None
    prompts = first_pair(fitting(PROMPTS, chosen), found)
    named = chosen.label is not None and label_kind == "text"
    others = generates or prompts or chosen.text_pair
    summaries = first_pair(fitting(SUMMARIES, chosen), found)
    if summaries and not others and (label_kind is None or named):
        return "summarization"
    if label_kind == "text" and first_pair(fitting([PARALLEL], chosen), found):
        raise FinetuneError(
            "the columns source and target fit several tasks: add --task summarization or another"
        )
    if label_kind is None or (chosen.label is None and (generates or prompts)):
        return "causal-lm"
    # Naming the responses changes no guess, unless they may be the classes of a pair of texts.
    is_pair = chosen.text_pair is not None or first_pair(TEXT_PAIRS, found) is not None
    if label_kind == "text" and prompts and not is_pair:
        return "causal-lm"
    if label_kind == "list":
        return "token-classification" if words else "multi-label-classification"
    return "regression" if label_kind == "float" else "sequence-classification"


def guess_label(found: Sequence[str], chosen: Columns) -> str | None:
    """The label column, before the task is known."""
    if chosen.label is not None:
        return match(chosen.label, found)
    names = TAGS if first(TOKENS, found) else LABELS
    return first(names, found)


def resolve_columns(found: Sequence[str], task: str, chosen: Columns) -> Columns:
    """Guess the columns that the user did not name; names match without regard to case.

    Raises:
        FinetuneError: a named column is missing, or none can be guessed; lists the columns.
    """
    named = {}
    for field, name in vars(chosen).items():
        named[field] = None if name is None else match(name, found)
        if name is not None and named[field] is None:
            raise FinetuneError(
                f"--{field.replace('_', '-')}-column: no column {name!r}"
                f"{did_you_mean(name, found)}; the data set has {listed(found)}"
            )
    columns = guess_columns(found, task, Columns(**named))
    used = [name for name in vars(columns).values() if name is not None]
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
        if chosen.text_pair is not None:
            raise FinetuneError("--text-pair-column is not for token-classification: drop it")
        text = chosen.text or first(TOKENS, found)
        label = chosen.label or first(TAGS, found)
        return required(found, Columns(text, None, label), "words", "tags")
    if task == "summarization":
        return resolve_summaries(found, chosen)
    label = chosen.label or first(LABELS, found)
    pair = first_pair(TEXT_PAIRS, found) if chosen.text is None else None
    text = chosen.text or (pair[0] if pair else first(TEXTS, found))
    text_pair = chosen.text_pair or (pair[1] if pair else None)
    return required(found, Columns(text, text_pair, label), "text", "labels")


def resolve_causal(found: Sequence[str], chosen: Columns) -> Columns:
    """A conversation, an instruction with its context, prompt and response, or one text column."""
    messages = first(MESSAGES, found)
    if chosen == Columns() and messages is not None:
        return Columns(messages)
    prompt, response = first_pair(fitting(PROMPTS, chosen), found) or (None, None)
    text, label = chosen.text or prompt, chosen.label or response
    if label is None:
        if chosen.text_pair is not None:
            raise FinetuneError(
                "--text-pair-column of causal-lm needs --label-column (the responses)"
            )
        return required(found, Columns(text or first(TEXTS, found)), "text", None)
    text = text or first([*(prompt for prompt, _ in PROMPTS), *TEXTS], found)
    context = chosen.text_pair or context_of(text, found, label)
    return required(found, Columns(text, context, label), "text", None)


def resolve_summaries(found: Sequence[str], chosen: Columns) -> Columns:
    """A column of texts and one of their summaries."""
    if chosen.text_pair is not None:
        raise FinetuneError("--text-pair-column is not for summarization: drop it")
    known = [*SUMMARIES, PARALLEL]
    text, summary = first_pair(fitting(known, chosen), found) or (None, None)
    label = chosen.label or summary or first([name for _, name in known], found)
    others = [name for name in found if name != label]
    text = chosen.text or text or first([*(name for name, _ in known), *TEXTS], others)
    return required(found, Columns(text, None, label), "text", "summaries")


def fitting(pairs: Sequence[tuple[str, str]], chosen: Columns) -> list[tuple[str, str]]:
    """The pairs of a text and its label that have the columns that the user named."""

    def fits(name: str, column: str | None) -> bool:
        return column is None or spelling(column) == name

    return [pair for pair in pairs if fits(pair[0], chosen.text) and fits(pair[1], chosen.label)]


def context_of(text: str | None, found: Sequence[str], label: str) -> str | None:
    """The column with what an instruction refers to; None: no instruction, or no such column."""
    others = [name for name in found if name not in (text, label)]
    return first(CONTEXTS, others) if spelling(text or "") == INSTRUCTION else None


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


def spelling(name: str) -> str:
    """A column name without regard to case, spaces and hyphens: "Review Text" is review_text."""
    return "_".join(name.lower().replace("-", " ").split())


def match(name: str, found: Sequence[str]) -> str | None:
    """The column of this name: as it is written, else the first that is spelled alike."""
    if name in found:
        return name
    return next((column for column in found if spelling(column) == spelling(name)), None)


def first(names: Sequence[str], found: Sequence[str]) -> str | None:
    """The column for the first of `names` that the data set has."""
    return next((column for name in names if (column := match(name, found)) is not None), None)


def first_pair(pairs: Sequence[tuple[str, str]], found: Sequence[str]) -> tuple[str, str] | None:
    """The columns for the first pair that the data set has."""
    for one, other in pairs:
        columns = match(one, found), match(other, found)
        if columns[0] is not None and columns[1] is not None:
            return columns[0], columns[1]
    return None


def listed(names: Sequence[str]) -> str:
    """'columns a, b', for messages."""
    return "columns " + ", ".join(names) if names else "no columns"

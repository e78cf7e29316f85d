"""Load a data set from anywhere into one form: train and evaluation splits of known columns."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from datasets import Dataset, DatasetDict, List, load_dataset
from datasets.exceptions import DatasetsError

from sparse_optim.finetune.builtin_data import DATASETS, load_builtin
from sparse_optim.finetune.columns import (
    INSTRUCTION,
    TASK_NAMES,
    TOKENS,
    Columns,
    first,
    guess_label,
    guess_task,
    match,
    resolve_columns,
    spelling,
)
from sparse_optim.finetune.data_files import load_file, load_folder
from sparse_optim.finetune.errors import FinetuneError
from sparse_optim.finetune.hub import hub_error, require_hub
from sparse_optim.finetune.labels import (
    class_names,
    describe_unseen,
    find_label_names,
    float_labels,
    index_labels,
    multi_hot,
)
from sparse_optim.finetune.messages import (
    as_turns,
    describe_keys,
    from_conversations,
    join_contexts,
)
from sparse_optim.finetune.splits import (
    DEFAULT_FRACTION,
    hold_out,
    pick_evaluation,
    pick_split,
    take_some,
)
from sparse_optim.finetune.values import check_values, describe_empty, is_list


@dataclass(frozen=True)
class DataRequest:
    """The data settings of a job; None: choose a default.

    Attributes:
        labels: the classes in order; None: as the data has them.
    """

    dataset: str
    config: str | None = None
    task: str | None = None
    columns: Columns = field(default_factory=Columns)
    train_split: str = "train"
    eval_split: str | None = None
    eval_fraction: float | None = None
    max_train_examples: int | None = None
    max_eval_examples: int | None = None
    chat: bool | None = None
    labels: tuple[str, ...] | None = None


@dataclass(frozen=True)
class TaskData:
    """Examples in canonical columns: `text`, `text_pair` and `label`, or some; or `messages`.

    `label` is a class index, a list with 1.0 or 0.0 for each class, a float, a list of class
    indices, the response of a prompt, or the summary of a text. `messages` are conversations: lists
    of messages with `role` and `content`. `label_names` are the classes in order, None without
    classes. `columns` are the names in the data set. `notes` are lines that the user should read.
    """

    name: str
    task: str
    train: Dataset
    evaluation: Dataset
    eval_split: str
    label_names: list[str] | None
    columns: Columns = field(default_factory=Columns)
    notes: tuple[str, ...] = ()


def load_data(request: DataRequest) -> TaskData:
    """Load, split and bring into canonical columns.

    Empty texts are kept, and noted; missing values are an error. A held-out part of train has every
    class that has two examples.

    Raises:
        FinetuneError: unknown data set, no network, wrong columns, empty splits, wrong labels.
    """
    if request.task is not None and request.task not in TASK_NAMES:
        raise FinetuneError(f"unknown task {request.task!r}; known: {', '.join(TASK_NAMES)}")
    splits = load_splits(request)
    train = pick_split(splits, request.train_split, "--train-split")
    eval_split = pick_evaluation(splits, request.eval_split, request.eval_fraction)
    if eval_split is None and len(train) < 2:
        raise FinetuneError(f"{request.dataset}: {len(train)} examples are too few to split")
    task = request.task or infer_task(train, request)
    if request.chat is not None and task != "causal-lm":
        raise FinetuneError(f"--chat and --no-chat are for causal-lm, and the task is {task}")
    columns = resolve_columns(train.column_names, task, request.columns)
    notes = describe_unused(train, columns)
    read = partial(canonical, task=task, columns=columns, chat=request.chat, notes=notes)
    train = read(train, request.train_split)
    if eval_split is not None:
        evaluation = read(splits[eval_split], eval_split)
    else:
        fraction = request.eval_fraction or DEFAULT_FRACTION
        eval_split = f"held-out {100 * fraction:.3g}% of train"
        classes = class_names(train) if task == "sequence-classification" else None
        train, evaluation = hold_out(train, fraction, classes)
    train = take_some(train, request.max_train_examples)
    evaluation = take_some(evaluation, request.max_eval_examples)
    names = None
    if task.endswith("classification"):
        names = list(request.labels or find_label_names(train, evaluation))
        train, evaluation = index_labels(train, names), index_labels(evaluation, names)
        notes += describe_unseen(train, evaluation, names)
    if names is not None and task == "multi-label-classification":
        train, evaluation = multi_hot(train, names), multi_hot(evaluation, names)
    return TaskData(
        *(request.dataset, task, train, evaluation, eval_split, names, columns, tuple(notes))
    )


def load_splits(request: DataRequest) -> DatasetDict:
    """Load all splits of a built-in set, a file, a folder or a hub set."""
    name = request.dataset
    if name in DATASETS:
        return DatasetDict({k: Dataset.from_dict(v) for k, v in load_builtin(name).items()})
    path = Path(name).expanduser()
    try:
        if path.is_file():
            return load_file(path)
        if path.is_dir():
            return load_folder(path)
        require_hub("data set", name, DATASETS)
        return load_dataset(name, request.config)
    except FinetuneError:
        raise
    # The libraries raise these for a missing set, a wrong config, a file that cannot be parsed.
    except (OSError, ValueError, RuntimeError, DatasetsError) as error:
        raise hub_error("data set", name, DATASETS, error) from error


def infer_task(train: Dataset, request: DataRequest) -> str:
    """The task of a built-in set, or a guess from the columns."""
    if request.dataset in DATASETS:
        return DATASETS[request.dataset].task
    found, chosen = train.column_names, request.columns
    label = guess_label(found, chosen)
    kind = label_kind(train, label) if label is not None else None
    text = match(chosen.text, found) if chosen.text is not None else None
    words = first(TOKENS, found) is not None if text is None else label_kind(train, text) == "list"
    return guess_task(found, kind, chosen, words=words)


def label_kind(split: Dataset, column: str) -> str:
    """ "list", "float", "text" or "class"."""
    feature = split.features[column]
    if isinstance(feature, (List, list)):
        return "list"
    dtype = str(getattr(feature, "dtype", ""))
    if "string" in dtype:
        return "text"
    return "float" if dtype.startswith("float") else "class"


def canonical(
    split: Dataset, name: str, task: str, columns: Columns, chat: bool | None, notes: list[str]
) -> Dataset:
    """Check the columns of the task and give them canonical names and types; add to the notes."""
    wanted = {source: target for target, source in vars(columns).items() if source is not None}
    missing = [source for source in wanted if source not in split.column_names]
    if missing:
        raise FinetuneError(f"split {name!r} has no column {missing[0]!r}")
    if len(split) == 0:
        raise FinetuneError(f"split {name!r} has no examples")
    split = split.select_columns(list(wanted))
    split = split.rename_columns({old: new for old, new in wanted.items() if old != new})
    check_values(split, name, columns, task)
    notes += describe_empty(split, name, columns, task)
    if task == "regression":
        return float_labels(split, columns.label)
    return converse(split, name, columns, chat, notes) if task == "causal-lm" else split


def converse(
    split: Dataset, name: str, columns: Columns, chat: bool | None, notes: list[str]
) -> Dataset:
    """Conversations, and instructions or with `chat` prompts, as messages; the rest as it is."""
    if columns.label is not None:
        instructs = columns.text_pair is not None or spelling(columns.text or "") == INSTRUCTION
        joined = join_contexts(split)
        return as_turns(joined) if (instructs if chat is None else chat) else joined
    conversations = is_list(split[0]["text"])
    if chat is not None and chat != conversations:
        raise FinetuneError(
            "--no-chat is for prompts with responses, not for conversations: drop it"
            if conversations
            else "--chat needs prompts and responses: name the responses with --label-column"
        )
    if not conversations:
        return split
    where = f"split {name!r}: column {columns.text!r}"
    notes += describe_keys(split, where)
    return from_conversations(split, where)


def describe_unused(split: Dataset, columns: Columns) -> list[str]:
    """A line on the columns that the task does not use, or none."""
    unused = [name for name in split.column_names if name not in vars(columns).values()]
    return [f"columns not used: {', '.join(map(repr, unused))}"] if unused else []

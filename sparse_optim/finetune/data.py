"""Load a data set from anywhere into one form: train and evaluation splits of known columns."""

from __future__ import annotations

import csv
import logging
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datasets import ClassLabel, Dataset, DatasetDict, List, load_dataset, load_from_disk
from datasets.exceptions import DatasetsError

from sparse_optim.finetune.builtin_data import DATASETS, load_builtin
from sparse_optim.finetune.columns import (
    TASK_NAMES,
    Columns,
    guess_label,
    guess_task,
    resolve_columns,
)
from sparse_optim.finetune.errors import FinetuneError
from sparse_optim.finetune.hub import DATA_SUFFIXES, hub_error, require_hub

logger = logging.getLogger(__name__)

EVALUATION_SPLITS = ("validation", "validation_matched", "dev", "valid", "eval", "test")
SPLIT_NAME = re.compile("(train|validation|test)(_[a-z]+)?")  # with MNLI's validation_matched
TSV_FIELD = r'("([^"]|"")*"|[^"\t][^\t]*|)'
TSV_LINE = re.compile(f"{TSV_FIELD}(\t{TSV_FIELD})*")
UNLABELLED = (
    "some examples have label -1 (unlabelled): choose other splits with --train-split and "
    "--eval-split, or hold out a part of train with --eval-fraction"
)
HOLD_OUT_SEED = 0  # selects the held-out part of train; does not depend on the seed of the run


@dataclass(frozen=True)
class DataRequest:
    """The data settings of a job; None: choose a default."""

    dataset: str
    config: str | None = None
    task: str | None = None
    columns: Columns = field(default_factory=Columns)
    train_split: str = "train"
    eval_split: str | None = None
    eval_fraction: float | None = None
    max_train_examples: int | None = None
    max_eval_examples: int | None = None


@dataclass(frozen=True)
class TaskData:
    """Examples in canonical columns: `text`, `text_pair` and `label`, or some of them.

    `label` is a class index, a float, a list of class indices, or the response of a prompt;
    `label_names` are the classes in order, None without classes; `columns` are the names in the
    data set.
    """

    name: str
    task: str
    train: Dataset
    evaluation: Dataset
    eval_split: str
    label_names: list[str] | None
    columns: Columns


def load_data(request: DataRequest) -> TaskData:
    """Load, split and bring into canonical columns.

    Raises:
        FinetuneError: unknown data set, no network, wrong columns, empty splits, wrong labels.
    """
    if request.task is not None and request.task not in TASK_NAMES:
        raise FinetuneError(f"unknown task {request.task!r}; known: {', '.join(TASK_NAMES)}")
    train, evaluation, eval_split = choose_splits(load_splits(request), request)
    chosen = request.columns
    task = request.task or infer_task(train, request)
    columns = resolve_columns(train.column_names, task, chosen)
    train, evaluation = (canonical(split, columns) for split in (train, evaluation))
    for split, name in ((train, request.train_split), (evaluation, eval_split)):
        check_values(split, name, columns, task)
    label_names = None
    if task in ("sequence-classification", "token-classification"):
        label_names = find_label_names(train, evaluation)
        train, evaluation = (index_labels(s, label_names) for s in (train, evaluation))
    elif task == "regression":
        train, evaluation = (float_labels(s, columns.label) for s in (train, evaluation))
    return TaskData(request.dataset, task, train, evaluation, eval_split, label_names, columns)


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


def load_file(path: Path) -> DatasetDict:
    """Load one CSV, TSV, JSON, JSON lines or parquet file as a train split."""
    if path.suffix not in DATA_SUFFIXES:
        known = ", ".join(sorted(DATA_SUFFIXES))
        raise FinetuneError(
            f"{path}: cannot read files with suffix {path.suffix!r}; known: {known}"
        )
    if path.stat().st_size == 0:
        raise FinetuneError(f"{path} is empty")
    return read_files({"train": str(path)}, path.suffix)


def read_files(files: dict[str, str], suffix: str) -> DatasetDict:
    """Load files of one kind, by split."""
    if suffix == ".parquet":
        return load_dataset("parquet", data_files=files)
    if suffix in (".json", ".jsonl"):
        return load_dataset("json", data_files=files)
    literal = suffix == ".tsv" and not all(map(quotes_are_syntax, files.values()))
    return load_dataset(
        "csv",
        data_files=files,
        sep="\t" if suffix == ".tsv" else ",",
        quoting=csv.QUOTE_NONE if literal else csv.QUOTE_MINIMAL,
        keep_default_na=False,  # "None", "NA" and "null" are words; an empty field has no value
        na_values=[""],
    )


def quotes_are_syntax(path: str) -> bool:
    """Whether each field of a TSV file that begins with a quote is a whole quoted field.

    If not, quotes are text: many TSV files (those of GLUE) are written without quoting, and a
    lone quote would swallow the lines up to the next one.
    """
    with open(path, encoding="utf-8", errors="replace", newline="\n") as file:
        return all(TSV_LINE.fullmatch(line.rstrip("\r\n")) for line in file)


def load_folder(path: Path) -> DatasetDict:
    """Load a folder written by `save_to_disk`, or data files named after their splits."""
    if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
        loaded = load_from_disk(str(path))
        return loaded if isinstance(loaded, DatasetDict) else DatasetDict({"train": loaded})
    if not any(file.suffix in DATA_SUFFIXES for file in path.rglob("*")):
        known = ", ".join(sorted(DATA_SUFFIXES))
        raise FinetuneError(f"{path} has no data file ({known})")
    # `load_dataset` would take validation_matched and validation_mismatched for one split.
    files = [file for file in sorted(path.iterdir()) if file.suffix in DATA_SUFFIXES]
    stems = {file.stem for file in files}
    if len(stems) < len(files) or not all(SPLIT_NAME.fullmatch(stem) for stem in stems):
        return load_dataset(str(path))
    splits: dict[str, Dataset] = {}
    for suffix in sorted({file.suffix for file in files}):
        alike = {file.stem: str(file) for file in files if file.suffix == suffix}
        splits |= read_files(alike, suffix)
    return DatasetDict(splits)


def choose_splits(splits: DatasetDict, request: DataRequest) -> tuple[Dataset, Dataset, str]:
    """Train examples, evaluation examples, and the name of the evaluation split.

    With `eval_fraction`, or if the set has no evaluation split, a part of train is held out: always
    the same part.
    """
    names = list(splits)
    train = pick_split(splits, request.train_split, "--train-split")
    eval_split = request.eval_split
    if eval_split is None and request.eval_fraction is None:
        eval_split = next((name for name in EVALUATION_SPLITS if name in names), None)
    if eval_split is not None and request.eval_fraction is not None:
        raise FinetuneError("--eval-split and --eval-fraction exclude each other: drop one of them")
    if eval_split is not None:
        evaluation = pick_split(splits, eval_split, "--eval-split")
    else:
        fraction = 0.1 if request.eval_fraction is None else request.eval_fraction
        if not 0 < fraction < 1:
            raise FinetuneError(f"--eval-fraction must be between 0 and 1, got {fraction}")
        if len(train) < 2:
            raise FinetuneError(f"{request.dataset}: {len(train)} examples are too few to split")
        eval_size = min(len(train) - 1, max(1, round(len(train) * fraction)))
        parts = train.train_test_split(test_size=eval_size, seed=HOLD_OUT_SEED)
        train, evaluation, eval_split = parts["train"], parts["test"], f"{fraction:.3g} of train"
    for split, name in ((train, request.train_split), (evaluation, eval_split)):
        if len(split) == 0:
            raise FinetuneError(f"{request.dataset}: split {name!r} has no examples")
    train = take_some(train, request.max_train_examples)
    return train, take_some(evaluation, request.max_eval_examples), eval_split


def pick_split(splits: DatasetDict, name: str, option: str) -> Dataset:
    """A split by name; a FinetuneError lists the splits that exist."""
    if name not in splits:
        raise FinetuneError(f"{option}: no split {name!r}; the data set has {', '.join(splits)}")
    return splits[name]


def take_some(split: Dataset, count: int | None) -> Dataset:
    """A fixed random sample of at most `count` examples."""
    if count is None or count >= len(split):
        return split
    if count < 1:
        raise FinetuneError(f"the number of examples must be at least 1, got {count}")
    return split.shuffle(seed=HOLD_OUT_SEED).select(range(count))


def infer_task(train: Dataset, request: DataRequest) -> str:
    """The task of a built-in set, or a guess from the columns."""
    if request.dataset in DATASETS:
        return DATASETS[request.dataset].task
    found = train.column_names
    label = guess_label(found, request.columns)
    kind = label_kind(train, label) if label is not None and label in found else None
    return guess_task(found, kind, request.columns)


def label_kind(split: Dataset, column: str) -> str:
    """ "list", "float" or "class"."""
    feature = split.features[column]
    if isinstance(feature, (List, list)):
        return "list"
    return "float" if str(getattr(feature, "dtype", "")).startswith("float") else "class"


def canonical(split: Dataset, columns: Columns) -> Dataset:
    """Keep the columns of the task, and give them canonical names."""
    names = {"text": columns.text, "text_pair": columns.text_pair, "label": columns.label}
    wanted = {source: target for target, source in names.items() if source is not None}
    missing = [name for name in wanted if name not in split.column_names]
    if missing:
        raise FinetuneError(f"the evaluation split has no column {missing[0]!r}")
    split = split.select_columns(list(wanted))
    return split.rename_columns({old: new for old, new in wanted.items() if old != new})


def check_values(split: Dataset, name: str, columns: Columns, task: str) -> None:
    """Raise FinetuneError if a text or a label is missing or of a kind that the task cannot use."""
    for column in ("text", "text_pair", "label"):
        source = getattr(columns, column)
        if source is None:
            continue
        where = f"split {name!r}: column {source!r}"
        empty = [row for row, value in enumerate(split[column]) if is_missing(value)]
        if empty:
            raise FinetuneError(
                f"{where} has no value in {len(empty)} of {len(split)} rows (first: row "
                f"{empty[0]}); drop them"
            )
        wanted, fits = wanted_kind(task, column)
        wrong = [row for row, value in enumerate(split[column]) if not fits(value)]
        if wrong:
            raise FinetuneError(
                f"{where} holds {split[column][wrong[0]]!r} in row {wrong[0]}, expected {wanted}: "
                "name another column or another --task"
            )
    if task == "token-classification":
        lengths = zip(split["text"], split["label"], strict=True)
        uneven = [row for row, (words, tags) in enumerate(lengths) if len(words) != len(tags)]
        if uneven:
            raise FinetuneError(
                f"split {name!r}: {len(uneven)} of {len(split)} rows do not have one tag per word "
                f"(first: row {uneven[0]})"
            )


def wanted_kind(task: str, column: str) -> tuple[str, Callable[[Any], bool]]:
    """What a task needs in a canonical column: in words, and as a test of one value."""
    if task == "token-classification":
        if column == "label":
            return "a list of tags", is_list
        return (
            "a list of words",
            lambda value: is_list(value) and all(isinstance(word, str) for word in value),
        )
    if task == "causal-lm":
        return "text", lambda value: not is_list(value)
    if column == "label":
        return "one label an example", lambda value: not is_list(value)
    return "text (in JSON, numbers in quotes are text)", lambda value: isinstance(value, str)


def is_list(value: Any) -> bool:
    """Whether a value is a list."""
    return isinstance(value, (list, tuple))


def is_missing(value: Any) -> bool:
    """Whether a value is None, or the NaN that a CSV reader returns for an empty cell."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def find_label_names(train: Dataset, evaluation: Dataset) -> list[str]:
    """The classes in order: as the data set declares them, or the sorted values of both splits.

    Raises:
        FinetuneError: fewer than two classes, or examples without a label (-1).
    """
    feature = train.features["label"]
    inner = feature.feature if isinstance(feature, List) else feature
    if isinstance(inner, ClassLabel):
        if any(-1 in flat(split["label"]) for split in (train, evaluation)):
            raise FinetuneError(UNLABELLED)
        return list(inner.names)
    labels, others = ({*flat(split["label"])} for split in (train, evaluation))
    values = labels | others
    if any(isinstance(value, float) and not value.is_integer() for value in values):
        raise FinetuneError(
            "labels are fractions: use --task regression, or name another --label-column"
        )
    # In one split alone, -1 marks what has no label. In both it is a class, as in {-1, 1}.
    if any(label_name(value) == "-1" for value in labels ^ others):
        raise FinetuneError(UNLABELLED)
    if len(values) < 2:
        raise FinetuneError(f"classification needs at least two classes, found {sorted(values)}")
    return [label_name(value) for value in sorted(values)]


def flat(labels: Sequence[Any]) -> list[Any]:
    """Labels of all words, or of all examples."""
    nested = len(labels) > 0 and isinstance(labels[0], (list, tuple))
    return [tag for tags in labels for tag in tags] if nested else list(labels)


def label_name(value: Any) -> str:
    """'3' for 3 and for 3.0: CSV readers turn integer columns into floats."""
    return str(int(value)) if isinstance(value, float) else str(value)


def index_labels(split: Dataset, names: list[str]) -> Dataset:
    """Replace class names by indices; a declared ClassLabel has indices already."""
    feature = split.features["label"]
    if isinstance(feature.feature if isinstance(feature, List) else feature, ClassLabel):
        return split
    index = {name: position for position, name in enumerate(names)}

    def indexed(label: Any) -> Any:
        if isinstance(label, (list, tuple)):
            return [index[label_name(tag)] for tag in label]
        return index[label_name(label)]

    return replace_labels(split, [indexed(label) for label in split["label"]])


def float_labels(split: Dataset, source: str | None) -> Dataset:
    """Convert labels to floats, for regression."""
    try:
        labels = [float(label) for label in split["label"]]
    except (TypeError, ValueError) as error:
        raise FinetuneError(
            f"--task regression needs numbers in column {source!r}: {error}"
        ) from None
    return replace_labels(split, labels)


def replace_labels(split: Dataset, labels: list[Any]) -> Dataset:
    """The same examples with other labels."""
    return split.remove_columns("label").add_column("label", labels)

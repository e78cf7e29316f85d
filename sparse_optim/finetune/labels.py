"""Turn the labels of a data set into class indices, sets of classes, or numbers."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

from datasets import ClassLabel, Dataset, List

from sparse_optim.finetune.errors import FinetuneError

UNLABELLED = (
    "some examples have label -1 (unlabelled): choose other splits with --train-split and "
    "--eval-split, or hold out a part of train with --eval-fraction"
)


def find_label_names(train: Dataset, evaluation: Dataset) -> list[str]:
    """The classes in order: as the data set declares them, or the sorted values of both splits.

    Names that are whole numbers are sorted as numbers. 3, 3.0 and "3" are one class.

    Raises:
        FinetuneError: fewer than two classes, or examples without a label (-1).
    """
    declared = declared_names(train)
    labels, others = ({*flat(split["label"])} for split in (train, evaluation))
    if declared is not None:
        if -1 in labels | others:
            raise FinetuneError(UNLABELLED)
        return declared
    values = labels | others
    if any(isinstance(value, float) and not value.is_integer() for value in values):
        raise FinetuneError(
            "labels are fractions: use --task regression, or name another --label-column"
        )
    trained, evaluated = ({*map(label_name, side)} for side in (labels, others))
    # In one split alone, -1 marks what has no label. In both it is a class, as in {-1, 1}.
    if "-1" in trained ^ evaluated:
        raise FinetuneError(UNLABELLED)
    names = trained | evaluated
    if len(names) < 2:
        raise FinetuneError(f"classification needs at least two classes, found {sorted(names)}")
    if all(re.fullmatch("-?[0-9]+", name) for name in names):
        return sorted(names, key=lambda name: (int(name), name))
    return sorted(names)


def describe_unseen(train: Dataset, evaluation: Dataset, names: list[str]) -> list[str]:
    """A line on the classes of the evaluation examples that no training example has, or none.

    Args:
        train, evaluation: with class indices as labels.
    """
    seen = {*flat(train["label"])}
    unseen = Counter(names[label] for label in flat(evaluation["label"]) if label not in seen)
    if not unseen:
        return []
    shown = ", ".join(f"{name!r} ({count})" for name, count in unseen.most_common(5))
    more = f" and {len(unseen) - 5} more" if len(unseen) > 5 else ""
    return [
        f"classes that the evaluation examples have and no training example has: {shown}{more}; "
        "the model cannot learn them"
    ]


def index_labels(split: Dataset, names: list[str]) -> Dataset:
    """Replace class names, or lists of them, by indices into `names`.

    Raises:
        FinetuneError: a class is not among them.
    """
    declared = declared_names(split)
    if declared is not None and any(label < 0 for label in flat(split["label"])):
        raise FinetuneError(UNLABELLED)
    if declared == names:
        return split
    index = {name: number for number, name in enumerate(names)}

    def position(label: Any) -> int:
        name = label_name(label) if declared is None else declared[label]
        if name not in index:
            raise FinetuneError(f"the model has no class {name!r}; it has {', '.join(names)}")
        return index[name]

    def indexed(label: Any) -> Any:
        return [*map(position, label)] if isinstance(label, (list, tuple)) else position(label)

    return replace_labels(split, [indexed(label) for label in split["label"]])


def multi_hot(split: Dataset, names: list[str]) -> Dataset:
    """Replace lists of class indices by a list with 1.0 or 0.0 for each class."""
    rows = [{*label} for label in split["label"]]
    hot = [[float(index in row) for index in range(len(names))] for row in rows]
    return replace_labels(split, hot)


def float_labels(split: Dataset, source: str | None) -> Dataset:
    """Convert labels to floats, for regression."""
    try:
        labels = [float(label) for label in split["label"]]
    except (TypeError, ValueError) as error:
        raise FinetuneError(
            f"--task regression needs numbers in column {source!r}: {error}"
        ) from None
    odd = [row for row, label in enumerate(labels) if not math.isfinite(label)]
    if odd:
        raise FinetuneError(
            f"--task regression needs finite numbers in column {source!r}: row {odd[0]} has "
            f"{labels[odd[0]]}"
        )
    return replace_labels(split, labels)


def class_names(split: Dataset) -> list[str]:
    """The class of each example by name (of declared classes, by index)."""
    return [label_name(label) for label in split["label"]]


def declared_names(split: Dataset) -> list[str] | None:
    """The classes that the data set declares."""
    feature = split.features["label"]
    inner = feature.feature if isinstance(feature, List) else feature
    return list(inner.names) if isinstance(inner, ClassLabel) else None


def flat(labels: Sequence[Any]) -> list[Any]:
    """Labels of all words, or of all examples."""
    nested = len(labels) > 0 and isinstance(labels[0], (list, tuple))
    return [tag for tags in labels for tag in tags] if nested else list(labels)


def label_name(value: Any) -> str:
    """'3' for 3 and for 3.0: CSV readers turn integer columns into floats."""
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def replace_labels(split: Dataset, labels: list[Any]) -> Dataset:
    """The same examples with other labels."""
    return split.remove_columns("label").add_column("label", labels)

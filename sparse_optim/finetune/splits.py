"""Choose the examples to train on and to evaluate on."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np
from datasets import Dataset, DatasetDict

from sparse_optim.finetune.errors import FinetuneError

EVALUATION_SPLITS = ("validation", "validation_matched", "dev", "valid", "eval", "test")
HOLD_OUT_SEED = 0  # selects the held-out part of train; does not depend on the seed of the run
DEFAULT_FRACTION = 0.1


def pick_split(splits: DatasetDict, name: str, option: str) -> Dataset:
    """A split by name; a FinetuneError lists the splits that exist."""
    if name not in splits:
        raise FinetuneError(f"{option}: no split {name!r}; the data set has {', '.join(splits)}")
    return splits[name]


def pick_evaluation(
    splits: DatasetDict, eval_split: str | None, eval_fraction: float | None
) -> str | None:
    """The name of the split to evaluate on; None: hold out a part of train."""
    if eval_split is not None and eval_fraction is not None:
        raise FinetuneError("--eval-split and --eval-fraction exclude each other: drop one of them")
    if eval_split is not None:
        pick_split(splits, eval_split, "--eval-split")
        return eval_split
    if eval_fraction is not None:
        if not 0 < eval_fraction < 1:
            raise FinetuneError(f"--eval-fraction must be between 0 and 1, got {eval_fraction}")
        return None
    return next((name for name in EVALUATION_SPLITS if name in splits), None)


def hold_out(
    train: Dataset, fraction: float, classes: Sequence[str] | None
) -> tuple[Dataset, Dataset]:
    """Split off a part of train: always the same part.

    Args:
        classes: the class of each example: every class of two examples or more is then in both
            parts, even if that takes more than the fraction; None: split without regard to them.
    """
    size = min(len(train) - 1, max(1, round(len(train) * fraction)))
    counts = Counter(classes or ())
    if not counts or max(counts.values()) == 1:
        parts = train.train_test_split(test_size=size, seed=HOLD_OUT_SEED)
        return parts["train"], parts["test"]
    left = share_out(counts, fraction, size)
    kept: list[int] = []
    held: list[int] = []
    for row in np.random.default_rng(HOLD_OUT_SEED).permutation(len(train)).tolist():
        name = (classes or ())[row]
        (held if left[name] > 0 else kept).append(row)
        left[name] -= 1
    return train.select(kept), train.select(held)


def share_out(counts: Counter[str], fraction: float, size: int) -> Counter[str]:
    """How many examples of each class to hold out: at least 1, and all but 1 at most.

    Of a class with a single example, none. Rounds by largest remainders towards `size` in all.
    """
    wanted = {name: count * fraction for name, count in counts.items()}
    quota = Counter(
        {name: min(count - 1, max(1, math.floor(wanted[name]))) for name, count in counts.items()}
    )
    missing = size - quota.total()
    for name in sorted(counts, key=lambda name: (quota[name] - wanted[name], name)):
        if missing > 0 and quota[name] < counts[name] - 1:
            quota[name] += 1
            missing -= 1
    return quota


def take_some(split: Dataset, count: int | None) -> Dataset:
    """A fixed random sample of at most `count` examples."""
    if count is None or count >= len(split):
        return split
    if count < 1:
        raise FinetuneError(f"the number of examples must be at least 1, got {count}")
    return split.shuffle(seed=HOLD_OUT_SEED).select(range(count))

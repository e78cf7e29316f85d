"""Test a trained model on data that differs from what it was trained on."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from datasets import Dataset

from sparse_optim.experiments.presets import Shift, TaskPreset
from sparse_optim.finetune.config import FinetuneConfig
from sparse_optim.finetune.data import TaskData, load_data
from sparse_optim.finetune.inputs import Inputs, load_inputs
from sparse_optim.finetune.job import Trained
from sparse_optim.finetune.request import data_request

SEED = 0  # of the typing errors: they are the same for each cell
TYPO_SHARE = 0.3  # of the words that are long enough
SHORTEST = 4  # letters of a word that can have an error: its first and last letter stay


def measure_shifts(
    config: FinetuneConfig, inputs: Inputs, trained: Trained, task: TaskPreset
) -> dict[str, float]:
    """The task's metric on each of its shifted test sets, by column."""
    values = {}
    for column, shift in task.shifts.items():
        shifted = load_inputs(config, shifted_data(config, inputs.data, shift))
        prefix = "shifted"  # not "eval": these are no evaluations of the run
        scores = trained.trainer.evaluate(shifted.eval_set, metric_key_prefix=prefix)
        values[column] = scores[f"{prefix}_{task.metric}"]
    return values


def shifted_data(config: FinetuneConfig, data: TaskData, shift: Shift) -> TaskData:
    """The data of a task with the shifted test set; one training example is left.

    Raises:
        FinetuneError: the other set has labels that the task does not have.
    """
    if shift.dataset is not None:
        request = replace(
            data_request(config),
            dataset=shift.dataset,
            config=None,
            eval_split="test",
            eval_fraction=None,
            max_train_examples=1,
            labels=tuple(data.label_names) if data.label_names else None,
        )
        data = load_data(request)
    evaluation = misspelt(data.evaluation) if shift.typos else data.evaluation
    return replace(data, train=data.train.select([0]), evaluation=evaluation)


def misspelt(examples: Dataset) -> Dataset:
    """The examples with typing errors in their texts or words; labels are not changed."""
    draw = random.Random(SEED)
    names = [name for name in ("text", "text_pair") if name in examples.column_names]

    def change(row: Mapping[str, Any]) -> dict[str, Any]:
        return {name: with_typos(row[name], draw) for name in names}

    rows = [change(row) for row in examples]
    for name in names:
        changed = [row[name] for row in rows]
        examples = examples.remove_columns(name).add_column(name, changed)
    return examples


def with_typos(text: str | list[str], draw: random.Random) -> str | list[str]:
    """A text, or a list of words, in which some words have two neighbouring letters swapped."""
    words = text.split(" ") if isinstance(text, str) else text
    changed = [
        swapped(word, draw) if is_long(word) and draw.random() < TYPO_SHARE else word
        for word in words
    ]
    return " ".join(changed) if isinstance(text, str) else changed


def is_long(word: str) -> bool:
    """Whether a word can have an error."""
    return word.isalpha() and len(word) >= SHORTEST


def swapped(word: str, draw: random.Random) -> str:
    """The word with two neighbouring letters in its middle swapped.

    Example:
        >>> swapped("word", random.Random(0))
        'wrod'
    """
    at = draw.randrange(1, len(word) - 2)
    return word[:at] + word[at + 1] + word[at] + word[at + 2 :]

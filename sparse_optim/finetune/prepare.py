"""Tokenise the examples of a job, count them, and note what the user should know."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from sparse_optim.finetune.config import FinetuneConfig
from sparse_optim.finetune.data import TaskData
from sparse_optim.finetune.errors import FinetuneError
from sparse_optim.finetune.packing import pack
from sparse_optim.finetune.tasks import TASKS


@dataclass(frozen=True)
class Prepared:
    """Tokenised examples.

    Attributes:
        longest: tokens of the longest example.
        counts: examples that are used, cut and dropped, as in metrics.json.
        notes: lines that the user should read.
    """

    train_set: Dataset
    eval_set: Dataset
    longest: int
    counts: dict[str, Any]
    notes: tuple[str, ...]


def prepare(data: TaskData, tokenizer: PreTrainedTokenizerBase, config: FinetuneConfig) -> Prepared:
    """Tokenise and count; with --packing, pack the training examples (not those of evaluation).

    Raises:
        FinetuneError: no example has something to learn, the task has no packing, or --chat is
            given and the tokenizer has no template.
    """
    if config.packing and data.task != "causal-lm":
        raise FinetuneError(f"--packing is for causal-lm, and the task is {data.task}: drop it")
    if config.chat and tokenizer.chat_template is None:
        raise FinetuneError("--chat: the tokenizer has no chat template: use an instruct model")
    task = TASKS[data.task]
    max_length = config.max_length or task.max_length
    train = task.encode_counted(data.train, tokenizer, max_length)
    evaluation = task.encode_counted(data.evaluation, tokenizer, max_length)
    counts: dict[str, Any] = {
        "train_examples": len(train.examples),
        "eval_examples": len(evaluation.examples),
        "cut": {"train": train.cut, "eval": evaluation.cut},
        "dropped": {"train": train.dropped, "eval": evaluation.dropped},
    }
    notes = [
        *data.notes,
        *train.describe(config.train_split, max_length),
        *evaluation.describe(data.eval_split, max_length),
    ]
    train_set, eval_set = train.examples, evaluation.examples
    longest = max(len(ids) for part in (train_set, eval_set) for ids in part["input_ids"])
    if config.packing:
        train_set = pack(train_set, max_length)
        counts["packed_rows"] = len(train_set)
        notes.append(f"packing: {len(train.examples)} examples in {len(train_set)} rows")
    return Prepared(train_set, eval_set, longest, counts, tuple(notes))

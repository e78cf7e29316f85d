"""Tokenise the examples of a job, count them, and note what the user should know."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from sparse_optim.finetune.config import MAX_TARGET_LENGTH, FinetuneConfig, option
from sparse_optim.finetune.data import TaskData
from sparse_optim.finetune.encode import Lengths, Targets
from sparse_optim.finetune.errors import FinetuneError
from sparse_optim.finetune.models import ModelSource, check_writes, read_config
from sparse_optim.finetune.packing import pack
from sparse_optim.finetune.seq2seq import declared_prefix, longest_source
from sparse_optim.finetune.tasks import TASKS


@dataclass(frozen=True)
class Prepared:
    """Tokenised examples.

    Attributes:
        lengths: the limits of the examples, with defaults filled in.
        longest: tokens of the longest example.
        counts: examples that are used, cut and dropped, as in metrics.json.
        notes: lines that the user should read.
    """

    train_set: Dataset
    eval_set: Dataset
    lengths: Lengths
    longest: int
    counts: dict[str, Any]
    notes: tuple[str, ...]


def find_lengths(
    config: FinetuneConfig, task: str, source: ModelSource, tokenizer: PreTrainedTokenizerBase
) -> Lengths:
    """The limits of a job's examples, and for summarization how the model reads and writes.

    Raises:
        FinetuneError: the task does not have one of the settings, or the model does not fit it.
    """
    known = TASKS[task]
    if not known.writes:
        for name in ("max_target_length", "source_prefix", "num_beams"):
            if getattr(config, name) is not None:
                raise FinetuneError(
                    f"{option(name)} is for summarization, and the task is {task}: drop it"
                )
        return Lengths(config.max_length or known.max_length)
    check_writes(source, task)
    about, prefix = read_config(source), config.source_prefix
    targets = Targets(
        config.max_target_length or MAX_TARGET_LENGTH,
        declared_prefix(about) if prefix is None else prefix,
        config.num_beams or 1,
    )
    longest = config.max_length or longest_source(about, tokenizer, known.max_length)
    return Lengths(longest, targets)


def prepare(
    data: TaskData, tokenizer: PreTrainedTokenizerBase, config: FinetuneConfig, source: ModelSource
) -> Prepared:
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
    lengths = find_lengths(config, data.task, source, tokenizer)
    train = task.encode(data.train, tokenizer, lengths)
    evaluation = task.encode(data.evaluation, tokenizer, lengths)
    counts: dict[str, Any] = {
        "train_examples": len(train.examples),
        "eval_examples": len(evaluation.examples),
        "cut": {"train": train.cut, "eval": evaluation.cut},
        "dropped": {"train": train.dropped, "eval": evaluation.dropped},
    }
    if task.writes:
        counts["targets_cut"] = {"train": train.targets_cut, "eval": evaluation.targets_cut}
    notes = [
        *data.notes,
        *train.describe(config.train_split, lengths),
        *evaluation.describe(data.eval_split, lengths),
        *describe_prefix(config, lengths),
        *(describe_scripts(data) if task.writes else []),
    ]
    train_set, eval_set = train.examples, evaluation.examples
    longest = max(train.longest, evaluation.longest)
    if config.packing:
        train_set = pack(train_set, lengths.max_length)
        counts["packed_rows"] = len(train_set)
        notes.append(f"packing: {len(train.examples)} examples in {len(train_set)} rows")
    return Prepared(train_set, eval_set, lengths, longest, counts, tuple(notes))


def describe_scripts(data: TaskData) -> list[str]:
    """A line on summaries that ROUGE cannot compare, or none: it reads a to z and digits alone."""
    summaries = [text for text in data.evaluation["label"] if text.strip()]
    unread = sum(re.search("[a-z0-9]", text.lower()) is None for text in summaries)
    if not unread:
        return []
    return [
        f"{data.eval_split}: ROUGE reads the letters a to z and digits alone, and {unread} of "
        f"{len(summaries)} summaries have none: their values are 0"
    ]


def describe_prefix(config: FinetuneConfig, lengths: Lengths) -> list[str]:
    """A line on a prefix that the user did not choose, or none."""
    if config.source_prefix is not None or lengths.targets is None or not lengths.targets.prefix:
        return []
    return [
        f"each text begins with {lengths.targets.prefix!r}, as the model's config.json says "
        "(see --source-prefix)"
    ]

"""The tokenised data and the base model of a job."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from sparse_optim.finetune.build import LoadModel, build
from sparse_optim.finetune.config import FinetuneConfig
from sparse_optim.finetune.data import TaskData, load_data
from sparse_optim.finetune.encode import Lengths
from sparse_optim.finetune.models import (
    LoadedModel,
    ModelSource,
    find_model,
    load_base_model,
    load_tokenizer,
)
from sparse_optim.finetune.prepare import prepare
from sparse_optim.finetune.request import data_request
from sparse_optim.finetune.spec import spec_of
from sparse_optim.finetune.tasks import TASKS, Task


@dataclass(frozen=True)
class Inputs:
    """The tokenised data of a job; jobs that differ in method, rate or seed share it.

    Attributes:
        train_set, eval_set, lengths, longest, counts, notes: see `Prepared`.
    """

    source: ModelSource
    data: TaskData
    task: Task
    tokenizer: PreTrainedTokenizerBase
    train_set: Dataset
    eval_set: Dataset
    lengths: Lengths
    longest: int
    counts: dict[str, Any]
    notes: tuple[str, ...]


def load_inputs(config: FinetuneConfig, data: TaskData | None = None) -> Inputs:
    """Find the model, load and tokenise the data.

    Args:
        data: the data, if it is loaded already.

    Raises:
        FinetuneError: wrong input, in one line.
    """
    source = find_model(config.model)
    data = data or load_data(data_request(config))
    task = TASKS[data.task]
    task.check_metric(config.metric, data.label_names)
    tokenizer = load_tokenizer(source)
    prepared = prepare(data, tokenizer, config, source)
    return Inputs(source, data, task, tokenizer, **vars(prepared))


def load_base(
    config: FinetuneConfig, inputs: Inputs, load: LoadModel = load_base_model
) -> LoadedModel:
    """Load the model that the job begins with; a second call returns the same model."""
    spec = spec_of(config, inputs.data, inputs.lengths)
    return build(inputs.source, spec, inputs.tokenizer, load)

"""What is needed to build a job's model again: kept in the delta's note, under "model"."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_type_hints

from sparse_optim.delta import Delta
from sparse_optim.finetune.builtin_data import MODELS
from sparse_optim.finetune.columns import Columns
from sparse_optim.finetune.config import FinetuneConfig
from sparse_optim.finetune.data import TaskData
from sparse_optim.finetune.errors import FinetuneError
from sparse_optim.finetune.settings import convert
from sparse_optim.finetune.tasks import TASKS

KEY = "model"  # of the delta's `method`


@dataclass(frozen=True)
class ModelSpec:
    """The model of a job: base, task, labels and adapter, and how its texts were read.

    Attributes:
        base: built-in name, absolute path of a folder or GGUF file, or hub id.
        task: the name of a task.
        labels: the classes in order; None without classes.
        pooling: "auto", "cls" or "mean".
        dtype: of the weights.
        seed: of fresh values; those of an adapter are not in the delta.
        dense: beginnings of names of parameters that were trained whole.
        adapter, adapter_rank, adapter_alpha, adapter_targets: as in `FinetuneConfig`.
        max_length: tokens at which examples were cut.
        chat: whether a causal LM was trained on conversations.
        chat: whether prompts were turns of the chat template, as in `FinetuneConfig`.
        metric: the metric that the job reported.
        columns: the columns that the job read.
    """

    base: str
    task: str
    labels: tuple[str, ...] | None = None
    pooling: str = "auto"
    dtype: str = "float32"
    seed: int = 0
    dense: tuple[str, ...] = ()
    adapter: str | None = None
    adapter_rank: int | None = None
    adapter_alpha: float | None = None
    adapter_targets: tuple[str, ...] = ()
    max_length: int = 128
    chat: bool | None = None
    metric: str | None = None
    columns: Columns = field(default_factory=Columns)

    def note(self) -> dict[str, Any]:
        """The values that JSON can hold, for `read_spec`; None and empty ones are left out."""
        values = dataclasses.asdict(self)
        values["columns"] = {k: v for k, v in values["columns"].items() if v is not None}
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in values.items()
            if value not in (None, (), {})
        }

    def model_arguments(self) -> dict[str, Any]:
        """Arguments for `from_pretrained` that describe the labels."""
        kind = TASKS[self.task].problem_type
        arguments: dict[str, Any] = {} if kind is None else {"problem_type": kind}
        if self.labels is None:
            return arguments | ({"num_labels": 1} if kind == "regression" else {})
        return arguments | {
            "num_labels": len(self.labels),
            "id2label": dict(enumerate(self.labels)),
            "label2id": {name: index for index, name in enumerate(self.labels)},
        }


def spec_of(config: FinetuneConfig, data: TaskData) -> ModelSpec:
    """The model of a job."""
    base = Path(config.model).expanduser()
    task = TASKS[data.task]
    is_path = config.model not in MODELS and base.exists()
    return ModelSpec(
        base=str(base.resolve()) if is_path else config.model,
        task=data.task,
        labels=None if data.label_names is None else tuple(data.label_names),
        pooling=config.pooling,
        dtype=config.dtype,
        seed=config.seed,
        dense=config.dense,
        adapter=config.adapter,
        adapter_rank=config.adapter_rank,
        adapter_alpha=config.adapter_alpha,
        adapter_targets=config.adapter_targets,
        max_length=config.max_length or task.max_length,
        chat="messages" in data.train.column_names if data.task == "causal-lm" else None,
        metric=config.metric,
        columns=data.columns,
    )


def read_spec(delta: Delta) -> ModelSpec | None:
    """The model that a delta's note describes; None: it describes none.

    Raises:
        FinetuneError: the note has an unknown entry, or a value of the wrong type.
    """
    note = delta.method.get(KEY)
    if note is None:
        return None
    if not isinstance(note, dict) or not {"base", "task"} <= note.keys():
        raise FinetuneError("the delta's note of its model is damaged: it lacks base or task")
    if note["task"] not in TASKS:
        raise FinetuneError(f"the delta is for an unknown task {note['task']!r}")
    hints = get_type_hints(ModelSpec)
    unknown = sorted(note.keys() - hints.keys())
    if unknown:
        raise FinetuneError(
            f"the delta's note of its model has an unknown entry {unknown[0]!r}: a newer version "
            "of sparse-optim wrote it"
        )
    try:
        columns = Columns(**note.get("columns", {}))
        values = {name: convert(note[name], hints[name]) for name in note if name != "columns"}
    except TypeError as error:
        raise FinetuneError(f"the delta's note of its model is damaged: {error}") from None
    return ModelSpec(**values, columns=columns)

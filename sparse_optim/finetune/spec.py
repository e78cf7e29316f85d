"""What is needed to build a job's model again: kept in the delta's note, under "model"."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_type_hints

from sparse_optim.delta import Delta
from sparse_optim.finetune.adapter_kinds import ADAPTERS
from sparse_optim.finetune.builtin_data import DATASETS, MODELS
from sparse_optim.finetune.columns import Columns
from sparse_optim.finetune.config import MAX_TARGET_LENGTH, FinetuneConfig, field_types
from sparse_optim.finetune.data import TaskData
from sparse_optim.finetune.encode import Lengths, Targets
from sparse_optim.finetune.errors import FinetuneError
from sparse_optim.finetune.settings import choices, convert
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
        max_target_length, source_prefix, num_beams: of summarization, as in `FinetuneConfig`.
        chat: whether a causal LM was trained on conversations.
        metric: the metric that the job reported.
        columns: the columns that the job read.
        dataset, dataset_config, train_split: what it was trained on, see `data_name`.
        weights: `hash_weights` of the base, less what the delta replaces.
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
    max_target_length: int | None = None
    source_prefix: str | None = None
    num_beams: int | None = None
    chat: bool | None = None
    metric: str | None = None
    columns: Columns = field(default_factory=Columns)
    dataset: str | None = None
    dataset_config: str | None = None
    train_split: str = "train"
    weights: str | None = None

    @property
    def lengths(self) -> Lengths:
        """The limits of the examples, for `Task.encode`."""
        if not TASKS[self.task].writes:
            return Lengths(self.max_length)
        most = self.max_target_length or MAX_TARGET_LENGTH
        targets = Targets(most, self.source_prefix or "", self.num_beams or 1)
        return Lengths(self.max_length, targets)

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


def spec_of(config: FinetuneConfig, data: TaskData, lengths: Lengths) -> ModelSpec:
    """The model of a job."""
    base, targets = Path(config.model).expanduser(), lengths.targets
    return ModelSpec(
        base=str(base.resolve()) if config.model not in MODELS and base.exists() else config.model,
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
        max_length=lengths.max_length,
        max_target_length=None if targets is None else targets.max_length,
        source_prefix=None if targets is None else targets.prefix,
        num_beams=None if targets is None else targets.num_beams,
        chat="messages" in data.train.column_names if data.task == "causal-lm" else None,
        metric=config.metric,
        columns=data.columns,
        dataset=data_name(config.dataset),
        dataset_config=config.dataset_config,
        train_split=config.train_split,
    )


def data_name(dataset: str) -> str:
    """The name of a data set; of a file or folder without its place, which is no one's business."""
    path = Path(dataset).expanduser()
    return path.resolve().name if dataset not in DATASETS and path.exists() else dataset


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
    spec = ModelSpec(**values, columns=columns)
    problem = find_problem(spec)
    if problem is not None:
        raise FinetuneError(f"the delta's note of its model is damaged: {problem}")
    return spec


def find_problem(spec: ModelSpec) -> str | None:
    """What is wrong with a note that may come from a stranger; None: nothing."""
    if spec.adapter is not None and spec.adapter not in ADAPTERS:
        return f"unknown adapter {spec.adapter!r}"
    for name in ("dtype", "pooling"):
        if getattr(spec, name) not in choices(field_types()[name]):
            return f"unknown {name} {getattr(spec, name)!r}"
    if spec.max_length < 1 or not 0 <= spec.seed < 2**32 or (spec.adapter_rank or 1) < 1:
        return "max_length, seed or adapter_rank is out of range"
    if (spec.max_target_length or 1) < 1 or (spec.num_beams or 1) < 1:
        return "max_target_length or num_beams is out of range"
    if not all(name is None or isinstance(name, str) for name in vars(spec.columns).values()):
        return "a column's name is not text"
    return None

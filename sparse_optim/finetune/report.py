"""Collect the metrics of a job and write them to metrics.json."""

from __future__ import annotations

import dataclasses
import platform
from collections.abc import Mapping, Sized
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

from transformers import PreTrainedTokenizerBase

from sparse_optim.files import strict_json
from sparse_optim.finetune.config import FinetuneConfig
from sparse_optim.finetune.data import TaskData
from sparse_optim.finetune.defaults import resolved
from sparse_optim.finetune.encode import Lengths, Targets
from sparse_optim.finetune.models import LoadedModel
from sparse_optim.finetune.readings import active_entries, state_bytes, usage_of
from sparse_optim.finetune.trainer import JobTrainer


def collect(
    config: FinetuneConfig,
    trainer: JobTrainer,
    data: TaskData,
    lengths: Lengths,
    counts: Mapping[str, Any],
    loaded: LoadedModel,
    metric: str,
) -> dict[str, Any]:
    """The content of metrics.json, without what is known of the files.

    `config` is what the user gave; `used` has the values that the run used, defaults filled in. The
    metric, `final` and the active entries are those of the best evaluation if it was kept.
    """
    history = trainer.state.log_history
    log = [without(row, "epoch") for row in history if "loss" in row]
    evaluations = [
        {name.removeprefix("eval_"): value for name, value in without(row, "epoch").items()}
        for row in history
        if "eval_loss" in row
    ]
    optimizer, stopwatch = trainer.raw_optimizer, trainer.stopwatch
    kept = trainer.best and trainer.best.kept
    final = evaluations[-1]
    if kept:
        final = next(row for row in evaluations if row["step"] == kept.step)
    parameters = sum(param.numel() for param in loaded.model.parameters())
    fresh = [p for name, p in loaded.model.named_parameters() if name in loaded.fresh]
    return {
        "config": {name: jsonable(value) for name, value in vars(config).items()},
        "used": used_values(config, trainer, data, lengths),
        "metric": {"name": metric, "value": final[metric], "step": final["step"]},
        "task": data.task,
        "steps": trainer.state.global_step,
        "stopped_early": trainer.best is not None and trainer.best.stopped,
        "active_entries": kept.active if kept else active_entries(optimizer),
        "state_bytes": state_bytes(optimizer),
        "step_ms": stopwatch.step_ms(),
        "update_ms": stopwatch.update_ms(),
        "model": {
            "parameters": parameters,
            "fresh_entries": sum(param.numel() for param in fresh),
            "fresh": sorted(loaded.fresh),
        },
        "data": {
            **counts,
            "eval_split": data.eval_split,
            "label_names": data.label_names,
        },
        "final": without(final, "step"),
        "evaluations": evaluations,
        "log": log,
        "versions": versions(),
        "device": str(trainer.args.device),
    }


def used_values(
    config: FinetuneConfig, trainer: JobTrainer, data: TaskData, lengths: Lengths
) -> dict[str, Any]:
    """The values that the run used, with nothing left to a default.

    `train_rows` are what `batch_size` counts: examples, or with packing rows of several examples.
    """
    filled, usage = resolved(config), usage_of(trainer.raw_optimizer)
    args, rows = trainer.args, cast(Sized, trainer.train_dataset)
    tokenizer = cast(PreTrainedTokenizerBase, trainer.processing_class)
    return {
        "lr": filled.lr,
        "head_lr": config.head_lr or filled.lr,
        "adam_eps": filled.adam_eps,
        "budget_entries": usage.budget,
        "ranked_entries": usage.ranked,
        "rank": filled.rank,
        "unmask_share": filled.unmask_share,
        "every": usage.every,
        "budget_share": usage.budget / usage.ranked if usage.ranked else None,
        "dense_entries": usage.dense,
        "backend": usage.backend,
        "gradients": usage.gradients,
        "gradient_checkpointing": config.gradient_checkpointing,
        "device": str(args.device),
        "processes": args.world_size,
        "dtype": config.dtype,
        "amp": config.amp,
        "seed": config.seed,
        "steps": trainer.state.global_step,
        "planned_steps": trainer.state.max_steps,
        "warmup_steps": args.get_warmup_steps(trainer.state.max_steps),
        "batch_size": args.train_batch_size,
        "accumulation": args.gradient_accumulation_steps,
        "train_rows": len(rows),
        "max_length": lengths.max_length,
        **targets_used(lengths.targets),
        "chat": "messages" in data.train.column_names and tokenizer.chat_template is not None,
        "eval_every": args.eval_steps,
        "columns": dataclasses.asdict(data.columns),
        "train_split": config.train_split,
        "eval_split": data.eval_split,
    }


def targets_used(targets: Targets | None) -> dict[str, Any]:
    """How a model of texts and their summaries read and wrote; empty for other tasks."""
    if targets is None:
        return {}
    return {
        "max_target_length": targets.max_length,
        "source_prefix": targets.prefix,
        "num_beams": targets.num_beams,
    }


def without(row: Mapping[str, Any], name: str) -> dict[str, Any]:
    """A copy of a row without one entry."""
    return {key: value for key, value in row.items() if key != name}


def versions() -> dict[str, str]:
    """Versions of python and the packages that computed the result."""
    packages = ("torch", "transformers", "accelerate", "datasets", "safetensors")
    return {"python": platform.python_version(), **{name: version(name) for name in packages}}


def jsonable(value: Any) -> Any:
    """Convert paths to text and tuples to lists; leave the rest as it is."""
    if isinstance(value, Path):
        return str(value)
    return list(value) if isinstance(value, tuple) else value


def write_json(metrics: Mapping[str, Any], path: Path) -> None:
    """Write strict JSON: a number that is not finite becomes null."""
    path.write_text(strict_json(metrics, indent=2) + "\n")

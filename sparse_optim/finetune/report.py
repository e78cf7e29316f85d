"""Collect the metrics of a job and write them to metrics.json."""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from sparse_optim.finetune.config import FinetuneConfig
from sparse_optim.finetune.data import TaskData
from sparse_optim.finetune.models import LoadedModel
from sparse_optim.finetune.readings import active_entries, state_bytes
from sparse_optim.finetune.trainer import JobTrainer


def collect(
    config: FinetuneConfig,
    trainer: JobTrainer,
    data: TaskData,
    counts: Mapping[str, Any],
    loaded: LoadedModel,
    metric: str,
) -> dict[str, Any]:
    """The content of metrics.json, without what is known of the files."""
    history = trainer.state.log_history
    log = [without(row, "epoch") for row in history if "loss" in row]
    evaluations = [
        {name.removeprefix("eval_"): value for name, value in without(row, "epoch").items()}
        for row in history
        if "eval_loss" in row
    ]
    optimizer, stopwatch = trainer.raw_optimizer, trainer.stopwatch
    parameters = sum(param.numel() for param in loaded.model.parameters())
    fresh = [p for name, p in loaded.model.named_parameters() if name in loaded.fresh]
    return {
        "config": {name: jsonable(value) for name, value in vars(config).items()},
        "metric": {"name": metric, "value": evaluations[-1][metric]},
        "task": data.task,
        "steps": trainer.state.global_step,
        "active_entries": active_entries(optimizer),
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
        "final": without(evaluations[-1], "step"),
        "evaluations": evaluations,
        "log": log,
        "versions": versions(),
        "device": str(trainer.args.device),
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

    def finite(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: finite(item) for name, item in value.items()}
        if isinstance(value, list):
            return [finite(item) for item in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    path.write_text(json.dumps(finite(metrics), indent=2, allow_nan=False) + "\n")

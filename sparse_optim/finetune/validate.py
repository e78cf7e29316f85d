"""Check a configuration before anything is loaded."""

from __future__ import annotations

import torch
from transformers import SchedulerType, get_scheduler
from transformers.integrations.integration_utils import get_available_reporting_integrations

from sparse_optim.finetune.adapter_kinds import ADAPTERS
from sparse_optim.finetune.config import FinetuneConfig
from sparse_optim.finetune.errors import FinetuneError
from sparse_optim.finetune.hub import did_you_mean
from sparse_optim.methods import METHODS


def check_method(config: FinetuneConfig) -> None:
    """Raise FinetuneError for an unknown method or adapter, or an option the adapter lacks."""
    for kind, name, known in (
        ("method", config.method, METHODS),
        ("adapter", config.adapter, ADAPTERS),
    ):
        if name is not None and name not in known:
            hint = did_you_mean(name, known)
            raise FinetuneError(f"unknown {kind} {name!r}{hint}; known: {', '.join(known)}")
    if config.adapter is None:
        return
    if config.adapter_rank and ADAPTERS[config.adapter].rank is None:
        raise FinetuneError(f"--adapter-rank: {config.adapter} has no rank")
    if not ADAPTERS[config.adapter].places and (config.adapter_alpha or config.adapter_targets):
        raise FinetuneError(
            "--adapter-alpha and --adapter-targets are for lora and dora, not for "
            f"{config.adapter}: drop them"
        )


def check_schedule(config: FinetuneConfig) -> None:
    """Raise FinetuneError for a learning rate schedule that transformers cannot make."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    try:
        get_scheduler(config.schedule, optimizer, num_warmup_steps=1, num_training_steps=2)
    except Exception as error:  # each schedule has its own
        known = ", ".join(kind.value for kind in SchedulerType)
        hint = did_you_mean(config.schedule, [kind.value for kind in SchedulerType])
        reason = " ".join(str(error).split())
        raise FinetuneError(
            f"--schedule {config.schedule!r}{hint}: {reason} (transformers knows {known})"
        ) from error


def check_tracker(name: str) -> None:
    """Raise FinetuneError for a tracker that is unknown or not installed."""
    installed = get_available_reporting_integrations()
    if name not in ("none", "all", *installed):
        raise FinetuneError(
            f"--report-to: {name!r} is unknown or not installed; "
            f"known: {', '.join(['none', *sorted(installed)])}"
        )

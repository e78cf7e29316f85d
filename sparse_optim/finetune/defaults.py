"""What a job uses where the user gave nothing. It needs no torch: the command shows it at once."""

from __future__ import annotations

import dataclasses

from sparse_optim.finetune.adapter_kinds import DEFAULT_RATE
from sparse_optim.finetune.config import DEFAULT_BUDGET, FinetuneConfig
from sparse_optim.methods import METHODS


def learning_rate(config: FinetuneConfig) -> float | str:
    """The user's learning rate or AUTO, else the method's; on an adapter at least DEFAULT_RATE."""
    default = METHODS[config.method].lr
    return config.lr or (default if config.adapter is None else max(default, DEFAULT_RATE))


def resolved(config: FinetuneConfig) -> FinetuneConfig:
    """The configuration with the method's defaults filled in."""
    method = METHODS[config.method]
    return dataclasses.replace(
        config,
        lr=learning_rate(config),
        adam_eps=config.adam_eps or method.adam_eps,
        budget=config.budget or (DEFAULT_BUDGET if method.budget == "given" else None),
    )

"""What a job uses where the user gave nothing. It needs no torch: the command shows it at once."""

from __future__ import annotations

import dataclasses

from sparse_optim.finetune.adapter_kinds import DEFAULT_RATE
from sparse_optim.finetune.config import DEFAULT_BUDGET, FinetuneConfig
from sparse_optim.methods import METHODS
from sparse_optim.policy.defaults import RANK, UNMASK_SHARE


def learning_rate(config: FinetuneConfig) -> float | str:
    """The user's learning rate or AUTO, else the method's; on an adapter at least DEFAULT_RATE."""
    default = METHODS[config.method].lr
    return config.lr or (default if config.adapter is None else max(default, DEFAULT_RATE))


def resolved(config: FinetuneConfig) -> FinetuneConfig:
    """The configuration with the method's defaults filled in; None: it has no such setting."""
    method = METHODS[config.method]
    share = None if config.method != "id3" else UNMASK_SHARE if config.series is None else 1.0
    rank = None if not method.has_budget else RANK if config.adapter is None else "all"
    return dataclasses.replace(
        config,
        lr=learning_rate(config),
        adam_eps=config.adam_eps or method.adam_eps,
        rank=config.rank or rank,
        unmask_share=config.unmask_share or share,
        budget=config.budget or (DEFAULT_BUDGET if method.budget == "given" else None),
    )

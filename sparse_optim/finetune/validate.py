"""Check a configuration before anything is loaded."""

from __future__ import annotations

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


def check_tracker(name: str) -> None:
    """Raise FinetuneError for a tracker that is unknown or not installed."""
    installed = get_available_reporting_integrations()
    if name not in ("none", "all", *installed):
        raise FinetuneError(
            f"--report-to: {name!r} is unknown or not installed; "
            f"known: {', '.join(['none', *sorted(installed)])}"
        )

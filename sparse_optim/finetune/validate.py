"""Check a configuration before anything is loaded.

The command checks names before it imports torch and transformers, which takes seconds.
"""

from __future__ import annotations

import re
from collections.abc import Collection

from sparse_optim.finetune import processes
from sparse_optim.finetune.adapter_kinds import ADAPTERS
from sparse_optim.finetune.config import AUTO, FinetuneConfig
from sparse_optim.finetune.errors import FinetuneError
from sparse_optim.finetune.hub import did_you_mean
from sparse_optim.methods import METHODS

# They score by calibration passes, which each process runs on different examples.
ONE_PROCESS = frozenset(
    {"fish", "child-tuning-d", "sparse-adapter", "gem", "shira-grad", "shira-snip", "super"}
)

# They choose by what earlier steps recorded.
FOLLOW_EARLIER_STEPS = frozenset({"stochastic-tuning", "top-tuning", "dps", "dps-mix"})


def check_method(config: FinetuneConfig) -> None:
    """Raise FinetuneError for an unknown method or adapter, or an option the adapter lacks."""
    check_name("method", config.method, METHODS, "adapter", ADAPTERS)
    if config.lr == AUTO and config.method in FOLLOW_EARLIER_STEPS:
        raise FinetuneError(
            f"--lr auto: {config.method} chooses entries by earlier steps, so that their curvature "
            "is not known before training: give a number"
        )
    try:
        re.compile(config.rank or "")
    except re.error as error:
        raise FinetuneError(
            f"--rank {config.rank!r}: expected all, linear or a regular expression ({error})"
        ) from None
    if config.rank not in (None, "all") and not METHODS[config.method].has_budget:
        raise FinetuneError(
            f"--rank: nothing competes for a budget in --method {config.method}: drop one of them"
        )
    if config.adapter is None:
        return
    check_name("adapter", config.adapter, ADAPTERS, "method", METHODS)
    if config.adapter_rank and ADAPTERS[config.adapter].rank is None:
        raise FinetuneError(f"--adapter-rank: {config.adapter} has no rank")
    if not ADAPTERS[config.adapter].places and (config.adapter_alpha or config.adapter_targets):
        raise FinetuneError(
            "--adapter-alpha and --adapter-targets are for lora and dora, not for "
            f"{config.adapter}: drop them"
        )


def check_name(
    kind: str, name: str, known: Collection[str], other: str, others: Collection[str]
) -> None:
    """Raise FinetuneError for a name that is unknown, or that belongs to another option."""
    if name in known:
        return
    if name in others:
        raise FinetuneError(f"--{kind} {name}: this is one of the {other}s: use --{other} {name}")
    hint = did_you_mean(name, known)
    raise FinetuneError(f"unknown {kind} {name!r}{hint}; known: {', '.join(known)}")


def check_machine(config: FinetuneConfig) -> None:
    """Raise FinetuneError for what the device, or training in several processes, does not allow."""
    import torch

    if config.amp == "fp16" and (config.cpu or not torch.cuda.is_available()):
        raise FinetuneError("--amp fp16 needs a GPU: on the CPU use --amp bf16")
    if processes.count() == 1:
        return
    if config.lr == AUTO:
        raise FinetuneError(
            "--lr auto needs one process: find the rate in a run without torchrun, and give it"
        )
    if config.fuse_backward:
        raise FinetuneError(
            f"--fuse-backward needs one process, and torchrun started {processes.count()}: drop it"
        )
    if config.method in ONE_PROCESS:
        raise FinetuneError(
            f"--method {config.method} chooses entries by the examples of one process, so that "
            "several would train different ones: start it without torchrun"
        )


def check_schedule(config: FinetuneConfig) -> None:
    """Raise FinetuneError for a learning rate schedule that transformers cannot make."""
    import torch
    from transformers import SchedulerType, get_scheduler

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
    from transformers.integrations.integration_utils import get_available_reporting_integrations

    installed = get_available_reporting_integrations()
    if name not in ("none", "all", *installed):
        raise FinetuneError(
            f"--report-to: {name!r} is unknown or not installed; "
            f"known: {', '.join(['none', *sorted(installed)])}"
        )

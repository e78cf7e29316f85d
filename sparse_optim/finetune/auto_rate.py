"""`--lr auto`: the learning rate from the size of a first step on the entries of the method.

docs/learning-rates.md compares it with tuned rates.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import chain, islice, repeat
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

from sparse_optim.analysis.curvature import curvature
from sparse_optim.analysis.relative_step import relative_step
from sparse_optim.finetune.checkpoints import saved_rate
from sparse_optim.finetune.config import AUTO, FinetuneConfig
from sparse_optim.finetune.errors import FinetuneError
from sparse_optim.finetune.inputs import Inputs, load_base
from sparse_optim.finetune.progress import tell
from sparse_optim.finetune.trainer_setup import make_trainer, method_request, planned_steps
from sparse_optim.methods import METHODS, MethodRequest
from sparse_optim.optim.masked_adamw import MaskedAdamW

HEAD_STEPS, HEAD_RATE = 30, 5e-3
BATCHES = 4

# Methods that choose anew at later steps, and those that choose once by the same scores.
STATIC_KIN = {"id3": "static-d3", "repeat-d3": "static-d3", "random-tuning": "r-mask"}


def with_rate(config: FinetuneConfig, inputs: Inputs, console: Console | None) -> FinetuneConfig:
    """The configuration with a number in place of `--lr auto`.

    Raises:
        FinetuneError: no rate follows from the curvature.
    """
    if config.lr != AUTO:
        return config
    if config.resume is not None:
        return dataclasses.replace(config, lr=saved_rate(config.resume))
    try:
        rate, reason = suggest(prepare(config, inputs))
    except ValueError as error:
        raise FinetuneError(f"--lr auto: {error}") from error
    if rate is None:
        raise FinetuneError(f"--lr auto: {reason}: give a number")
    tell(console, f"learning rate {rate:.2g}: {reason}")
    return dataclasses.replace(config, lr=float(f"{rate:.2g}"))


@dataclass(frozen=True)
class Prepared:
    """What a rate is measured on: the model with a trained head, batches, the method's entries."""

    model: nn.Module
    batches: list[Any]
    mask: Mapping[str, Tensor]
    is_head: bool  # whether the mask is the fresh head alone
    steps: int  # of the whole run


def prepare(config: FinetuneConfig, inputs: Inputs) -> Prepared:
    """Train a fresh head alone for 30 steps (at `--head-lr`, or 5e-3), and choose the entries.

    Raises:
        ValueError: the method cannot use the job's settings.
    """
    loaded = load_base(config, inputs)
    loader = make_trainer(config, inputs, loaded).get_train_dataloader()
    request = method_request(config, loaded, loaded.model, 1, lambda: loader)
    several = chain.from_iterable(repeat(loader))  # epoch after epoch
    request.model.eval()
    train_head(request, islice(several, HEAD_STEPS), config.head_lr or HEAD_RATE)
    batches = list(islice(several, BATCHES))
    mask = mask_of(config.method, request, batches)
    steps = planned_steps(config, len(inputs.train_set))
    return Prepared(request.model, batches, mask, mask.keys() <= request.fresh, steps)


def suggest(found: Prepared) -> tuple[float | None, str]:
    """A rate, None where none is known, and the reason.

    The rate at which a first step has the usual size relative to the weights, in a run of that
    length; of entries outside the weights of Linear modules (biases, a head alone) the rate at
    which it goes farthest down.
    """
    step = None if found.is_head else relative_step(found.model, found.batches, found.mask)
    if step is not None:
        rate = step.lr_for(found.steps)
        return rate, (
            f"a first step changes {step.matrices} weights by {rate * step.size:.2%} of their "
            f"largest singular value, in a run of {found.steps:,} steps"
        )
    bent = curvature(found.model, found.batches, found.mask, iterations=0)
    if bent.lr is None:
        return None, (
            "the loss has no lowest point along the first step (its curvature there is "
            f"{bent.sign_curvature:.3g})"
        )
    return bent.lr, (
        f"slope {bent.slope:.3g} / curvature {bent.sign_curvature:.3g} of the loss along a first "
        f"step on {bent.entries:,} entries"
    )


def train_head(request: MethodRequest, batches: Iterable[Any], rate: float) -> None:
    """Train the fresh parameters alone with AdamW, a step for each batch."""
    head = [param for name, param in request.named if name in request.fresh]
    if not head:
        return
    optimizer = torch.optim.AdamW(head, rate, weight_decay=0.0)
    for batch in batches:
        loss = request.model(**batch).loss
        for param, grad in zip(head, torch.autograd.grad(loss, head), strict=True):
            param.grad = grad
        optimizer.step()
    for param in head:
        param.grad = None


def mask_of(method: str, request: MethodRequest, batches: list[Any]) -> Mapping[str, Tensor]:
    """The entries that a method trains, without a fresh head: name -> flat positions."""
    still = dataclasses.replace(
        request, lr=0.0, head_lr=0.0, weight_decay=0.0, total_steps=1, every=1, unmask_share=1.0,
        fuse_backward=False, sampled_backward=False, max_grad_norm=None,
        calibration=lambda: batches,
    )  # fmt: skip
    optimizer = METHODS[STATIC_KIN.get(method, method)].build(still)
    named = dict(request.named)
    if not isinstance(optimizer, MaskedAdamW):
        trained = {id(param) for group in optimizer.param_groups for param in group["params"]}
        chosen = {name: param for name, param in named.items() if id(param) in trained}
        body = {name: param for name, param in chosen.items() if name not in request.fresh}
        return {name: torch.arange(param.numel()) for name, param in (body or chosen).items()}
    request.model(**batches[0]).loss.backward()
    optimizer.step()  # at a rate of 0
    request.model.zero_grad()
    active = optimizer.active_entries()
    return {name: positions for name, positions in active.items() if positions.numel()}

"""`--lr auto`: the learning rate from the curvature of the loss on the entries of the method.

Measured on MiniLM with three tasks (bench/results/curvature): from 1e-4 for full fine-tuning to
5e-2 for a random mask, in 13 of 18 cases within a factor of two of the best tuned rate, at most
3.3. The head matters: before a fresh head is trained, the rule gives rates ten times higher.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from itertools import chain, islice, repeat
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from sparse_optim.analysis.curvature import Curvature, curvature
from sparse_optim.finetune.checkpoints import saved_rate
from sparse_optim.finetune.config import AUTO, FinetuneConfig
from sparse_optim.finetune.errors import FinetuneError
from sparse_optim.finetune.inputs import Inputs, load_base
from sparse_optim.finetune.progress import tell
from sparse_optim.finetune.trainer_setup import make_trainer, method_request
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
        found = curvature_of(config, inputs)
    except ValueError as error:
        raise FinetuneError(f"--lr auto: {error}") from error
    if found.lr is None:
        raise FinetuneError(
            "--lr auto: the loss has no lowest point along the first step (its curvature there is "
            f"{found.sign_curvature:.3g}): give a number"
        )
    tell(
        console,
        f"learning rate {found.lr:.2g}: slope {found.slope:.3g} / curvature "
        f"{found.sign_curvature:.3g} of the loss along a first step on {found.entries:,} entries",
    )
    return dataclasses.replace(config, lr=float(f"{found.lr:.2g}"))


def curvature_of(config: FinetuneConfig, inputs: Inputs) -> Curvature:
    """The loss along AdamW's first step on the entries that the job would train.

    Trains a fresh head alone for 30 steps before it measures (at `--head-lr`, or 5e-3).

    Raises:
        ValueError: the method cannot use the job's settings.
    """
    loaded = load_base(config, inputs)
    batches = make_trainer(config, inputs, loaded).get_train_dataloader()
    request = method_request(config, loaded, loaded.model, 1, lambda: batches)
    several = chain.from_iterable(repeat(batches))  # epoch after epoch
    request.model.eval()
    train_head(request, islice(several, HEAD_STEPS), config.head_lr or HEAD_RATE)
    some = list(islice(several, BATCHES))
    return curvature(request.model, some, mask_of(config.method, request, some), iterations=0)


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

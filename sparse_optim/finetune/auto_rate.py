"""`--lr auto`: the learning rate from the curvature of the loss on the entries of the method.

Measured on MiniLM with three tasks (bench/results/curvature): from 1e-4 for full fine-tuning to
5e-2 for a random mask, in 13 of 18 cases within a factor of two of the best tuned rate, at most
3.3. The head matters: before a fresh head is trained, the rule gives rates ten times higher.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import chain, islice
from typing import Any

import torch
from torch import Tensor

from sparse_optim.analysis.curvature import curvature
from sparse_optim.finetune.errors import FinetuneError
from sparse_optim.methods import METHODS, MethodRequest
from sparse_optim.optim.masked_adamw import MaskedAdamW

HEAD_STEPS, HEAD_RATE = 30, 5e-3
BATCHES = 4

# Methods that choose anew at later steps, and those that choose once by the same scores.
STATIC_KIN = {"id3": "static-d3", "repeat-d3": "static-d3", "random-tuning": "r-mask"}


def find_rate(method: str, request: MethodRequest, head_rate: float | None) -> tuple[float, str]:
    """The learning rate of a method on a model, and a sentence on how it was found.

    Trains a fresh head alone for 30 steps, takes the entries that the method would train, and
    measures the loss along AdamW's first step on them (`sparse_optim.analysis.curvature`).

    Args:
        method: a key of METHODS.
        request: of the job; its model is changed, and of no further use.
        head_rate: of the head's 30 steps; None: 5e-3.

    Raises:
        FinetuneError: the loss has no lowest point along the step.
        ValueError: the method cannot use the request.
    """
    if request.calibration is None:
        raise ValueError("it needs batches: give calibration=")
    batches = chain.from_iterable(repeat_call(request.calibration))
    request.model.eval()
    train_head(request, islice(batches, HEAD_STEPS), head_rate or HEAD_RATE)
    some = list(islice(batches, BATCHES))
    found = curvature(request.model, some, mask_of(method, request, some), iterations=0)
    if found.lr is None:
        raise FinetuneError(
            "--lr auto: the loss has no lowest point along the first step (its curvature there is "
            f"{found.sign_curvature:.3g}): give a number"
        )
    return float(f"{found.lr:.2g}"), (
        f"learning rate {found.lr:.2g}: slope {found.slope:.3g} / curvature "
        f"{found.sign_curvature:.3g} of the loss along a first step on {found.entries:,} entries"
    )


def repeat_call(make: Callable[[], Iterable[Any]]) -> Iterator[Iterable[Any]]:
    """Epoch after epoch."""
    while True:
        yield make()


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

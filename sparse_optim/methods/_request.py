"""The input of a method, and the two kinds of optimizers that methods build."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from sparse_optim.backends.operands import BiasCorrection
from sparse_optim.backends.registry import BackendName
from sparse_optim.optim.attach import can_sample
from sparse_optim.optim.masked_adamw import MaskedAdamW
from sparse_optim.optim.param_groups import Competes, competing
from sparse_optim.policy.defaults import RANK, UNMASK_SHARE
from sparse_optim.policy.importance import Importance
from sparse_optim.policy.schedule import Schedule, Uniform
from sparse_optim.policy.selection import Selection


@dataclass(frozen=True)
class MethodRequest:
    """The input from which a method builds its optimizer.

    Args:
        model: the model to train, as the training loop calls it.
        named: (name, parameter) pairs, in the model's order, tied weights once.
        fresh: names of parameters to train densely, outside the budget (a new classifier head).
        rank: which of the others compete for the budget, as in `param_groups`; the rest is frozen.
        no_decay: names of parameters without weight decay (biases, norms).
        lr, head_lr: learning rates of the pretrained and of the fresh parameters.
        budget: entries (int) or share of the ranked entries (float); None: the method's default.
        total_steps: optimizer steps of the run.
        schedule, unmask_share: for methods that unmask step by step: the spread of the budget over
            the steps, and the share of the run in which it is spent (1.0: ID3's paper).
        bias_correction: as in `MaskedAdamW`.
        max_grad_norm: clip gradients to this norm; None: no clipping.
        calibration: returns batches, for methods that score entries before training.
        sparse_score: for "sparse-adapter", a key of `SPARSE_SCORES`.
        fuse_backward: as in `MaskedAdamW`.
        every: for methods that unmask step by step: as in `IncrementalMaskedAdamW`.
        sampled_backward: as in `MaskedAdamW`; None: where the method and the model allow it.
        seed: for methods that draw entries.
    """

    model: nn.Module
    named: list[tuple[str, nn.Parameter]]
    fresh: frozenset[str] = frozenset()
    rank: str | Competes = RANK
    no_decay: frozenset[str] = frozenset()
    lr: float = 5e-4
    head_lr: float = 5e-4
    betas: tuple[float, float] = (0.9, 0.999)
    adam_eps: float = 1e-8
    weight_decay: float = 0.0
    budget: int | float | None = None
    total_steps: int = 1
    d3_exp: float = 0.0
    d3_eps: float = 1.0
    schedule: Schedule = field(default_factory=Uniform)
    unmask_share: float = UNMASK_SHARE
    bias_correction: BiasCorrection = "entry"
    max_grad_norm: float | None = None
    backend: BackendName = "auto"
    calibration: Callable[[], Iterable[Any]] | None = None
    sparse_score: str = "snip"
    fuse_backward: bool = False
    every: int | None = None
    sampled_backward: bool | None = False
    seed: int = 0

    @property
    def ranked(self) -> list[tuple[str, nn.Parameter]]:
        """The parameters that compete for the budget."""
        competes = competing(self.model, self.rank)
        return [
            (name, param)
            for name, param in self.named
            if name not in self.fresh and competes(name, param)
        ]

    @property
    def given_budget(self) -> int | float:
        """The budget; a ValueError if none was given."""
        if self.budget is None:
            raise ValueError("this method needs a budget: entries (int) or a share (float)")
        return self.budget

    def param_groups(self, named: Iterable[tuple[str, nn.Parameter]]) -> list[dict[str, Any]]:
        """Param groups by learning rate and weight decay; no group is empty."""
        groups: dict[tuple[float, float], dict[str, Any]] = {}
        for name, param in named:
            lr = self.head_lr if name in self.fresh else self.lr
            decay = 0.0 if name in self.no_decay else self.weight_decay
            group = groups.setdefault((lr, decay), {"params": [], "lr": lr, "weight_decay": decay})
            group["params"].append((name, param))
        return list(groups.values())


def masked_adamw(
    request: MethodRequest, importance: Importance, selection: Selection
) -> MaskedAdamW:
    """A MaskedAdamW that ranks the parameters that compete, and trains fresh ones densely.

    All others no longer require gradients.

    Raises:
        ValueError: there is nothing to rank.
    """
    if not request.ranked:
        raise ValueError(
            f"the pool is empty: rank={request.rank!r} leaves no parameter that is not fresh "
            "(--dense), so the budget would not be used; take 'all' (--rank all), name others, or "
            "use the method 'full'"
        )
    train_only(request, {name for name, _ in request.ranked} | request.fresh)
    sampled = samples(request) and not (selection.replaces and request.sampled_backward is None)
    return MaskedAdamW(
        ranked_groups(request),
        request.lr,
        request.betas,
        request.adam_eps,
        request.weight_decay,
        importance=importance,
        selection=selection,
        max_grad_norm=_clip_norm(request, sampled),
        norm=None if selection.replaces else "active",
        bias_correction=request.bias_correction,
        backend=request.backend,
        fuse_backward=request.fuse_backward,
        model=request.model,
        sampled_backward=sampled,
    )


def samples(request: MethodRequest) -> bool:
    """Whether quiet steps compute the weight gradients of active entries alone."""
    if request.sampled_backward is not None:
        return request.sampled_backward
    return can_sample(request.model, [param for _, param in request.ranked])


def _clip_norm(request: MethodRequest, sampled: bool) -> float | None:
    """The norm to clip to; inf says that no clipping is intended, where None would warn."""
    if request.max_grad_norm is None and (request.fuse_backward or sampled):
        return math.inf
    return request.max_grad_norm


def check_whole_gradients(request: MethodRequest) -> None:
    """Raise ValueError if gradients are to be freed inside the backward pass."""
    if request.fuse_backward:
        raise ValueError(
            "this method uses torch.optim.AdamW, which needs whole gradients: drop fuse_backward"
        )


def dense_adamw(
    request: MethodRequest, chosen: Iterable[tuple[str, nn.Parameter]]
) -> torch.optim.AdamW:
    """torch's fused AdamW on the chosen parameters; the others no longer require gradients.

    Raises:
        ValueError: gradients are to be freed inside the backward pass.
    """
    check_whole_gradients(request)
    chosen = list(chosen)
    train_only(request, {name for name, _ in chosen})
    return torch.optim.AdamW(
        request.param_groups(chosen), request.lr, request.betas, request.adam_eps, fused=True
    )


def train_only(request: MethodRequest, names: Collection[str]) -> None:
    """Let only these parameters require gradients."""
    for name, param in request.named:
        param.requires_grad_(name in names)


def ranked_groups(request: MethodRequest) -> list[dict[str, Any]]:
    """Param groups: parameters to rank, fresh ones to train densely."""
    fresh = [item for item in request.named if item[0] in request.fresh]
    ranked = [{**group, "unmask": "rank"} for group in request.param_groups(request.ranked)]
    return ranked + [{**group, "unmask": "all"} for group in request.param_groups(fresh)]

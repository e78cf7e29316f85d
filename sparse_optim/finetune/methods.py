"""Fine-tuning methods by name: each builds an optimizer for a model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sparse_optim import D3, IncrementalMaskedAdamW, MaskedAdamW, Static
from sparse_optim.delta import Delta
from sparse_optim.finetune.errors import FinetuneError


@dataclass(frozen=True)
class OptimizerRequest:
    """What a method may need to build its optimizer.

    Args:
        named: (name, parameter), in the model's order, tied weights once.
        fresh: names trained densely, outside the budget.
        no_decay: names that weight decay leaves alone (biases, norms).
        lr, head_lr: learning rates of the pretrained and of the fresh parameters.
        budget: entries (int) or share of the ranked entries (float).
        total_steps: optimizer steps of the run, from the trainer.
        max_grad_norm: clip at this norm; 0 leaves gradients alone.
    """

    named: list[tuple[str, nn.Parameter]]
    fresh: frozenset[str]
    no_decay: frozenset[str]
    lr: float
    head_lr: float
    betas: tuple[float, float]
    adam_eps: float
    weight_decay: float
    budget: int | float
    total_steps: int
    d3_exp: float
    d3_eps: float
    max_grad_norm: float
    backend: str


def group(request: OptimizerRequest, fresh: bool, decays: bool) -> dict[str, Any]:
    """The parameters of one kind, as a param group."""
    params = [
        (name, param)
        for name, param in request.named
        if (name in request.fresh) == fresh and (name not in request.no_decay) == decays
    ]
    return {
        "params": params,
        "lr": request.head_lr if fresh else request.lr,
        "weight_decay": request.weight_decay if decays else 0.0,
    }


def groups(request: OptimizerRequest, fresh: bool) -> list[dict[str, Any]]:
    """Param groups of the fresh or of the pretrained parameters; one group where decay is 0."""
    if request.weight_decay == 0:
        request_without = OptimizerRequest(**{**vars(request), "no_decay": frozenset()})
        found = [group(request_without, fresh, decays=True)]
    else:
        found = [group(request, fresh, decays) for decays in (True, False)]
    return [group for group in found if group["params"]]


def ranked_groups(request: OptimizerRequest) -> list[dict[str, Any]]:
    """Pretrained parameters to be ranked, fresh ones to be trained densely."""
    ranked = [{**group, "unmask": "rank"} for group in groups(request, fresh=False)]
    return ranked + [{**group, "unmask": "all"} for group in groups(request, fresh=True)]


def id3(request: OptimizerRequest) -> torch.optim.Optimizer:
    """D3 importance, unmasked step by step."""
    return IncrementalMaskedAdamW(
        ranked_groups(request),
        lr=request.lr,
        betas=request.betas,
        eps=request.adam_eps,
        weight_decay=request.weight_decay,
        budget=request.budget,
        total_steps=request.total_steps,
        importance=D3(exp=request.d3_exp, eps=request.d3_eps),
        max_grad_norm=request.max_grad_norm or None,
        backend=request.backend,
    )


def static_d3(request: OptimizerRequest) -> torch.optim.Optimizer:
    """D3 importance, the whole budget at the first step."""
    return MaskedAdamW(
        ranked_groups(request),
        lr=request.lr,
        betas=request.betas,
        eps=request.adam_eps,
        weight_decay=request.weight_decay,
        importance=D3(exp=request.d3_exp, eps=request.d3_eps),
        selection=Static(request.budget),
        max_grad_norm=request.max_grad_norm or None,
        backend=request.backend,
    )


def full(request: OptimizerRequest) -> torch.optim.Optimizer:
    """torch's fused AdamW on every entry."""
    return dense_adamw(request, groups(request, fresh=False) + groups(request, fresh=True))


def frozen(request: OptimizerRequest) -> torch.optim.Optimizer:
    """torch's fused AdamW on the fresh head; nothing else moves, nor needs a gradient."""
    if not request.fresh:
        raise FinetuneError(
            "method 'frozen' trains only a fresh head, and this model has none; use id3 or full"
        )
    for name, param in request.named:
        param.requires_grad_(name in request.fresh)
    return dense_adamw(request, groups(request, fresh=True))


def dense_adamw(
    request: OptimizerRequest, param_groups: list[dict[str, Any]]
) -> torch.optim.Optimizer:
    """AdamW as torch has it."""
    return torch.optim.AdamW(
        param_groups, lr=request.lr, betas=request.betas, eps=request.adam_eps, fused=True
    )


@dataclass(frozen=True)
class Method:
    """A way to fine-tune.

    Args:
        build: makes the optimizer.
        lr: learning rate that suits it, for a user who gives none.
        about: for the help.
        has_budget: whether `budget` means anything to it.
        clips: whether the optimizer clips by itself (else the trainer does).
    """

    build: Callable[[OptimizerRequest], torch.optim.Optimizer]
    lr: float
    about: str
    has_budget: bool = False
    clips: bool = False


METHODS = {
    "id3": Method(id3, 5e-4, "ID3: budget unmasked step by step", has_budget=True, clips=True),
    "static-d3": Method(
        static_d3, 5e-4, "top budget of D3 at step 1, then fixed", has_budget=True, clips=True
    ),
    "full": Method(full, 5e-5, "every entry, torch.optim.AdamW"),
    "frozen": Method(frozen, 1e-2, "fresh head only"),
}


def active_entries(optimizer: torch.optim.Optimizer) -> int:
    """Entries that training may have moved so far, the fresh head included."""
    if isinstance(optimizer, MaskedAdamW):
        dense: int = sum(
            param.numel()
            for group in optimizer.param_groups
            if group["unmask"] == "all"
            for param in group["params"]
        )
        return int(optimizer.metrics()["active"]) + dense
    return sum(param.numel() for group in optimizer.param_groups for param in group["params"])


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of the optimizer's state, scratch memory included where the optimizer counts it."""
    if isinstance(optimizer, MaskedAdamW):
        return int(optimizer.metrics()["state_bytes"])
    tensors = (
        value
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, Tensor)
    )
    return sum(tensor.nbytes for tensor in tensors)


def make_delta(optimizer: torch.optim.Optimizer, model: nn.Module) -> Delta:
    """What training changed: active entries, or for a dense optimizer its tensors whole."""
    if isinstance(optimizer, MaskedAdamW):
        return optimizer.delta(model)
    trained = {id(param) for group in optimizer.param_groups for param in group["params"]}
    dense = {
        name: param.detach() for name, param in model.named_parameters() if id(param) in trained
    }
    return Delta(sparse={}, dense=dense)

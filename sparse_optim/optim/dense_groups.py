"""Groups with unmask="all": torch's own fused AdamW, on the clip and skip signals of our scan."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from sparse_optim.engine.blocks import local_of
from sparse_optim.engine.pool import changed


@dataclass(frozen=True)
class DensePart:
    """What one group's step needs: all memory, so that nothing can fail half-way.

    Attributes:
        gradients: with their parameters' strides.
        scaled: memory for the clipped gradients; empty where nothing scales them.
        fused: whether torch's fused kernel takes the step.
    """

    group: dict[str, Any]
    params: list[Tensor]
    gradients: list[Tensor]
    scaled: list[Tensor]
    states: list[dict[str, Tensor]]
    fused: bool


def plan_dense_step(
    optimizer: torch.optim.Optimizer,
    grads: Sequence[Tensor],
    is_scaled: bool,
    shard_invariant: bool,
) -> list[DensePart]:
    """Allocate what a step on the groups with unmask="all" needs; no parameter or moment moves.

    Args:
        optimizer: whose `param_groups` and `state` are used as torch.optim.AdamW uses them.
        grads: gradients of those parameters in order; an empty one skips its parameter.
        is_scaled: whether a factor will multiply the gradients.
        shard_invariant: whether shards are to be rounded as whole tensors are. On CPUs the fused
            kernel rounds the last entries of a tensor otherwise than those before: another one
            then takes the step, which needs some memory of its own.

    Raises:
        RuntimeError: a parameter no longer fits its moments: the kernel would write beyond it.
    """
    remaining, parts = iter(grads), []
    for group in optimizer.param_groups:
        if group["unmask"] != "all":
            continue
        pairs = [(param, next(remaining)) for param in group["params"]]
        pairs = [(param, grad) for param, grad in pairs if param.grad is not None]
        if not pairs:
            continue
        states = [
            {name: local_of(value) for name, value in optimizer.state[param].items()}
            for param, _ in pairs
        ]
        _check_unchanged(group, {id(param): s for (param, _), s in zip(pairs, states, strict=True)})
        params = [local_of(param) for param, _ in pairs]
        gradients = [
            _laid_out_as(param, grad) for param, (_, grad) in zip(params, pairs, strict=True)
        ]
        scaled = [torch.empty_like(grad) for grad in gradients] if is_scaled else []
        fused = not (shard_invariant and params[0].device.type == "cpu")
        parts.append(DensePart(group, params, gradients, scaled, states, fused))
    return parts


def take_dense_step(parts: Sequence[DensePart], grad_factor: Tensor, found_inf: Tensor) -> None:
    """Take one torch.optim.AdamW step.

    Args:
        parts: of `plan_dense_step`.
        grad_factor: (), float32, multiplies a copy of the gradients where the plan says so.
        found_inf: (), float32; 1 skips the step.
    """
    for part in parts:
        if not part.fused and bool(found_inf):
            continue
        if part.scaled:
            torch._foreach_copy_(part.scaled, part.gradients)
            torch._foreach_mul_(part.scaled, grad_factor)
        group = part.group
        adamw(
            part.params,
            part.scaled or part.gradients,
            [state["exp_avg"] for state in part.states],
            [state["exp_avg_sq"] for state in part.states],
            [],
            [state["step"] for state in part.states],
            fused=part.fused,
            foreach=not part.fused,
            found_inf=found_inf if part.fused else None,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=group["maximize"],
        )


def _check_unchanged(group: dict[str, Any], states: dict[int, dict[str, Tensor]]) -> None:
    names = group.get("param_names") or ["a densely trained parameter"] * len(group["params"])
    for param, name in zip(group["params"], names, strict=True):
        if (state := states.get(id(param))) is None:
            continue
        param, moment = local_of(param), state["exp_avg"]
        same = param.shape == moment.shape and param.dtype == moment.dtype
        if not same or param.device != moment.device or param.stride() != moment.stride():
            raise changed(name, param, moment.shape, moment.dtype, moment.device)


def _laid_out_as(param: Tensor, grad: Tensor) -> Tensor:
    """The gradient with its parameter's strides: the fused kernel walks both by address."""
    if grad.stride() == param.stride():
        return grad
    return torch.empty_like(param, dtype=grad.dtype).copy_(grad)


def start_dense(param: Tensor) -> dict[str, Tensor]:
    """State of a parameter before its first step, as torch.optim.AdamW(fused=True) makes it."""
    return {
        "step": torch.zeros((), dtype=torch.float32, device=param.device),
        "exp_avg": torch.zeros_like(param, memory_format=torch.preserve_format),
        "exp_avg_sq": torch.zeros_like(param, memory_format=torch.preserve_format),
    }

"""Groups with unmask="all": torch's own fused AdamW, on the clip and skip signals of our scan."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.optim.adamw import adamw


def dense_adamw_step(
    optimizer: torch.optim.Optimizer,
    grads: Sequence[Tensor],
    grad_factor: Tensor | None,
    found_inf: Tensor,
) -> None:
    """Take one torch.optim.AdamW step on the parameters of every group with unmask="all".

    Args:
        optimizer: whose `param_groups` and `state` are used as torch.optim.AdamW uses them.
        grads: gradients of those parameters in order; an empty one skips its parameter.
        grad_factor: (), float32, multiplies a copy of the gradients; None leaves them as they are.
        found_inf: (), float32; 1 skips the step.
    """
    remaining = iter(grads)
    for group in optimizer.param_groups:
        if group["unmask"] != "all":
            continue
        pairs = [(param, next(remaining)) for param in group["params"]]
        pairs = [(param, grad) for param, grad in pairs if param.grad is not None]
        if not pairs:
            continue
        params = [param for param, _ in pairs]
        gradients = [_laid_out_as(param, grad) for param, grad in pairs]
        if grad_factor is not None:
            gradients = list(torch._foreach_mul(gradients, grad_factor))
        states = [optimizer.state[param] or _start(optimizer, param) for param in params]
        adamw(
            params,
            gradients,
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state["step"] for state in states],
            fused=True,
            found_inf=found_inf,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=group["maximize"],
        )


def _laid_out_as(param: Tensor, grad: Tensor) -> Tensor:
    """The gradient with its parameter's strides: the fused kernel walks both by address."""
    if grad.stride() == param.stride():
        return grad
    return torch.empty_like(param, dtype=grad.dtype).copy_(grad)


def _start(optimizer: torch.optim.Optimizer, param: Tensor) -> dict[str, Tensor]:
    """State of a parameter before its first step, as torch.optim.AdamW(fused=True) makes it."""
    state = optimizer.state[param]
    state["step"] = torch.zeros((), dtype=torch.float32, device=param.device)
    state["exp_avg"] = torch.zeros_like(param, memory_format=torch.preserve_format)
    state["exp_avg_sq"] = torch.zeros_like(param, memory_format=torch.preserve_format)
    return state

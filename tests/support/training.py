"""Small models and gradients for tests of the optimizer, and what they read of it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from op_cases import random_values
from torch import Tensor
from torch.nn import Parameter

from sparse_optim import MaskedAdamW


def new_params(
    *shapes: tuple[int, ...], dtype: torch.dtype = torch.float32, seed: int = 0
) -> list[Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes]


def snapshot(params: Sequence[Tensor]) -> list[Tensor]:
    return [param.detach().clone() for param in params]


def trained_params(optimizer: MaskedAdamW) -> list[Tensor]:
    """Every parameter that the optimizer moves, in the order of the groups."""
    groups = (group for group in optimizer.param_groups if group["unmask"] != "none")
    return [param for group in groups for param in group["params"]]


def set_grads(params: Sequence[Tensor], value: float) -> None:
    for param in params:
        param.grad = torch.full_like(param, value)


def active_of(optimizer: MaskedAdamW) -> set[tuple[str, int]]:
    return {
        (name, int(position))
        for name, positions in optimizer.active_entries().items()
        for position in positions
    }


def dense_moments(optimizer: MaskedAdamW) -> list[Tensor]:
    """State of the parameters that are trained densely, as torch.optim.AdamW has it."""
    names = ("step", "exp_avg", "exp_avg_sq")
    return [state[name] for state in optimizer.state.values() for name in names if name in state]


def everything(optimizer: MaskedAdamW) -> list[Tensor]:
    """All that a skipped step must not move."""
    active = optimizer.engine.active
    fields = ("position", "exp_avg", "exp_avg_sq", "unmask_step", "master", "offsets")
    held = (
        [getattr(active, name) for name in fields]
        + [active.progress[:2]]
        + dense_moments(optimizer)
    )
    return [value.clone() for value in held] + snapshot(trained_params(optimizer))


def give_grads(
    params: Sequence[Tensor], kind: str, generator: torch.Generator, missing: float = 0.0
) -> list[Tensor | None]:
    """Random gradients, set on the parameters and returned."""
    for param in params:
        param.grad = None
        if not missing or torch.rand((), generator=generator) >= missing:
            grad = random_values(param.numel(), param.dtype, kind, generator)
            param.grad = grad.view(param.shape)
    return [param.grad for param in params]

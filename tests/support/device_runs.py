"""Runs of a whole optimizer on any backend and device, on the same gradients."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from op_cases import random_values
from torch import Tensor
from torch.nn import Parameter
from training import dense_moments

from sparse_optim import D3, IncrementalMaskedAdamW, MaskedAdamW

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
# Ranked: several tiles of 4096, an empty tensor, one entry. Dense: the last two.
SHAPES = ((130, 70), (4097,), (0,), (1,), (3, 4096), (33, 5), (17,))
PARAM_DTYPES = (F32, BF16, F32, F16, BF16, F32, BF16)
DENSE = 2
BUDGET, STEPS = 1500, 40  # ten of the fifty steps come after the schedule's end
OVERFLOWS = (11, 30)


def _gradients() -> list[list[Tensor]]:
    generator = torch.Generator().manual_seed(7)
    steps = []
    for number in range(50):
        kind = ("normal", "ties", "rows")[number % 3]
        grads = [
            random_values(torch.Size(shape).numel(), dtype, kind, generator).view(shape)
            for shape, dtype in zip(SHAPES, PARAM_DTYPES, strict=True)
        ]
        if number in OVERFLOWS:
            grads[number % 2].view(-1)[number] = float("nan")
        steps.append(grads)
    return steps


GRADS = _gradients()


@dataclass
class Run:
    """An optimizer and its parameters on a device."""

    optimizer: MaskedAdamW
    params: list[Parameter]
    taken: int = 0  # steps, of which the learning rate depends

    def positions(self) -> list[Tensor]:
        return [positions.cpu() for positions in self.optimizer.active_entries().values()]

    def everything(self) -> list[Tensor]:
        """State, counts, dense moments and weights, on the CPU."""
        active = self.optimizer.engine.active
        tensors = [
            *vars(active).values(),
            *dense_moments(self.optimizer),
            *self.params,
            self.optimizer.engine.work.new.threshold,
        ]
        return [tensor.detach().cpu().clone() for tensor in tensors]


def build(backend: str, device: str | torch.device) -> MaskedAdamW:
    """The smallest optimizer there is."""
    with warnings.catch_warnings():  # "auto" may have to say that nothing compiled is there
        warnings.simplefilter("ignore", RuntimeWarning)
        return IncrementalMaskedAdamW(
            [Parameter(torch.ones(4, device=device))],
            budget=1,
            total_steps=1,
            backend=backend,
            unmask_steps=1.0,
        )


def new_run(
    backend: str,
    device: str | torch.device,
    *,
    exp: float = 0.0,
    lr: float | Tensor = 0.01,
    params: Sequence[Tensor] | None = None,
    missing: bool = True,
    instead: Mapping[torch.dtype, torch.dtype] = MappingProxyType({}),
    **options: Any,
) -> Run:
    """The same start on every device; `params` continues from these values instead.

    Without `missing` gradients keep their memory from step to step, as a captured graph asks.
    `instead` gives dtypes in the place of others.
    """
    generator = torch.Generator().manual_seed(3)
    start = [
        torch.randn(shape, generator=generator).to(instead.get(dtype, dtype))
        for shape, dtype in zip(SHAPES, PARAM_DTYPES, strict=True)
    ]
    values = start if params is None else [param.detach().cpu() for param in params]
    own = [Parameter(value.clone().to(device)) for value in values]
    optimizer = IncrementalMaskedAdamW(
        [{"params": own[:2]}, {"params": own[2:-DENSE], "betas": (0.8, 0.95), "maximize": True},
         {"params": own[-DENSE:], "unmask": "all"}],
        lr=lr, budget=BUDGET, total_steps=STEPS, importance=D3(exp=exp, eps=0.01),
        max_grad_norm=1.0, backend=backend, **options, unmask_steps=1.0,
    )  # fmt: skip
    return Run(optimizer, own)


def give(run: Run, grads: Sequence[Tensor], scale: float = 1.0, missing: bool = True) -> None:
    """Set the gradients: anew, a third of them missing in turn; or in the memory they have."""
    for index, (param, grad) in enumerate(zip(run.params, grads, strict=True)):
        value = (grad * scale).to(param)
        if not missing and param.grad is not None:
            param.grad.copy_(value)
        elif missing and int(grad.float().nan_to_num().abs().sum() * 8) % 3 == index % 3:
            param.grad = None
        else:
            param.grad = value


def train(run: Run, steps: Sequence[Sequence[Tensor]], missing: bool = True) -> Run:
    """Take a step on each set of gradients, under a schedule of the learning rate."""
    for grads in steps:
        give(run, grads, missing=missing)
        for group in run.optimizer.param_groups:
            if not isinstance(group["lr"], Tensor):
                group["lr"] = 0.01 / (1 + run.taken // 10)
        run.optimizer.step()
        run.taken += 1
    return run


def assert_same_run(run: Run, expected: Run) -> None:
    """Fifty steps: the same selection and counts after each ten, weights within rounding."""
    for first in range(0, len(GRADS), 10):
        for each in (run, expected):
            train(each, GRADS[first : first + 10])
        for got, want in zip(run.positions(), expected.positions(), strict=True):
            assert torch.equal(got, want)
        for name in ("step", "active", "skipped_steps", "budget_left"):
            assert run.optimizer.metrics()[name] == expected.optimizer.metrics()[name], name
    assert run.optimizer.metrics()["skipped_steps"] >= 1
    assert run.optimizer.metrics()["active"] > 0.9 * BUDGET
    for got, want in zip(run.params, expected.params, strict=True):
        # Fifty updates of at most 3 lr, each with a handful of float32 roundings; values that are
        # rounded to 16 bits may end one unit apart.
        unit = 1e-5 if want.dtype == F32 else 2 * torch.finfo(want.dtype).eps
        torch.testing.assert_close(got.detach().cpu(), want.detach(), rtol=unit, atol=1e-5)

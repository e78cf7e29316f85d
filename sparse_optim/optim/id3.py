"""IncrementalMaskedAdamW: ID3, in place of torch.optim.AdamW."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from sparse_optim.backends.operands import BiasCorrection
from sparse_optim.backends.registry import BackendName
from sparse_optim.engine.engine import Norm
from sparse_optim.optim.masked_adamw import MaskedAdamW
from sparse_optim.policy.defaults import UNMASK_SHARE, default_every
from sparse_optim.policy.importance import D3
from sparse_optim.policy.schedule import Linear, Schedule, Uniform
from sparse_optim.policy.selection import Increment, steps_of


class IncrementalMaskedAdamW(MaskedAdamW):
    """Fine-tune `budget` entries of a model, unmasked step by step (ID3).

        importance D3 = |grad| / (|param| + eps)^exp, ranked over the whole model at each step;
        the most important frozen entries become active until `budget` is spent, by default in a
        fifth of the run.

    Use about ten times the learning rate of full fine-tuning: 1e-4 to 7e-4 in the paper, for 184M
    to 7B parameters; 1e-3 to 2e-3 for a small encoder (docs/learning-rates.md).

    Args:
        params, lr, betas, eps, weight_decay, amsgrad: as in torch.optim.AdamW; see `MaskedAdamW`
            for the `unmask` option of param groups.
        budget: entries that may ever be active (int), or share of the pool (float).
        total_steps: optimizer steps of the whole run.
        importance: exp and eps of D3.
        schedule: `Uniform()`, `Linear()`, `Warmup(share, steps)`, or a function that maps a step to
            the number of entries unmasked so far.
        unmask_steps: spend the budget in this many first steps (int), or in this share of the run
            (float): 1 is the first step, 1.0 the whole run, as in the paper. Default: 0.2, but 1.0
            for a `Warmup` or a function, which say themselves when the budget is spent.
        every: unmask only at every N-th call; see `Increment`. Default: 1, as in the paper; with
            `sampled_backward=True` 16, or fewer so that at least four steps unmask something.
        max_grad_norm, norm, bias_correction, backend, maximize: as in `MaskedAdamW`.
        foreach, capturable, differentiable, fused, fuse_backward: as in `MaskedAdamW`.
        model, sampled_backward, shard_invariant: as in `MaskedAdamW`.

    Examples:
        >>> import torch
        >>> model = torch.nn.Linear(8, 2)
        >>> optimizer = IncrementalMaskedAdamW(
        ...     model.named_parameters(), lr=3e-4, budget=4, total_steps=2
        ... )
        >>> for _ in range(2):
        ...     model(torch.ones(1, 8)).sum().backward()
        ...     optimizer.step()
        ...     optimizer.zero_grad()
        >>> optimizer.metrics()["active"]
        4

    Reference: Agarwal et al. 2025, Step-by-Step Unmasking, TACL 13:1767-1788, Algorithm 1.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        budget: int | float,
        total_steps: int,
        importance: D3 = D3(exp=0.0, eps=1.0),
        schedule: Schedule | Callable[[int], int] = Uniform(),
        unmask_steps: int | float | None = None,
        every: int | None = None,
        max_grad_norm: float | None = None,
        norm: Norm | None = None,
        bias_correction: BiasCorrection = "entry",
        backend: BackendName = "auto",
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        fuse_backward: bool = False,
        model: nn.Module | None = None,
        sampled_backward: bool = False,
        shard_invariant: bool = False,
    ) -> None:
        if unmask_steps is None:
            unmask_steps = UNMASK_SHARE if isinstance(schedule, (Uniform, Linear)) else 1.0
        if every is None:
            every = default_every(steps_of(unmask_steps, total_steps), sampled_backward)
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            amsgrad,
            importance=importance,
            selection=Increment(budget, total_steps, schedule, unmask_steps, every),
            max_grad_norm=max_grad_norm,
            norm=norm,
            bias_correction=bias_correction,
            backend=backend,
            maximize=maximize,
            foreach=foreach,
            capturable=capturable,
            differentiable=differentiable,
            fused=fused,
            fuse_backward=fuse_backward,
            model=model,
            sampled_backward=sampled_backward,
            shard_invariant=shard_invariant,
        )

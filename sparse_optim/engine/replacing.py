"""A fresh active set at each step, for `Repeat` and `Stochastic`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from sparse_optim.optim.masked_adamw import MaskedAdamW


def replace_active_set(
    optimizer: MaskedAdamW, bound: Any, grads: list[Tensor], dense_grads: Sequence[Tensor]
) -> None:
    """Rank all entries anew into a fresh set; those of the last one keep their state."""
    before, optimizer._active = optimizer._active, optimizer._spare
    optimizer._active.clear(before.progress)
    try:
        optimizer._scan(bound, dense_grads)
        optimizer._cut(bound, grads)
        optimizer._append(bound)
    except BaseException:
        optimizer._active = before
        raise
    if optimizer._work.found_inf:
        optimizer._active = before
        return
    sizes = torch.tensor([param.numel() for param in optimizer._pool], device=optimizer._device)
    optimizer._active.carry_over(before, sizes)
    optimizer._touched.add(optimizer._active.global_index(sizes))
    optimizer._spare = before

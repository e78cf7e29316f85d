"""Buffers of an optimizer: allocated, refreshed, moved to another pool, budget or schedule."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from itertools import accumulate
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sparse_optim.backends.operands import ActiveSet, WorkSpace, max_quota
from sparse_optim.backends.scoring import tile_abs_max
from sparse_optim.engine.fused_backward import InBackward
from sparse_optim.engine.ranking import Ranking, needs_param_bound
from sparse_optim.policy.importance import Scores
from sparse_optim.policy.selection import Increment, resolve_budget

if TYPE_CHECKING:
    from sparse_optim.optim.masked_adamw import MaskedAdamW


def allocate(optimizer: MaskedAdamW) -> None:
    """(Re)build the work space for the pool, the targets and the capacity at hand."""
    ops, pool, active = optimizer._ops, optimizer._pool, optimizer._active
    capacity = active.position.numel()
    quota = max_quota(optimizer._targets, capacity)
    tiles = (-(-param.numel() // ops.TILE) for param in pool)
    optimizer._first_tile = [0, *accumulate(tiles)]  # of each tensor, known to the host
    optimizer._work = WorkSpace.empty(
        pool, len(optimizer._dense), optimizer._group_index, len(optimizer.param_groups), capacity,
        quota, ops.TILE,
        needs_param_bound(optimizer.importance, optimizer.selection),
        ops.scratch_bytes(optimizer._first_tile[-1], capacity, quota), optimizer._device,
    )  # fmt: skip
    optimizer._hyper = []  # nothing there yet
    optimizer._ranking = Ranking.empty(optimizer.importance, optimizer.selection, optimizer._work)
    spare = capacity if optimizer.selection.replaces else 0
    optimizer._spare = ActiveSet.empty(pool, spare, optimizer._device)
    if isinstance(optimizer.importance, Scores):
        optimizer.importance.check_names(optimizer._names)
    refresh(optimizer, range(len(pool)))
    if optimizer._in_backward is not None:
        optimizer._in_backward.detach()
        optimizer._in_backward = InBackward(optimizer)


@torch.no_grad()
def refresh(optimizer: MaskedAdamW, indices: Iterable[int]) -> None:
    """Take over the values of these tensors of the pool."""
    bound = optimizer._work.param_bound
    for index in indices:
        param = optimizer._pool[index]
        if bound.numel():
            first, last = optimizer._first_tile[index : index + 2]
            bound[first:last] = tile_abs_max(param, optimizer._ops.TILE)
        state = optimizer._active.segment(index)
        if "master" in state:
            value = param.view(-1)[state["position"].long()]
            stale = state["master"].to(param.dtype) != value
            state["master"][stale] = value[stale].float()
    optimizer._versions = [param._version for param in optimizer._pool]


def extend(optimizer: MaskedAdamW, budget: int | float | None, total_steps: int | None) -> None:
    """See `MaskedAdamW.extend`."""
    current = int(optimizer._targets[-1]), optimizer._targets.numel() - 1
    selection = replace(optimizer.selection, budget=current[0] if budget is None else budget)
    if isinstance(selection, Increment):
        steps = current[1] if total_steps is None else total_steps
        selection = replace(selection, total_steps=steps)
    elif total_steps is not None:
        raise ValueError("a static selection has no total_steps; give only budget")
    entries = resolve_budget(selection.budget, optimizer._pool_size())
    num_active = int(optimizer._active.progress[1])
    if entries < num_active:
        raise ValueError(f"budget {entries} is below the {num_active} entries already active")
    optimizer._check_idle("extend()")
    reallocate(optimizer, selection.targets(entries), moved(optimizer, entries))
    optimizer.selection = selection


def moved(optimizer: MaskedAdamW, capacity: int) -> ActiveSet:
    """The active entries, copied into buffers for the pool at hand or another capacity."""
    pool, active = optimizer._pool, optimizer._active
    segments = [active.segment(index) for index in range(len(pool))]
    for param, segment in zip(pool, segments, strict=True):
        values = param.detach().view(-1)[segment["position"].long()]
        segment.setdefault("master", values.float())
    grown = ActiveSet.empty(pool, capacity, optimizer._device)
    grown.fill(segments, active.progress)
    return grown


def reallocate(optimizer: MaskedAdamW, targets: Tensor, active: ActiveSet) -> None:
    """Adopt a schedule table and an active set; out of memory, all stays as it was."""
    before = dict(vars(optimizer))
    try:
        optimizer._active, optimizer._targets = active, targets.to(optimizer._device)
        allocate(optimizer)
    except BaseException:
        vars(optimizer).update(before)
        raise

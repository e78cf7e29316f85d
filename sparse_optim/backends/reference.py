"""The specification: one optimizer step as a few operations in plain torch.

    bind    this step's gradients and parameters, checked, in the form that the others take
    scan    tile_max[j] <- max |grad| over the frozen entries of tile j;  norms, found_inf
    clip    what `update` multiplies gradients by, from the norms of all of them
    rank    tile_max[j] <- max score over the frozen entries of tile j, for importances that give
            dense scores, and for sampling; D3 needs it not
    cut     the `quota` frozen entries of greatest importance |grad| / (|param| + eps)^exp
    append  those entries join the active set, with zero moments
    update  AdamW over the active entries alone

Every backend offers these functions with these signatures, and is tested against this file.
Selections are equal to it bit for bit; moments and parameters are equal up to fp32 rounding.

Notation: S tensors are ranked together (the pool). A global index counts their entries one tensor
after the other, in C order. A tile is a run of `tile` consecutive entries of one tensor (the last
of a tensor may be shorter); tile_offsets[i] is the first tile of tensor i. The active set holds
at most `capacity` entries in ascending global order: those of tensor i stand at
offsets[i]:offsets[i + 1], and `position` is their flat position within the tensor. A gradient that
is missing in this step is passed as an empty tensor.

Scores stand in the place of gradients in `rank` and in the `cut` after it (bound from the scores;
exp = 0). With noise, entries are sampled without replacement: see `sparse_optim.backends.noise`.

This backend is also what runs where no compiled one is available: exact, but dense in its work.

Reference: Agarwal et al. 2025, Step-by-Step Unmasking, TACL 13:1767-1788, Algorithm 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sparse_optim.backends.clip import clip as clip
from sparse_optim.backends.clip import tensor_norm
from sparse_optim.backends.scoring import importance, importance_key, perturbed, tiles_of
from sparse_optim.policy.schedule import step_quota

TILE = 512
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
INFINITY_BITS = 0x7F800000
INDEX_BITS = 33
LAST_INDEX = 2**INDEX_BITS - 1
KEY_MIDDLE = 2**30


def scratch_bytes(num_tiles: int, capacity: int, max_quota: int) -> int:
    """Bytes of scratch memory that the operations need besides their arguments: none here."""
    return 0


class Bound(NamedTuple):
    """What `bind` returns here; compiled backends return a table of pointers instead."""

    grads: Sequence[Tensor]
    params: Sequence[Tensor]


def bind(grads: Sequence[Tensor], params: Sequence[Tensor], table: Tensor) -> Bound:
    """Check this step's tensors, once for all operations.

    Args:
        grads: S gradients of the pool, contiguous, float32 | bfloat16 | float16; empty if missing.
        params: S parameters, contiguous, the same dtypes.
        table: (S, 4), int64, room for what compiled backends note of them. Unused here.

    Returns:
        `bound` of the other operations. Valid while the tensors live and keep their memory.

    Raises:
        ValueError, TypeError, RuntimeError: a gradient of another shape than its parameter, or
            something that is no contiguous tensor of these dtypes on the table's device.
    """
    for index, (grad, param) in enumerate(zip(grads, params, strict=True)):
        if not isinstance(grad, Tensor) or grad.dtype not in DTYPES or grad.is_sparse:
            raise TypeError(f"grads[{index}] is no dense tensor of {DTYPES}")
        if not grad.is_contiguous() or grad.device != table.device:
            raise ValueError(f"grads[{index}] is not contiguous, or not on {table.device}")
        if grad.numel() and grad.shape != param.shape:
            raise ValueError(
                f"grads[{index}] has {grad.numel()} entries, its parameter {param.numel()}, "
                "or another shape"
            )
    return Bound(grads, params)


def scan(
    bound: Bound,
    dense_grads: Sequence[Tensor],
    position: Tensor,
    offsets: Tensor,
    tile_offsets: Tensor,
    tile: int,
    tile_max: Tensor,
    active_grad: Tensor,
    norms: Tensor,
    found_inf: Tensor,
    scratch: Tensor,
) -> None:
    """Read every gradient once: tile maxima, active gradients, norms, non-finite test.

        tile_max[j]    <- max over frozen entries of tile j of the bits of |grad|
        active_grad[i] <- grad at active entry i
        norms[i]       <- sqrt(sum of grad^2) of gradient i, the dense ones after the pool's
        found_inf      <- 1 if it was 1 or any gradient is infinite or NaN

    Args:
        bound: from `bind`.
        dense_grads: D gradients trained densely, for their norms and the non-finite test.
        position: (capacity,), int32.
        offsets: (S + 1,), int64.
        tile_offsets: (S + 1,), int64.
        tile: entries in a tile.
        tile_max: (num_tiles,), int32. Mutated.
        active_grad: (capacity,), float32. Mutated. Entries without a gradient keep their value.
        norms: (S + D,), float64. Mutated. 0 where the gradient is missing. Squares are summed in
            float32 in a tile, float64 above, in an order that is the tensor's own: it has the same
            norm, bit for bit, in a pool of its own.
        found_inf: (), float32, 0 or 1. Mutated.
        scratch: uint8, `scratch_bytes` long.
    """
    found, non_finite = [0.0] * len(bound.grads), False
    for index, grad in enumerate(bound.grads):
        keys = tile_max[int(tile_offsets[index]) : int(tile_offsets[index + 1])]
        if grad.numel() == 0:
            keys.zero_()
            continue
        segment = slice(int(offsets[index]), int(offsets[index + 1]))
        active = position[segment].long()
        flat = grad.reshape(-1).float()
        active_grad[segment] = flat[active]
        bits = flat.abs().view(torch.int32)
        non_finite |= bool((bits >= INFINITY_BITS).any())
        bits[active] = 0
        keys.copy_(tiles_of(bits, tile).amax(dim=1))
        found[index] = tensor_norm(flat, tile)
    for grad in dense_grads:
        flat = grad.reshape(-1).float()
        non_finite |= not bool(flat.isfinite().all())
        found.append(tensor_norm(flat, tile))
    norms.copy_(torch.tensor(found, dtype=torch.float64))
    if non_finite:
        found_inf.fill_(1.0)


def rank(
    bound: Bound,
    position: Tensor,
    offsets: Tensor,
    tile_offsets: Tensor,
    noise: Tensor,
    tile: int,
    tile_max: Tensor,
    scratch: Tensor,
) -> None:
    """Read dense scores: what `scan` does for gradients, without the rest.

        tile_max[j] <- max over frozen entries of tile j of the bits of |score| (/ sqrt(E))

    Args:
        bound: from `bind`, with scores in the place of gradients: finite, >= 0, empty if missing.
        position, offsets, tile_offsets: as in `scan`.
        noise: (2,), int64: seed and step of the noise E; (0,) ranks the scores as they are.
        tile: entries in a tile.
        tile_max: (num_tiles,), int32. Mutated.
        scratch: uint8.
    """
    for index, score in enumerate(bound.grads):
        keys = tile_max[int(tile_offsets[index]) : int(tile_offsets[index + 1])]
        if score.numel() == 0:
            keys.zero_()
            continue
        active = position[int(offsets[index]) : int(offsets[index + 1])].long()
        bits = perturbed(score.reshape(-1).float().abs(), noise, index).view(torch.int32)
        bits[active] = 0
        keys.copy_(tiles_of(bits, tile).amax(dim=1))


def cut(
    bound: Bound,
    position: Tensor,
    offsets: Tensor,
    tile_offsets: Tensor,
    tile_max: Tensor,
    param_bound: Tensor,
    targets: Tensor,
    progress: Tensor,
    found_inf: Tensor,
    exp: float,
    eps: float,
    noise: Tensor,
    tile: int,
    new_tensor: Tensor,
    new_position: Tensor,
    new_count: Tensor,
    threshold: Tensor,
    scratch: Tensor,
) -> None:
    """Find the frozen entries of greatest importance, exactly as many as the schedule asks for.

        quota <- `step_quota`, 0 if found_inf
        new   <- the first `quota` frozen entries in (importance descending, global index
                 ascending) order, leaving out those of zero importance; listed in global order

    Args:
        bound: from `bind`.
        position, offsets, tile_offsets: as in `scan`.
        tile_max: (num_tiles,), int32, from `scan` or `rank`. (This backend scores every
            entry instead.)
        param_bound: (num_tiles,), float32, greatest |param| of each tile; empty unless exp < 0.
        targets: (T + 1,), int64, cumulative entries to have unmasked after each step.
        progress: (3,), int64: applied steps, active entries, skipped steps.
        found_inf: (), float32.
        exp, eps: of `importance`.
        noise: as in `rank`; exp must be 0 with it.
        tile: entries in a tile.
        new_tensor: (max_quota,), int32, tensor of each new entry. Mutated.
        new_position: (max_quota,), int32, flat position within it. Mutated.
        new_count: (), int64. Mutated.
        threshold: (), float32, least importance among the new entries. Mutated if there is one.
        scratch: uint8.
    """
    quota = 0 if found_inf else int(step_quota(targets, progress, new_position.numel()))
    new_count.zero_()
    if quota == 0:
        return
    ranked, first_index = [], 0
    for index, (grad, param) in enumerate(zip(*bound, strict=True)):
        if grad.numel():
            score = importance(grad.reshape(-1), param.detach().reshape(-1), exp, eps)
            key = importance_key(perturbed(score, noise, index))
            key[position[int(offsets[index]) : int(offsets[index + 1])].long()] = 0
            local = key.nonzero().squeeze(1)
            ranked.append(_rank(key[local].long(), first_index + local))
        first_index += param.numel()
    candidates = torch.cat(ranked) if ranked else position.new_empty(0, dtype=torch.int64)
    top = candidates.topk(min(quota, candidates.numel())).values
    if top.numel() == 0:
        return
    threshold.copy_(((top[-1] >> INDEX_BITS) + KEY_MIDDLE).int().view(torch.float32))
    global_index = (LAST_INDEX - (top & LAST_INDEX)).sort().values
    starts = _first_indices(bound.params, global_index.device)
    tensor = torch.searchsorted(starts, global_index, right=True) - 1
    count = global_index.numel()
    new_tensor[:count] = tensor.int()
    new_position[:count] = (global_index - starts[tensor]).int()
    new_count.fill_(count)


def append(
    bound: Bound,
    new_tensor: Tensor,
    new_position: Tensor,
    new_count: Tensor,
    position: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    unmask_step: Tensor,
    master: Tensor,
    active_grad: Tensor,
    offsets: Tensor,
    progress: Tensor,
    scratch: Tensor,
) -> None:
    """Merge the new entries into the active set, which stays in ascending global order.

        exp_avg, exp_avg_sq <- 0;  unmask_step <- step + 1;  master <- param;  active_grad <- grad

    Args:
        bound: from `bind`.
        new_tensor, new_position, new_count: from `cut`.
        position, unmask_step: (capacity,), int32. Mutated.
        exp_avg, exp_avg_sq, active_grad: (capacity,), float32. Mutated.
        master: (capacity,), float32, or empty where every parameter is float32. Mutated.
        offsets: (S + 1,), int64. Mutated.
        progress: (3,), int64. Mutated: active entries.
        scratch: uint8.
    """
    count, num_active = int(new_count), int(progress[1])
    if count == 0:
        return
    tensors, positions = new_tensor[:count].long(), new_position[:count].long()
    starts = _first_indices(bound.params, position.device)
    owner = torch.repeat_interleave(torch.arange(len(bound.params)), offsets.diff().cpu()).to(
        starts.device
    )
    before = starts[owner] + position[:num_active]
    order = torch.cat([before, starts[tensors] + positions]).argsort()
    total = num_active + count

    def merge(values: Tensor, new: Tensor) -> None:
        values[:total] = torch.cat([values[:num_active], new.to(values.dtype)])[order]

    zeros = exp_avg.new_zeros(count)
    merge(position, positions)
    merge(exp_avg, zeros)
    merge(exp_avg_sq, zeros)
    merge(unmask_step, (progress[0] + 1).expand(count))
    merge(active_grad, _gather(bound.grads, tensors, positions))
    if master.numel():
        merge(master, _gather(bound.params, tensors, positions))
    offsets[1:] += torch.bincount(tensors, minlength=len(bound.params)).cumsum(0)
    progress[1] = total


def update(
    bound: Bound,
    position: Tensor,
    offsets: Tensor,
    active_grad: Tensor,
    grad_factor: Tensor,
    found_inf: Tensor,
    hyper: Tensor,
    group_index: Tensor,
    bias_correction: str,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    unmask_step: Tensor,
    master: Tensor,
    progress: Tensor,
) -> None:
    """Take one AdamW step on the active entries; count the step, or count it as skipped.

        grad       <- sign * grad_factor * active_grad
        param      <- (1 - lr * weight_decay) * param
        exp_avg    <- beta1 * exp_avg + (1 - beta1) * grad
        exp_avg_sq <- beta2 * exp_avg_sq + (1 - beta2) * grad^2
        param      <- param - lr / bias_correction1 * exp_avg
                              / (sqrt(exp_avg_sq) / sqrt(bias_correction2) + eps)
        bias_correctionN = 1 - betaN^age

    in float32, on `master` where it is kept. If found_inf, nothing moves but the skipped count.

    Args:
        bound: from `bind`. Parameters are mutated, but for those whose gradient is missing.
        position, offsets, active_grad, found_inf: as in `scan`.
        grad_factor: (), float32, as in `clip`.
        hyper: (num_groups, 6), float64: lr, beta1, beta2, eps, weight_decay, sign of the gradient.
        group_index: (S,), int32, row of `hyper` of each tensor.
        bias_correction: "entry" (age = applied steps since the entry was unmasked, this one
            included) or "global" (age = applied steps, this one included).
        exp_avg, exp_avg_sq: (capacity,), float32. Mutated.
        unmask_step: (capacity,), int32.
        master: (capacity,), float32, or empty. Mutated.
        progress: (3,), int64. Mutated: applied steps or skipped steps.

    Reference: Loshchilov and Hutter 2019, Algorithm 2; torch.optim.AdamW.
    """
    if found_inf:
        progress[2] += 1
        return
    step = progress[0] + 1
    for index, (grad, param) in enumerate(zip(*bound, strict=True)):
        segment = slice(int(offsets[index]), int(offsets[index + 1]))
        if grad.numel() == 0 or segment.start == segment.stop:
            continue
        lr, beta1, beta2, eps, weight_decay, sign = hyper[int(group_index[index])].tolist()
        flat, where = param.detach().view(-1), position[segment].long()
        gradient = active_grad[segment] * (float(grad_factor) * sign)
        value = master[segment] if master.numel() else flat[where]
        age = step - unmask_step[segment] + 1 if bias_correction == "entry" else step.view(1)
        step_size = (lr / (1 - torch.tensor(beta1, dtype=torch.float64) ** age)).float()
        bias_correction2 = 1 - torch.tensor(beta2, dtype=torch.float64) ** age
        value.mul_(1 - lr * weight_decay)
        exp_avg[segment].lerp_(gradient, 1 - beta1)
        exp_avg_sq[segment].mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        denominator = exp_avg_sq[segment].sqrt() / bias_correction2.sqrt().float() + eps
        value.sub_(step_size * (exp_avg[segment] / denominator))
        flat[where] = value.to(param.dtype)
    progress[0] = step


def _rank(key: Tensor, global_index: Tensor) -> Tensor:
    """One int64 that orders by (key descending, global index ascending) when sorted descending.

    31 bits of key, moved to around 0 so that the sign bit is used too, and 33 of index.
    """
    return ((key - KEY_MIDDLE) << INDEX_BITS) | (LAST_INDEX - global_index)


def _first_indices(params: Sequence[Tensor], device: torch.device) -> Tensor:
    """Global index of the first entry of each tensor, int64."""
    sizes = torch.tensor([0] + [param.numel() for param in params], dtype=torch.int64)
    return sizes.cumsum(0)[:-1].to(device)


def _gather(tensors: Sequence[Tensor], which: Tensor, positions: Tensor) -> Tensor:
    """Read entries `positions` of tensors `which`, as float32."""
    values = torch.empty(which.numel(), dtype=torch.float32, device=which.device)
    for index in which.unique().tolist():
        chosen = which == index
        values[chosen] = tensors[index].detach().reshape(-1)[positions[chosen]].float()
    return values

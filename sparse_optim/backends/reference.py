"""The specification: one optimizer step as a few operations in plain torch.

    bind    this step's gradients and parameters, checked, in the form that the others take
    scan    tile_max[j] <- max |grad| over the frozen entries of tile j;  norms, found_inf
    clip    what `update` multiplies gradients by, from the norms of all of them
    rank    tile_max[j] <- max score over the frozen entries of tile j, for importances that give
            dense scores, and for sampling; D3 does not need it
    cut     the `quota` frozen entries of largest importance |grad| / (|param| + eps)^exp
    append  those entries join the active set, with zero moments
    update  AdamW over the active entries alone

and one of the backward pass, for layers that need no other weight gradients:

    sampled_grad  the gradient of a weight matrix at its active entries

and two between steps, for deltas and patches:

    gather    read entries of the parameters
    exchange  swap them with values

Every backend offers these functions with these signatures, and is tested against this file.
Selections are equal to it bit for bit; moments and parameters are equal up to fp32 rounding.

Notation: S tensors are ranked together (the pool). A global index counts their entries one tensor
after the other, in C order. A tile is a run of consecutive entries of one tensor. A gradient that
is missing in this step is passed as an empty tensor. What the operations share (`ActiveSet`,
`Tiles`, `Rule`, `NewEntries`, `StepScalars`) is described in `operands`.

Scores take the place of gradients in `rank` and in the `cut` after it (bound from the scores;
exp = 0). With noise, entries are sampled without replacement: see `noise`.

This backend also runs where no compiled one is available: exact, but dense in its work.

Reference: Agarwal et al. 2025, Step-by-Step Unmasking, TACL 13:1767-1788, Algorithm 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from sparse_optim.backends.clip import clip as clip
from sparse_optim.backends.clip import tensor_norm
from sparse_optim.backends.operands import (
    ActiveSet,
    BiasCorrection,
    NewEntries,
    Rule,
    StepScalars,
    Tiles,
)
from sparse_optim.backends.scoring import (
    importance,
    importance_key,
    perturbed,
    step_quota,
    tiles_of,
)

TILE = 512
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
INFINITY_BITS = 0x7F800000
INDEX_BITS = 33
LAST_INDEX = 2**INDEX_BITS - 1
KEY_MIDDLE = 2**30
# `sampled_grad` adds this many tokens by halves, of this many entries at once.
SAMPLED_TOKENS, SAMPLED_ENTRIES = 64, 1 << 16


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
        for name, tensor in (("grads", grad), ("params", param)):
            if not tensor.is_contiguous() or tensor.device != table.device:
                raise ValueError(f"{name}[{index}] is not contiguous, or not on {table.device}")
        if grad.numel() and grad.shape != param.shape:
            raise ValueError(
                f"grads[{index}] has {grad.numel()} entries, its parameter {param.numel()}, "
                "or another shape"
            )
    return Bound(grads, params)


def scan(
    bound: Bound,
    dense_grads: Sequence[Tensor],
    tiles: Tiles,
    active: ActiveSet,
    norms: Tensor,
    found_inf: Tensor,
    scratch: Tensor,
) -> None:
    """Read every gradient once: tile maxima, active gradients, norms, non-finite test.

        tiles.max[j]   <- max over frozen entries of tile j of the bits of |grad|
        active.grad[i] <- grad at active entry i
        norms[i]       <- sqrt(sum of grad^2) of gradient i, the dense ones after the pool's
        found_inf      <- 1 if it was 1 or any gradient is infinite or NaN

    Args:
        bound: from `bind`.
        dense_grads: D gradients trained densely, for their norms and the non-finite test.
        tiles: `max` is mutated.
        active: `grad` is mutated. Entries without a gradient keep their value.
        norms: (S + D,), float64. Mutated. 0 where the gradient is missing. Squares are summed in
            float32 in a tile, float64 above, in an order that depends on the tensor alone: it has
            the same norm, bit for bit, in any other pool.
        found_inf: (), float32, 0 or 1. Mutated.
        scratch: uint8, `scratch_bytes` long.
    """
    found, non_finite = [0.0] * len(bound.grads), False
    for index, grad in enumerate(bound.grads):
        keys = tiles.max[int(tiles.offsets[index]) : int(tiles.offsets[index + 1])]
        if grad.numel() == 0:
            keys.zero_()
            continue
        segment = slice(int(active.offsets[index]), int(active.offsets[index + 1]))
        position = active.position[segment].long()
        flat = grad.reshape(-1).float()
        active.grad[segment] = flat[position]
        bits = flat.abs().view(torch.int32)
        non_finite |= bool((bits >= INFINITY_BITS).any())
        bits[position] = 0
        keys.copy_(tiles_of(bits, tiles.size).amax(dim=1))
        found[index] = tensor_norm(flat, tiles.size)
    for grad in dense_grads:
        flat = grad.reshape(-1).float()
        non_finite |= not bool(flat.isfinite().all())
        found.append(tensor_norm(flat, tiles.size))
    norms.copy_(torch.tensor(found, dtype=torch.float64))
    if non_finite:
        found_inf.fill_(1.0)


def rank(bound: Bound, tiles: Tiles, active: ActiveSet, noise: Tensor, scratch: Tensor) -> None:
    """Read dense scores: what `scan` does for gradients, without the rest.

        tiles.max[j] <- max over frozen entries of tile j of the bits of |score| (/ sqrt(E))

    Args:
        bound: from `bind`, with scores in the place of gradients: finite, >= 0, empty if missing.
        tiles: `max` is mutated.
        active: its entries are left out.
        noise: (2,), int64: seed and step of the noise E; (0,) ranks the scores as they are.
        scratch: uint8.
    """
    for index, score in enumerate(bound.grads):
        keys = tiles.max[int(tiles.offsets[index]) : int(tiles.offsets[index + 1])]
        if score.numel() == 0:
            keys.zero_()
            continue
        segment = slice(int(active.offsets[index]), int(active.offsets[index + 1]))
        bits = perturbed(score.reshape(-1).float().abs(), noise, index).view(torch.int32)
        bits[active.position[segment].long()] = 0
        keys.copy_(tiles_of(bits, tiles.size).amax(dim=1))


def cut(
    bound: Bound,
    tiles: Tiles,
    active: ActiveSet,
    rule: Rule,
    targets: Tensor,
    found_inf: Tensor,
    new: NewEntries,
    scratch: Tensor,
) -> None:
    """Find the most important frozen entries, exactly as many as the schedule asks for.

        quota <- `step_quota`, 0 if found_inf
        new   <- the first `quota` frozen entries in (importance descending, global index
                 ascending) order, leaving out those of zero importance; listed in global order

    Args:
        bound: from `bind`.
        tiles: from `scan` or `rank`. (This backend scores every entry instead.)
        active: its entries are left out; `progress` gives the quota.
        rule: importance and noise; exp must be 0 with noise.
        targets: cumulative entries to have unmasked after each step; see `targets`.
        found_inf: (), float32.
        new: mutated; `threshold` only if there is a new entry.
        scratch: uint8.
    """
    quota = 0 if found_inf else int(step_quota(targets, active.progress, new.position.numel()))
    new.count.zero_()
    if quota == 0:
        return
    ranked, first_index = [], 0
    for index, (grad, param) in enumerate(zip(*bound, strict=True)):
        if grad.numel():
            score = importance(grad.reshape(-1), param.detach().reshape(-1), rule.exp, rule.eps)
            key = importance_key(perturbed(score, rule.noise, index))
            segment = slice(int(active.offsets[index]), int(active.offsets[index + 1]))
            key[active.position[segment].long()] = 0
            local = key.nonzero().squeeze(1)
            ranked.append(rank_words(key[local], first_index + local))
        first_index += param.numel()
    candidates = torch.cat(ranked) if ranked else new.position.new_empty(0, dtype=torch.int64)
    top = candidates.topk(min(quota, candidates.numel())).values
    if top.numel() == 0:
        return
    new.threshold.copy_(importance_of_word(top[-1]))
    global_index = (LAST_INDEX - (top & LAST_INDEX)).sort().values
    starts = _first_indices(bound.params, global_index.device)
    tensor = torch.searchsorted(starts, global_index, right=True) - 1
    count = global_index.numel()
    new.tensor[:count] = tensor.int()
    new.position[:count] = (global_index - starts[tensor]).int()
    new.count.fill_(count)


def append(bound: Bound, new: NewEntries, active: ActiveSet, scratch: Tensor) -> None:
    """Merge the new entries into the active set, which stays in ascending global order.

        exp_avg, exp_avg_sq <- 0;  unmask_step <- step + 1;  master <- param;  grad <- grad

    Args:
        bound: from `bind`.
        new: from `cut`.
        active: mutated; of `progress`, the active entries.
        scratch: uint8.
    """
    count, num_active = int(new.count), int(active.progress[1])
    if count == 0:
        return
    tensors, positions = new.tensor[:count].long(), new.position[:count].long()
    starts = _first_indices(bound.params, active.position.device)
    owner = torch.repeat_interleave(
        torch.arange(len(bound.params)), active.offsets.diff().cpu()
    ).to(starts.device)
    before = starts[owner] + active.position[:num_active]
    order = torch.cat([before, starts[tensors] + positions]).argsort()
    total = num_active + count

    def merge(values: Tensor, entering: Tensor) -> None:
        values[:total] = torch.cat([values[:num_active], entering.to(values.dtype)])[order]

    zeros = active.exp_avg.new_zeros(count)
    merge(active.position, positions)
    merge(active.exp_avg, zeros)
    merge(active.exp_avg_sq, zeros)
    merge(active.unmask_step, (active.progress[0] + 1).expand(count))
    merge(active.grad, _gather(bound.grads, tensors, positions))
    if active.master.numel():
        merge(active.master, _gather(bound.params, tensors, positions))
    active.offsets[1:] += torch.bincount(tensors, minlength=len(bound.params)).cumsum(0)
    active.progress[1] = total


def update(
    bound: Bound, active: ActiveSet, scalars: StepScalars, bias_correction: BiasCorrection
) -> None:
    """Take one AdamW step on the active entries; count the step, or count it as skipped.

        grad       <- sign * grad_factor * active.grad
        param      <- (1 - lr * weight_decay) * param
        exp_avg    <- beta1 * exp_avg + (1 - beta1) * grad
        exp_avg_sq <- beta2 * exp_avg_sq + (1 - beta2) * grad^2
        param      <- param - lr / bias_correction1 * exp_avg
                              / (sqrt(exp_avg_sq) / sqrt(bias_correction2) + eps)
        bias_correctionN = 1 - betaN^age

    in float32, on `master` where it is kept. If found_inf, nothing moves but the skipped count.
    Does not count up the `_version` of parameters, which is left to the caller.

    Args:
        bound: from `bind`. Parameters are mutated, except those whose gradient is missing.
        active: mutated; of `progress`, the applied or skipped steps.
        scalars: of this step.
        bias_correction: "entry" (age = applied steps since the entry was unmasked, this one
            included) or "global" (age = applied steps, this one included).

    Reference: Loshchilov and Hutter 2019, Algorithm 2; torch.optim.AdamW.
    """
    if scalars.found_inf:
        active.progress[2] += 1
        return
    step = active.progress[0] + 1
    for index, (grad, param) in enumerate(zip(*bound, strict=True)):
        part = active.segment(index)
        where = part["position"].long()
        if grad.numel() == 0 or where.numel() == 0:
            continue
        row = scalars.hyper[int(scalars.group_index[index])]
        lr, beta1, beta2, eps, weight_decay, sign = row.tolist()
        exp_avg, exp_avg_sq, flat = part["exp_avg"], part["exp_avg_sq"], param.data.view(-1)
        first, last = active.offsets[index : index + 2].tolist()
        gradient = active.grad[first:last] * (float(scalars.grad_factor) * sign)
        value = part["master"] if "master" in part else flat[where]
        age = step - part["unmask_step"] + 1 if bias_correction == "entry" else step.view(1)
        step_size = (lr / (1 - torch.tensor(beta1, dtype=torch.float64) ** age)).float()
        bias_correction2 = 1 - torch.tensor(beta2, dtype=torch.float64) ** age
        value.mul_(1 - lr * weight_decay)
        exp_avg.lerp_(gradient, 1 - beta1)
        exp_avg_sq.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        denominator = exp_avg_sq.sqrt() / bias_correction2.sqrt().float() + eps
        value.sub_(step_size * (exp_avg / denominator))
        flat[where] = value.to(param.dtype)
    active.progress[0] = step


def sampled_grad(
    input: Tensor, grad_output: Tensor, position: Tensor, transposed: bool, out: Tensor
) -> None:
    """The gradient of a weight at some of its entries: a sampled dense-dense product.

        out[e] += sum over tokens t of grad_output[t, row(e)] * input[t, column(e)]

    summed in float32, in an order that the shapes and positions give: deterministic, and tokens of
    zero grad_output at the end change no bit.

    Args:
        input: (T, in), float32 | bfloat16 | float16, strided.
        grad_output: (T, out), the same dtypes, strided.
        position: (n,), int32, ascending, flat positions in a weight of (out, in).
        transposed: the weight is (in, out), as transformers' Conv1D stores it.
        out: (n,), float32. Mutated.

    Raises:
        RuntimeError, ValueError: shapes or devices do not match, or positions do not ascend within
            the weight.
    """
    tokens, size = input.size(0), input.size(1) * grad_output.size(1)
    if grad_output.size(0) != tokens or position.shape != out.shape:
        raise ValueError(f"{tokens} rows of input and {grad_output.size(0)} of grad_output")
    if position.numel() and not (
        position[0] >= 0 and position[-1] < size and (position.diff() > 0).all()
    ):
        raise ValueError(f"position does not ascend within the {size} entries of the weight")
    outer, inner = (input, grad_output) if transposed else (grad_output, input)
    for part, sums in zip(position.split(SAMPLED_ENTRIES), out.split(SAMPLED_ENTRIES), strict=True):
        index = part.long()
        first, second = index // max(inner.size(1), 1), index % max(inner.size(1), 1)
        for begin in range(0, tokens, SAMPLED_TOKENS):
            block = slice(begin, begin + SAMPLED_TOKENS)
            terms = outer[block, first].float() * inner[block, second].float()
            terms = torch.nn.functional.pad(terms, (0, 0, 0, SAMPLED_TOKENS - terms.size(0)))
            while terms.size(0) > 1:
                terms = terms[: terms.size(0) // 2] + terms[terms.size(0) // 2 :]
            sums += terms[0]


def gather(bound: Bound, position: Tensor, offsets: Tensor, value: Tensor) -> None:
    """Read entries of the parameters, bit by bit: value[e] <- parameter of e, at position[e].

    Args and errors: as `exchange`, which also writes. Of a position outside of its tensor a GPU
    leaves the value as it is.
    """
    _check_places(bound, position, offsets)
    for param, entries in zip(bound.params, _segments(offsets), strict=True):
        value[entries] = _words(param)[position[entries].long()].int() & _mask(param)


def exchange(bound: Bound, position: Tensor, offsets: Tensor, value: Tensor) -> None:
    """Swap entries of the parameters with values, bit by bit.

        value[e] <-> parameter of e, at position[e]

    so that a second call undoes the first. Does not count up the `_version` of parameters, which is
    left to the caller.

    Args:
        bound: from `bind`; gradients are not looked at. Parameters are mutated.
        position: (n,), int32, flat positions, ascending in each tensor.
        offsets: (S + 1,), int64; the entries of tensor i are offsets[i]:offsets[i + 1].
        value: (n,), int32: bits of a float32, or in the lower half those of a bfloat16 or float16,
            below zeros. Mutated.

    Raises:
        RuntimeError, ValueError: a position is outside of its tensor (on a GPU it is left out);
            nothing is written.
    """
    _check_places(bound, position, offsets)
    for param, entries in zip(bound.params, _segments(offsets), strict=True):
        flat, where = _words(param), position[entries].long()
        before = flat[where].int() & _mask(param)
        flat[where] = value[entries].to(flat.dtype)
        value[entries] = before


def _check_places(bound: Bound, position: Tensor, offsets: Tensor) -> None:
    for index, (param, entries) in enumerate(zip(bound.params, _segments(offsets), strict=True)):
        places = position[entries]
        if places.numel() and not (places.min() >= 0 and places.max() < param.numel()):
            raise ValueError(f"position holds entries beyond the {param.numel()} of tensor {index}")


def _segments(offsets: Tensor) -> list[slice]:
    return [slice(first, last) for first, last in pairwise(offsets.tolist())]


def _words(param: Tensor) -> Tensor:
    """The bits of a parameter, (numel,), int32 or int16; the same memory."""
    return param.data.view(-1).view(torch.int32 if param.dtype.itemsize == 4 else torch.int16)


def _mask(param: Tensor) -> int:
    """The bits of an int32 that a value of the parameter fills."""
    return -1 if param.dtype.itemsize == 4 else 0xFFFF


def rank_words(key: Tensor, global_index: Tensor) -> Tensor:
    """One int64 that orders by (key descending, global index ascending) when sorted descending.

    31 bits of key, moved to around 0 so that the sign bit is used too, and 33 of index.

    Args:
        key: (n,), int32, from `importance_key`.
        global_index: (n,), int64.
    """
    ranked: Tensor = ((key.long() - KEY_MIDDLE) << INDEX_BITS) | (LAST_INDEX - global_index)
    return ranked


def importance_of_word(word: Tensor) -> Tensor:
    """The importance, (), float32, in one of `rank_words`, (), int64."""
    return ((word >> INDEX_BITS) + KEY_MIDDLE).int().view(torch.float32)


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

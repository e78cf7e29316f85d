"""append: merge the new entries into the active set, which stays in ascending global order.

    exp_avg, exp_avg_sq <- 0;  unmask_step <- step + 1;  active_grad <- grad;  master <- param

    insert_at[i] <- place of new entry i in the merged set: entries before it among the active ones
                    (a search in its tensor's segment), and i new ones
    out[j]       <- new entry i where insert_at[i] = j, else active entry j - (new entries before j)

Every program reads what others would overwrite, so the merged arrays are staged in scratch, three
at a time (12 bytes an entry of capacity), and copied back. Only what comes after the first
insertion moves: 16 bytes per array and entry. Bitwise equal to the reference.
Not run on a GPU yet: compiled ahead of time and interpreted.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparse_optim.backends.operands import ActiveSet, NewEntries

from .device_functions import (
    COLUMNS,
    GRAD,
    PARAM,
    grad_dtype,
    load_entries,
    lower_bound,
    param_dtype,
)
from .launch import Pieces, blocks_of, carve

# Streams of four-byte words: four a thread, as eight took 118 registers. Unmeasured.
MERGE_BLOCK = 512
INSERT_BLOCK = 128
OFFSETS_BLOCK = 256

# Arrays to merge, and how many of them at a time.
NUM_WORDS = 6
TOGETHER = 3


def append_pieces(capacity: int, max_quota: int) -> Pieces:
    """Scratch: places of new entries, their words, merged arrays."""
    return [
        (max_quota, torch.int64), (NUM_WORDS * max_quota, torch.int32),
        (TOGETHER * capacity, torch.int32),
    ]  # fmt: skip


@triton.jit(do_not_specialize=["max_quota"])
def insert_kernel(
    table_ptr,
    new_tensor_ptr,
    new_position_ptr,
    new_count_ptr,
    position_ptr,
    offsets_ptr,
    progress_ptr,
    insert_at_ptr,
    fresh_ptr,
    max_quota,
    BLOCK: tl.constexpr,
):
    """insert_at[i] and the words of new entry i."""
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    in_bounds = offs < tl.load(new_count_ptr)
    tensor = tl.load(new_tensor_ptr + offs, mask=in_bounds, other=0)
    position = tl.load(new_position_ptr + offs, mask=in_bounds, other=0)
    before = lower_bound(
        position_ptr, tl.load(offsets_ptr + tensor), tl.load(offsets_ptr + tensor + 1),
        tl.load(progress_ptr + 1), position,
    )  # fmt: skip
    row_ptr = table_ptr + tensor * COLUMNS
    grad = load_entries(tl.load(row_ptr + GRAD), grad_dtype(table_ptr, tensor), position, in_bounds)
    param = load_entries(
        tl.load(row_ptr + PARAM), param_dtype(table_ptr, tensor), position, in_bounds
    )
    zero = tl.zeros((BLOCK,), tl.int32)
    step = zero + (tl.load(progress_ptr) + 1).to(tl.int32)
    tl.store(insert_at_ptr + offs, before + offs, mask=in_bounds)
    # Rows of `fresh`, in the order in which the arrays are merged.
    word_ptr = fresh_ptr + offs
    tl.store(word_ptr, position, mask=in_bounds)
    word_ptr += max_quota
    tl.store(word_ptr, zero, mask=in_bounds)
    word_ptr += max_quota
    tl.store(word_ptr, zero, mask=in_bounds)
    word_ptr += max_quota
    tl.store(word_ptr, step, mask=in_bounds)
    word_ptr += max_quota
    tl.store(word_ptr, grad.to(tl.int32, bitcast=True), mask=in_bounds)
    word_ptr += max_quota
    tl.store(word_ptr, param.to(tl.int32, bitcast=True), mask=in_bounds)


@triton.jit
def merge_words(word_ptr, fresh_ptr, staged_ptr, offs, place, is_new, moves):
    old = tl.load(word_ptr + offs - place, mask=moves & (is_new == 0), other=0)
    new = tl.load(fresh_ptr + place, mask=moves & is_new, other=0)
    tl.store(staged_ptr + offs, tl.where(is_new, new, old), mask=moves)


@triton.jit(do_not_specialize=["max_quota", "capacity"])
def merge_kernel(
    first_ptr,
    second_ptr,
    third_ptr,
    fresh_ptr,
    staged_ptr,
    insert_at_ptr,
    new_count_ptr,
    progress_ptr,
    max_quota,
    capacity,
    HAS_THIRD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """staged[k, j] <- merged array k, for j behind the first insertion."""
    new_count = tl.load(new_count_ptr)
    start = tl.program_id(0).to(tl.int64) * BLOCK
    total = tl.load(progress_ptr + 1) + new_count
    if (new_count == 0) | (start >= total):
        return
    offs = start + tl.arange(0, BLOCK)
    moves = (offs < total) & (offs >= tl.load(insert_at_ptr))
    none = tl.zeros((BLOCK,), tl.int64)
    place = lower_bound(insert_at_ptr, none, none + new_count, new_count, offs)
    is_new = tl.load(insert_at_ptr + place, mask=place < new_count, other=-1) == offs
    merge_words(first_ptr, fresh_ptr, staged_ptr, offs, place, is_new, moves)
    fresh_ptr += max_quota
    staged_ptr += capacity
    merge_words(second_ptr, fresh_ptr, staged_ptr, offs, place, is_new, moves)
    if HAS_THIRD:
        fresh_ptr += max_quota
        staged_ptr += capacity
        merge_words(third_ptr, fresh_ptr, staged_ptr, offs, place, is_new, moves)


@triton.jit(do_not_specialize=["capacity"])
def copy_back_kernel(
    first_ptr,
    second_ptr,
    third_ptr,
    staged_ptr,
    insert_at_ptr,
    new_count_ptr,
    progress_ptr,
    capacity,
    HAS_THIRD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    new_count = tl.load(new_count_ptr)
    start = tl.program_id(0).to(tl.int64) * BLOCK
    total = tl.load(progress_ptr + 1) + new_count
    if (new_count == 0) | (start >= total):
        return
    offs = start + tl.arange(0, BLOCK)
    moves = (offs < total) & (offs >= tl.load(insert_at_ptr))
    tl.store(first_ptr + offs, tl.load(staged_ptr + offs, mask=moves), mask=moves)
    staged_ptr += capacity
    tl.store(second_ptr + offs, tl.load(staged_ptr + offs, mask=moves), mask=moves)
    if HAS_THIRD:
        staged_ptr += capacity
        tl.store(third_ptr + offs, tl.load(staged_ptr + offs, mask=moves), mask=moves)


@triton.jit(do_not_specialize=["num_tensors"])
def grow_kernel(
    new_tensor_ptr,
    new_count_ptr,
    offsets_ptr,
    progress_ptr,
    num_tensors,
    BLOCK: tl.constexpr,
):
    """offsets[t + 1] += new entries of tensors up to t;  active entries += new_count"""
    new_count = tl.load(new_count_ptr)
    tensor = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    in_bounds = tensor < num_tensors
    none = tl.zeros((BLOCK,), tl.int64)
    added = lower_bound(new_tensor_ptr, none, none + new_count, new_count, tensor + 1)
    end_ptr = offsets_ptr + tensor + 1
    tl.store(end_ptr, tl.load(end_ptr, mask=in_bounds, other=0) + added, mask=in_bounds)
    if tl.program_id(0) == 0:
        tl.store(progress_ptr + 1, tl.load(progress_ptr + 1) + new_count)


def append(bound: Tensor, new: NewEntries, active: ActiveSet, scratch: Tensor) -> None:
    """See `reference.append`."""
    capacity, max_quota = active.position.numel(), new.tensor.numel()
    if not capacity or not max_quota:
        return
    insert_at, fresh, staged = carve(scratch, append_pieces(capacity, max_quota))
    arrays = (
        active.position, active.exp_avg, active.exp_avg_sq, active.unmask_step, active.grad,
        active.master,
    )  # fmt: skip
    words = [array.view(torch.int32) for array in arrays]
    grid = (blocks_of(capacity, MERGE_BLOCK),)
    counts = (insert_at, new.count, active.progress)
    with torch.cuda.device_of(bound):
        insert_kernel[(blocks_of(max_quota, INSERT_BLOCK),)](
            bound, new.tensor, new.position, new.count, active.position, active.offsets,
            active.progress, insert_at, fresh, max_quota, BLOCK=INSERT_BLOCK, num_warps=4,
        )  # fmt: skip
        for first in range(0, NUM_WORDS, TOGETHER):
            merged = words[first : first + TOGETHER]
            has_third = merged[2].numel() > 0
            merged[2] = merged[2] if has_third else merged[1]
            options = {"HAS_THIRD": has_third, "BLOCK": MERGE_BLOCK, "num_warps": 4}
            merge_kernel[grid](
                *merged, fresh[first * max_quota :], staged, *counts, max_quota, capacity, **options
            )
            copy_back_kernel[grid](*merged, staged, *counts, capacity, **options)
        num_tensors = active.offsets.numel() - 1
        grow_kernel[(blocks_of(num_tensors, OFFSETS_BLOCK),)](
            new.tensor, new.count, active.offsets, active.progress, num_tensors,
            BLOCK=OFFSETS_BLOCK, num_warps=4,
        )  # fmt: skip

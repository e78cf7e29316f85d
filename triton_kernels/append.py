"""append: merge the new entries into the active set, which stays in ascending global order.

    exp_avg, exp_avg_sq <- 0;  unmask_step <- step + 1;  active_grad <- grad;  master <- param

    insert_at[i] <- place of new entry i in the merged set: entries before it among the active ones
                    (a search in its tensor's segment), and i new ones
    out[j]       <- new entry i where insert_at[i] = j, else active entry j - (new entries before j)

Every program reads what others would overwrite, so the merged arrays are staged in scratch, three
at a time (12 bytes an entry of capacity), and copied back by the next launch, which merges the next
three. Only what comes after the first insertion moves: 16 bytes per array and entry. Bitwise equal
to the reference.

B = 3.5e6 active entries with master values, all of them moved: 336 MB. Predicted: bytes / bandwidth
= 0.17 ms on A100 (2.0 TB/s), 0.44 ms on A6000 (0.768), 0.10 ms on H100 (3.35), 70 us on H200 (4.8).
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

# Words of an entry, one an array, and how many arrays are merged at a time.
NUM_WORDS = 6
TOGETHER = 3


def append_pieces(capacity: int, max_quota: int) -> Pieces:
    """Scratch: entries after the merge, places of new entries, their words, merged arrays."""
    return [
        (1, torch.int64), (max_quota, torch.int64), (NUM_WORDS * max_quota, torch.int32),
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
    total_ptr,
    insert_at_ptr,
    fresh_ptr,
    max_quota,
    BLOCK: tl.constexpr,
):
    """insert_at[i] and the words of new entry i;  total <- active entries with the new ones"""
    new_count = tl.load(new_count_ptr)
    if tl.program_id(0) == 0:
        tl.store(total_ptr, tl.load(progress_ptr + 1) + new_count)
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    in_bounds = offs < new_count
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


@triton.jit
def copy_word(word_ptr, staged_ptr, offs, moves):
    tl.store(word_ptr + offs, tl.load(staged_ptr + offs, mask=moves), mask=moves)


@triton.jit
def grow(
    new_tensor_ptr, new_count, offsets_ptr, progress_ptr, total, num_tensors, BLOCK: tl.constexpr
):
    """offsets[t + 1] += new entries of tensors up to t;  active entries <- total"""
    for start in range(tl.program_id(0) * BLOCK, num_tensors, tl.num_programs(0) * BLOCK):
        tensor = start + tl.arange(0, BLOCK)
        in_bounds = tensor < num_tensors
        none = tl.zeros((BLOCK,), tl.int64)
        added = lower_bound(new_tensor_ptr, none, none + new_count, new_count, tensor + 1)
        end_ptr = offsets_ptr + tensor + 1
        end = tl.load(end_ptr, mask=in_bounds, other=0)
        tl.store(end_ptr, end + added, mask=in_bounds)
    if tl.program_id(0) == 0:
        tl.store(progress_ptr + 1, total)


@triton.jit(do_not_specialize=["max_quota", "capacity", "num_tensors"])
def move_kernel(
    copied_ptr,
    copied2_ptr,
    copied3_ptr,
    merged_ptr,
    merged2_ptr,
    merged3_ptr,
    fresh_ptr,
    staged_ptr,
    insert_at_ptr,
    new_tensor_ptr,
    new_count_ptr,
    total_ptr,
    offsets_ptr,
    progress_ptr,
    max_quota,
    capacity,
    num_tensors,
    COPIES: tl.constexpr,
    MERGES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """copied[k][j] <- staged[k, j];  staged[k, j] <- merged array k;  j behind the first insertion

    COPIES and MERGES are 0, 2 or 3 arrays. Those copied were merged by the launch before; a program
    copies what it stages next, and nobody else reads either. The last launch merges nothing, and
    counts the new entries, which no other does read then.
    """
    new_count, total = tl.load(new_count_ptr), tl.load(total_ptr)
    if new_count == 0:
        return
    if MERGES == 0:
        grow(new_tensor_ptr, new_count, offsets_ptr, progress_ptr, total, num_tensors, BLOCK)
    start = tl.program_id(0).to(tl.int64) * BLOCK
    if start >= total:
        return
    offs = start + tl.arange(0, BLOCK)
    moves = (offs < total) & (offs >= tl.load(insert_at_ptr))
    if COPIES > 0:
        copy_word(copied_ptr, staged_ptr, offs, moves)
        copy_word(copied2_ptr, staged_ptr + capacity, offs, moves)
        if COPIES > 2:
            copy_word(copied3_ptr, staged_ptr + 2 * capacity, offs, moves)
    if MERGES > 0:
        if COPIES > 0:
            tl.debug_barrier()  # before threads overwrite what others copy
        none = tl.zeros((BLOCK,), tl.int64)
        place = lower_bound(insert_at_ptr, none, none + new_count, new_count, offs)
        is_new = tl.load(insert_at_ptr + place, mask=place < new_count, other=-1) == offs
        merge_words(merged_ptr, fresh_ptr, staged_ptr, offs, place, is_new, moves)
        fresh_ptr += max_quota
        staged_ptr += capacity
        merge_words(merged2_ptr, fresh_ptr, staged_ptr, offs, place, is_new, moves)
        if MERGES > 2:
            fresh_ptr += max_quota
            staged_ptr += capacity
            merge_words(merged3_ptr, fresh_ptr, staged_ptr, offs, place, is_new, moves)


def append(bound: Tensor, new: NewEntries, active: ActiveSet, scratch: Tensor) -> None:
    """See `reference.append`."""
    capacity, max_quota = active.position.numel(), new.tensor.numel()
    if not capacity or not max_quota:
        return
    total, insert_at, fresh, staged = carve(scratch, append_pieces(capacity, max_quota))
    has_master = active.master.numel() > 0
    arrays = (
        active.position, active.exp_avg, active.exp_avg_sq, active.unmask_step, active.grad,
        active.master if has_master else active.grad,
    )  # fmt: skip
    words = [array.view(torch.int32) for array in arrays]
    first, second, num_second = words[:TOGETHER], words[TOGETHER:], 2 + int(has_master)
    num_tensors = active.offsets.numel() - 1
    with torch.cuda.device_of(bound):
        insert_kernel[(blocks_of(max_quota, INSERT_BLOCK),)](
            bound, new.tensor, new.position, new.count, active.position, active.offsets,
            active.progress, total, insert_at, fresh, max_quota, BLOCK=INSERT_BLOCK, num_warps=4,
        )  # fmt: skip
        for copied, merged, copies, merges in (
            (first, first, 0, TOGETHER), (first, second, TOGETHER, num_second),
            (second, second, num_second, 0),
        ):  # fmt: skip
            move_kernel[(blocks_of(capacity, MERGE_BLOCK),)](
                *copied, *merged, fresh[TOGETHER * max_quota * (merged is second) :], staged,
                insert_at, new.tensor, new.count, total, active.offsets, active.progress,
                max_quota, capacity, num_tensors, COPIES=copies, MERGES=merges, BLOCK=MERGE_BLOCK,
                num_warps=4,
            )  # fmt: skip

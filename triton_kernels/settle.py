"""settle: what a call of `collect` ends with, by one program. Nearly always it returns at once.

    if there was no room for all:    candidates <- those before the call + the call's `quota` best
    if they are many:                candidates <- the `quota` best; floor <- the least key of them

The call's own best are found as `cut` finds them, by three passes over the digits of keys and one
that writes, but one tile after the other: slow, some 50 ms for 16 million entries that all reach
the limit, by an estimate. That takes ties by the hundred thousand. Exact.
Not run on a GPU yet: compiled ahead of time and interpreted.
"""

import triton
import triton.language as tl

from .candidate_list import BEFORE, COUNT, FLOOR, limit_of, write_candidates
from .candidate_tiles import QUOTA, find_bin
from .keep_best import FROM_L2, KEY_DIGITS, clear_bins, keep_best, shifts_of
from .tiles import open_tile


@triton.jit
def first_true(chosen, wanted, TILE: tl.constexpr):
    """The first `wanted` of the true entries of a tile, in order: a search for where they end."""
    entry = tl.arange(0, TILE)
    low, high = tl.full((), 0, tl.int32), tl.full((), TILE, tl.int32)
    if tl.sum(chosen.to(tl.int32), axis=0) > wanted:
        while low < high:
            middle = (low + high) // 2
            enough = tl.sum((chosen & (entry < middle)).to(tl.int32), axis=0) >= wanted
            low, high = tl.where(enough, low, middle + 1), tl.where(enough, middle, high)
    return chosen & (entry < high)


@triton.jit
def add_best(
    table_ptr,
    position_ptr,
    tile_offsets_ptr,
    tile_tensor_ptr,
    tile_start_ptr,
    bound_ptr,
    num_tiles,
    limit,
    quota,
    first_tensor,
    room,
    state_ptr,
    place_ptr,
    key_ptr,
    grad_ptr,
    histogram_ptr,
    eps,
    EXP: tl.constexpr,
    SCORED: tl.constexpr,
    TILE: tl.constexpr,
    BINS: tl.constexpr,
):
    """Append the `quota` best of more entries that reach the limit.

    Three passes over the tiles find the digits of the threshold, the last one writes: entries above
    it, and the first that tie.
    """
    threshold = tl.zeros((), tl.int32)
    wanted = quota
    number = tl.zeros((), tl.int32)
    while number <= KEY_DIGITS:
        shift, above_shift, digit_mask = shifts_of(number)
        clear_bins(histogram_ptr, BINS)
        for tile_index in range(num_tiles):
            if tl.load(bound_ptr + tile_index) >= limit:
                key, tensor, first = open_tile(
                    table_ptr, table_ptr, position_ptr, tile_offsets_ptr, tile_tensor_ptr,
                    tile_start_ptr, tile_index, eps, EXP, False, TILE,
                )  # fmt: skip
                if number < KEY_DIGITS:
                    matches = key >= limit
                    matches &= (key >> above_shift) == (threshold >> above_shift)
                    digit = (key >> shift) & digit_mask
                    tl.atomic_add(histogram_ptr + digit, 1, mask=matches, sem="relaxed")
                else:
                    ties = first_true(key == threshold, wanted, TILE)
                    wanted -= tl.sum(ties.to(tl.int32), axis=0)
                    write_candidates(
                        table_ptr, tensor, first, key, ties | (key > threshold), first_tensor, room,
                        state_ptr, place_ptr, key_ptr, grad_ptr, SCORED, TILE,
                    )  # fmt: skip
        tl.debug_barrier()
        if number < KEY_DIGITS:
            found, above = find_bin(histogram_ptr, wanted, BINS, FROM_L2)
            threshold |= found << shift
            wanted -= above
        number += 1


@triton.jit(do_not_specialize=["num_tiles", "first_tensor", "room"])
def settle_kernel(
    table_ptr,
    position_ptr,
    tile_offsets_ptr,
    tile_tensor_ptr,
    tile_start_ptr,
    bound_ptr,
    state_ptr,
    histogram_ptr,
    place_ptr,
    key_ptr,
    grad_ptr,
    num_tiles,
    first_tensor,
    room,
    eps,
    digits_ptr,
    EXP: tl.constexpr,
    SCORED: tl.constexpr,
    TILE: tl.constexpr,
    BINS: tl.constexpr,
    DIGIT_BINS: tl.constexpr,
    SELECT: tl.constexpr,
):
    """By one program: make room if there may not be enough for the next call."""
    quota = tl.load(state_ptr + QUOTA)
    if quota == 0:
        return
    count = tl.load(state_ptr + COUNT)
    if count > room:
        tl.debug_barrier()  # all threads have read the count, and are here
        tl.store(state_ptr + COUNT, tl.load(state_ptr + BEFORE))
        add_best(
            table_ptr, position_ptr, tile_offsets_ptr, tile_tensor_ptr, tile_start_ptr, bound_ptr,
            num_tiles, limit_of(state_ptr, histogram_ptr, quota, BINS), quota, first_tensor, room,
            state_ptr, place_ptr, key_ptr, grad_ptr, digits_ptr, eps, EXP, SCORED, TILE, DIGIT_BINS,
        )  # fmt: skip
        tl.debug_barrier()  # all threads have written candidates, and counted them
        count = tl.load(state_ptr + COUNT, cache_modifier=FROM_L2)
    if count > tl.minimum(8 * quota, room // 2):
        count, least = keep_best(
            place_ptr, key_ptr, grad_ptr, digits_ptr, count, quota, DIGIT_BINS, SELECT
        )
        tl.store(state_ptr + FLOOR, least.to(tl.int64))
    tl.store(state_ptr + COUNT, count)
    tl.store(state_ptr + BEFORE, count)
    clear_bins(histogram_ptr, BINS)

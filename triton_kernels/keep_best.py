"""Keep the best of unordered candidates, exactly, in one program.

    candidate i beats j    key_i > key_j, or the keys are equal and place_i < place_j
    limit                  <- (key, place) of the quota-th best; no two candidates have one place
    front                  <- the `quota` candidates that reach the limit

A radix selection over the digits of keys, then over those of places as long as more entries tie
than are wanted: nearly always two or three digits, nine at most. One program, since it runs at the
end of another kernel, whose other programs have finished: a launch would cost more. Each digit
reads the candidates once, in rounds of SELECT_BLOCK. Integers, exact.
Not run on a GPU yet: compiled ahead of time and interpreted.
"""

import triton
import triton.language as tl

from .candidate_tiles import find_bin
from .device_functions import INFINITY_BITS

# Four candidates a thread of the 16 warps that open tiles. Unmeasured.
SELECT_BLOCK = 1024
# Digits of 11, 10 and 10 bits, as of `cut`.
DIGIT_BINS = 2048

# A place is a tensor's index in the pool and a position in it, 31 bits each.
POSITION_BITS = tl.constexpr(31)
LAST_POSITION = tl.constexpr((1 << 31) - 1)
LAST_PLACE = tl.constexpr((1 << 62) - 1)
KEY_DIGITS = tl.constexpr(3)
ALL_DIGITS = tl.constexpr(9)

# What other programs, or other threads by atomic additions, have written is read from L2: a line
# of it in L1 could be older.
FROM_L2 = tl.constexpr(".cg")


@triton.jit
def shifts_of(number):
    """Where digit `number` begins, where the one above it does, and its bits as a mask: 11, 10 and
    10 bits of keys, then of tensors, then of positions."""
    third = number % 3
    shift = tl.where((number >= 3) & (number < 6), POSITION_BITS, 0)
    shift += tl.where(third == 0, 20, tl.where(third == 1, 10, 0))
    return shift, shift + tl.where(third == 0, 11, 10), tl.where(third == 0, 2047, 1023)


@triton.jit
def clear_bins(histogram_ptr, BINS: tl.constexpr):
    """Zeros, once all threads have read what was there."""
    tl.debug_barrier()
    tl.store(histogram_ptr + tl.arange(0, BINS), tl.zeros((BINS,), tl.int32))
    tl.debug_barrier()


@triton.jit
def find_limit(
    place_ptr, key_ptr, histogram_ptr, count, quota, BINS: tl.constexpr, BLOCK: tl.constexpr
):
    """What exactly `quota` of `count` candidates reach, count > quota: a key, and among those of
    this key LAST_PLACE - place. Digits that decide nothing are 0."""
    key_limit = tl.zeros((), tl.int64)
    rest_limit = tl.zeros((), tl.int64)
    wanted = quota
    number = tl.zeros((), tl.int32)
    while number < ALL_DIGITS:
        shift, above_shift, digit_mask = shifts_of(number)
        of_key = number < KEY_DIGITS
        limit = tl.where(of_key, key_limit, rest_limit)
        clear_bins(histogram_ptr, BINS)
        for start in range(0, count, BLOCK):
            offs = start + tl.arange(0, BLOCK)
            in_bounds = offs < count
            key = tl.load(key_ptr + offs, mask=in_bounds, other=0, cache_modifier=FROM_L2)
            key = key.to(tl.int64)
            place = tl.load(place_ptr + offs, mask=in_bounds, other=0, cache_modifier=FROM_L2)
            word = tl.where(of_key, key, LAST_PLACE - place)
            matches = in_bounds & (of_key | (key == key_limit))
            matches &= (word >> above_shift) == (limit >> above_shift)
            digit = (word >> shift) & digit_mask
            tl.atomic_add(histogram_ptr + digit, 1, mask=matches, sem="relaxed")
        tl.debug_barrier()
        found, above = find_bin(histogram_ptr, wanted, BINS, FROM_L2)
        limit |= found.to(tl.int64) << shift
        key_limit = tl.where(of_key, limit, key_limit)
        rest_limit = tl.where(of_key, rest_limit, limit)
        wanted -= above
        held = tl.load(histogram_ptr + found, cache_modifier=FROM_L2)
        # If all that are left win, later digits decide nothing.
        number = tl.where(held == wanted, ALL_DIGITS, number + 1)
    return key_limit, rest_limit


@triton.jit
def keep_best(
    place_ptr,
    key_ptr,
    grad_ptr,
    histogram_ptr,
    count,
    quota,
    BINS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Move the `quota` best of `count` candidates to the front, or all if there are no more.

    Returns how many they are, and their least key.
    """
    key_limit = tl.zeros((), tl.int64)
    rest_limit = tl.zeros((), tl.int64)
    if count > quota:
        key_limit, rest_limit = find_limit(
            place_ptr, key_ptr, histogram_ptr, count, quota, BINS, BLOCK
        )
    kept = tl.zeros((), tl.int64)
    least = tl.full((), INFINITY_BITS, tl.int32)
    for start in range(0, count, BLOCK):
        offs = start + tl.arange(0, BLOCK)
        in_bounds = offs < count
        key = tl.load(key_ptr + offs, mask=in_bounds, other=0, cache_modifier=FROM_L2)
        place = tl.load(place_ptr + offs, mask=in_bounds, other=0, cache_modifier=FROM_L2)
        grad = tl.load(grad_ptr + offs, mask=in_bounds, other=0.0, cache_modifier=FROM_L2)
        ties = (key == key_limit) & (LAST_PLACE - place >= rest_limit)
        wins = in_bounds & ((key > key_limit) | ties)
        tl.debug_barrier()  # before threads overwrite what others read
        out = kept + tl.cumsum(wins.to(tl.int32), axis=0) - 1
        tl.store(key_ptr + out, key, mask=wins)
        tl.store(place_ptr + out, place, mask=wins)
        tl.store(grad_ptr + out, grad, mask=wins)
        kept += tl.sum(wins.to(tl.int32), axis=0)
        least = tl.minimum(least, tl.min(tl.where(wins, key, INFINITY_BITS), axis=0))
    return kept, least

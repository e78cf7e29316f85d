"""Which tiles can hold a winner: what `cut` opens.

    floor   <- about the quota-th largest bound, and unless exp = 0 then of the exact maxima of the
               tiles that reach it: at least `quota` entries reach the floor, or it is the least
    tiles   <- those whose bound reaches the floor, ascending

Floors come from a histogram of the upper bits: the lower edge of the bin of the quota-th largest.
They need not be exact, as a lower one only opens more tiles.

Bytes: 4 per tile three times (five times unless exp = 0; twice that where exp < 0), and unless
exp = 0 one read of the tiles that reach the first floor. Integers and exact bounds: which winners
result is bitwise equal to the reference.
Not run on a GPU yet: compiled ahead of time and interpreted.
"""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from sparse_optim.backends.operands import Rule, Tiles

from .device_functions import bound_key
from .launch import blocks_of
from .tiles import open_tile

# Bounds that one program ranks at once.
BOUND_BLOCK = 1024
# Programs that share the tiles when they are listed, and the list when tiles are opened: a few
# for each multiprocessor of the largest GPUs, not many more since each reads the counts of all.
# Unmeasured.
NUM_PROGRAMS = 512
# The upper 12 bits of a key: the exponent and four bits of the fraction, so that a bin is 6% wide.
FLOOR_SHIFT = tl.constexpr(19)
BINS = 4096
# Eight entries of a tile a thread: with sixteen, the kernels that write and sample had a stack.
OPEN_WARPS = 16

# Of loads, unless told otherwise.
ANY_CACHE = tl.constexpr("")

# Places in `state`, int64, which `cut` continues.
QUOTA = tl.constexpr(0)
LISTED = tl.constexpr(1)
FLOOR = tl.constexpr(2)


@triton.jit
def find_bin(histogram_ptr, wanted, BINS: tl.constexpr, CACHE: tl.constexpr = ANY_CACHE):
    """The bin of the wanted-th largest (-1 if there are fewer); how many greater bins hold."""
    bins = tl.arange(0, BINS)
    counts = tl.load(histogram_ptr + bins, cache_modifier=CACHE).to(tl.int64)
    reaching = tl.sum(counts, axis=0) - tl.cumsum(counts, axis=0) + counts
    found = tl.sum((reaching >= wanted).to(tl.int32), axis=0) - 1
    above = tl.sum(tl.where(bins > found, counts, 0), axis=0)
    return found, above


@triton.jit
def share_of(count):
    """This program's part first:last of `count` things that the programs share in order."""
    share = tl.cdiv(count, tl.num_programs(0))
    first = tl.program_id(0) * share
    return first, tl.minimum(first + share, count)


@triton.jit
def before_and_all(counts_ptr, PROGRAMS: tl.constexpr):
    """Sums of what the programs before this one have counted, and of what all have."""
    others = tl.arange(0, PROGRAMS)
    counts = tl.load(counts_ptr + others, mask=others < tl.num_programs(0), other=0)
    before = tl.sum(tl.where(others < tl.program_id(0), counts, 0), axis=0)
    return before, tl.sum(counts, axis=0)


@triton.jit
def load_bounds(tile_max_ptr, param_bound_ptr, offs, in_bounds, eps, EXP: tl.constexpr):
    tile_max = tl.load(tile_max_ptr + offs, mask=in_bounds, other=0)
    param_bound = tl.zeros_like(tile_max).to(tl.float32)
    if EXP < 0.0:
        param_bound = tl.load(param_bound_ptr + offs, mask=in_bounds, other=0.0)
    return bound_key(tile_max, param_bound, eps, EXP)


@triton.jit(do_not_specialize=["num_tiles"])
def bound_histogram_kernel(
    tile_max_ptr,
    param_bound_ptr,
    state_ptr,
    histogram_ptr,
    num_tiles,
    eps,
    EXP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Count the bounds by their upper bits.

    One addition a tile, not one a program and bin: for 32 keys, the `tl.histogram` of Triton 3.6
    takes 12 ballots and, for 4096 bins, 128 masks and popcounts of each thread (seen in its PTX),
    and then adds every bin of every warp to shared memory. That is more work than it saves.
    """
    if tl.load(state_ptr + QUOTA) == 0:
        return
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    key = load_bounds(tile_max_ptr, param_bound_ptr, offs, offs < num_tiles, eps, EXP)
    tl.atomic_add(histogram_ptr + (key >> FLOOR_SHIFT), 1, mask=key > 0, sem="relaxed")


@triton.jit(do_not_specialize=["num_tiles"])
def list_kernel(
    tile_max_ptr,
    param_bound_ptr,
    state_ptr,
    histogram_ptr,
    counts_ptr,
    list_ptr,
    num_tiles,
    eps,
    EXP: tl.constexpr,
    WRITES: tl.constexpr,
    BINS: tl.constexpr,
    PROGRAMS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Tiles whose bound reaches the floor, ascending: counted first, written by a second launch."""
    quota = tl.load(state_ptr + QUOTA)
    program = tl.program_id(0)
    if quota == 0:
        if program == 0:
            tl.store(state_ptr + LISTED, 0)
        return
    found, _ = find_bin(histogram_ptr, quota, BINS)
    floor = tl.maximum(tl.maximum(found, 0) << FLOOR_SHIFT, 1)
    out = tl.zeros((), tl.int64)
    if WRITES:
        out, total = before_and_all(counts_ptr, PROGRAMS)
        if program == 0:
            tl.store(state_ptr + LISTED, total)
            tl.store(state_ptr + FLOOR, floor.to(tl.int64))
    first, last = share_of(tl.cdiv(num_tiles, BLOCK))
    for block in range(first, last):
        offs = block * BLOCK + tl.arange(0, BLOCK)
        key = load_bounds(tile_max_ptr, param_bound_ptr, offs, offs < num_tiles, eps, EXP)
        reaches = (key >= floor).to(tl.int32)
        if WRITES:
            rank = tl.cumsum(reaches, axis=0) - 1
            tl.store(list_ptr + out + rank, offs, mask=reaches != 0)
        out += tl.sum(reaches, axis=0)
    if not WRITES:
        tl.store(counts_ptr + program, out)


@triton.jit
def maxima_kernel(
    table_ptr,
    noise_ptr,
    position_ptr,
    tile_offsets_ptr,
    tile_tensor_ptr,
    tile_start_ptr,
    list_ptr,
    state_ptr,
    histogram_ptr,
    eps,
    EXP: tl.constexpr,
    TILE: tl.constexpr,
):
    """Count the exact maxima of the listed tiles by their upper bits."""
    listed = tl.load(state_ptr + LISTED)
    for i in range(tl.program_id(0).to(tl.int64), listed, tl.num_programs(0)):
        key, _, _ = open_tile(
            table_ptr, noise_ptr, position_ptr, tile_offsets_ptr, tile_tensor_ptr,
            tile_start_ptr, tl.load(list_ptr + i), eps, EXP, False, TILE,
        )  # fmt: skip
        largest = tl.max(key, axis=0)
        if largest > 0:
            tl.atomic_add(histogram_ptr + (largest >> FLOOR_SHIFT), 1, sem="relaxed")


def list_tiles(
    opening: Sequence[Tensor], tiles: Tiles, rule: Rule, histograms: Tensor, counts: Tensor
) -> None:
    """Fill the list, state[LISTED] and state[FLOOR] for state[QUOTA].

    Args:
        opening: arguments of every kernel that opens listed tiles, the list and state last.
        tiles, rule: as in `reference.cut`.
        histograms: (2, BINS), int32, zeros. Mutated.
        counts: (NUM_PROGRAMS,), int64. Mutated.
    """
    listed, state = opening[-2:]
    num_tiles, exp = tiles.max.numel(), float(rule.exp)
    ranking = (tiles.max, tiles.param_bound if exp < 0 else tiles.max, state)
    options = {"EXP": exp, "BLOCK": BOUND_BLOCK, "num_warps": 4, "enable_fp_fusion": False}
    bound_histogram_kernel[(blocks_of(num_tiles, BOUND_BLOCK),)](
        *ranking, histograms[0], num_tiles, rule.eps, **options
    )

    def list_reaching(histogram: Tensor) -> None:
        for writes in (False, True):
            list_kernel[(min(NUM_PROGRAMS, blocks_of(num_tiles, BOUND_BLOCK)),)](
                *ranking, histogram, counts, listed, num_tiles, rule.eps, WRITES=writes, BINS=BINS,
                PROGRAMS=NUM_PROGRAMS, **options,
            )  # fmt: skip

    list_reaching(histograms[0])
    if exp != 0:
        maxima_kernel[(min(NUM_PROGRAMS, num_tiles),)](
            *opening, histograms[1], rule.eps, EXP=exp, TILE=tiles.size, num_warps=OPEN_WARPS,
            enable_fp_fusion=False,
        )  # fmt: skip
        list_reaching(histograms[1])

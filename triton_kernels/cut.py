"""cut: the `quota` frozen entries of largest importance, exactly, ties to the lower global index.

    key(entry)  = bits of |grad| / (|param| + eps)^exp     (0: active, or never unmasked),
                  or of score / sqrt(E) where entries are sampled
    bound(tile) = key of (its largest |grad|, the most favourable |param|) >= key of its entries
    threshold   = the quota-th largest key;  new = all above it, and the first that tie

    1. Tiles that can hold a winner are listed (candidate_tiles.py): no other bound reaches the
       floor, which at least `quota` entries reach.
    2. A radix selection over their entries (11, 10 and 10 bits) gives the threshold.
    3. Each program counts what it will write of its share of the list; then all write, in order.

All counts stay on the device, grids are fixed, and programs without work return. Only integers are
added atomically, so that the result is the same in every run, bitwise equal to the reference for
exp in {-1, -0.5, 0, 0.5, 1, 2}. Delegates that stand for groups of candidates: Gaihre et al. 2021,
Dr. Top-k, arXiv 2109.08219.

Bytes: the listed tiles, with their parameters unless exp = 0, five times; besides what
candidate_tiles.py and tiles.py move.

7B in bfloat16 at exp = 0, k = 466 new entries: 40 MB of bounds and locations of 1.65e6 tiles, and
38 MB, about 2 k opened tiles five times. Predicted: bytes / bandwidth = 39 us on A100 (2.0 TB/s),
0.10 ms on A6000 (0.768), 23 us on H100 (3.35), 16 us on H200 (4.8); nine launches take longer.
Not run on a GPU yet: compiled ahead of time and interpreted.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparse_optim.backends.operands import ActiveSet, NewEntries, Rule, Tiles
from sparse_optim.backends.targets import signed_length

from .candidate_tiles import (
    BINS,
    FLOOR,
    LISTED,
    NUM_PROGRAMS,
    OPEN_WARPS,
    QUOTA,
    before_and_all,
    find_bin,
    list_tiles,
    share_of,
)
from .device_functions import INFINITY_BITS
from .launch import Pieces, blocks_of, carve
from .noise import samples
from .tiles import LOCATE_BLOCK, locate_block, location_pieces, open_tile

# Digits of a key, upper first: 11, 10 and 10 bits, together all 31.
DIGIT_SHIFTS = (20, 10, 0)
DIGIT_BINS = 2048
COUNTERS = 2 * BINS + len(DIGIT_SHIFTS) * DIGIT_BINS
# Counters that a program clears at once; divides COUNTERS.
CLEAR_BLOCK = 2048

# Places in `state` besides those of `candidate_tiles`, one for every pass over the digits: upper
# bits of the threshold so far (-1: fewer candidates than the quota); winners among what matches.
PREFIX = tl.constexpr(3)
WANTED = tl.constexpr(6)
STATE = 9


def cut_pieces(num_tiles: int) -> Pieces:
    """Scratch: where tiles are, the list, state, histograms, counts of each program."""
    return [
        *location_pieces(num_tiles),
        (num_tiles, torch.int32),
        (STATE, torch.int64),
        (COUNTERS, torch.int32),
        (4 * NUM_PROGRAMS, torch.int64),
    ]


@triton.jit
def quota_of(targets_ptr, progress_ptr, num_targets, max_quota):
    """min(target(min(step + 1, T)) - active, max_quota), at least 0

    num_targets is negative for a formula; see sparse_optim.backends.targets.
    """
    step = tl.maximum(tl.load(progress_ptr) + 1, 0)
    if num_targets > 0:
        target = tl.load(targets_ptr + tl.minimum(step, num_targets - 1))
    else:
        target = tl.full((), 0, tl.int64)
        for piece in range(-num_targets):
            first = tl.load(targets_ptr + 4 * piece)
            gain = tl.load(targets_ptr + 4 * piece + 2)
            power = tl.load(targets_ptr + 4 * piece + 3)
            is_last = piece == -num_targets - 1
            end = tl.load(targets_ptr + 4 * piece + 4, mask=piece < -num_targets - 1, other=0)
            n = tl.maximum(tl.where(is_last, 1, end - first), 1)
            u = step - first
            gained = tl.where(power == 2, gain * u * (2 * n - u) // (n * n), gain * u // n)
            target = tl.where(u >= 0, tl.load(targets_ptr + 4 * piece + 1) + gained, target)
    missing = target - tl.load(progress_ptr + 1)
    return tl.minimum(tl.maximum(missing, 0), max_quota)


@triton.jit
def plan(
    targets_ptr, progress_ptr, found_inf_ptr, new_count_ptr, state_ptr, num_targets, max_quota
):
    """state[QUOTA] <- the quota of the step, 0 if found_inf"""
    quota = quota_of(targets_ptr, progress_ptr, num_targets, max_quota)
    quota = tl.where(tl.load(found_inf_ptr) != 0.0, 0, quota)
    tl.store(state_ptr + QUOTA, quota)
    tl.store(state_ptr + PREFIX, 0)
    tl.store(state_ptr + WANTED, quota)
    tl.store(new_count_ptr, 0)


@triton.jit(do_not_specialize=["num_targets", "max_quota", "num_tensors", "num_tiles"])
def begin_kernel(
    targets_ptr,
    progress_ptr,
    found_inf_ptr,
    new_count_ptr,
    position_ptr,
    offsets_ptr,
    tile_offsets_ptr,
    tile_tensor_ptr,
    tile_start_ptr,
    state_ptr,
    histogram_ptr,
    num_targets,
    max_quota,
    num_tensors,
    num_tiles,
    TILE: tl.constexpr,
    COUNTERS: tl.constexpr,
    CLEAR: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Plan the quota, locate tiles, and clear the histograms: three small things, one launch."""
    if tl.program_id(0) == 0:
        plan(
            targets_ptr, progress_ptr, found_inf_ptr, new_count_ptr, state_ptr, num_targets,
            max_quota,
        )  # fmt: skip
    for start in range(tl.program_id(0) * CLEAR, COUNTERS, tl.num_programs(0) * CLEAR):
        tl.store(histogram_ptr + start + tl.arange(0, CLEAR), tl.zeros((CLEAR,), tl.int32))
    locate_block(
        position_ptr, offsets_ptr, tile_offsets_ptr, tile_tensor_ptr, tile_start_ptr, num_tensors,
        num_tiles, TILE, BLOCK,
    )  # fmt: skip


@triton.jit
def refine(state_ptr, histogram_ptr, PASS: tl.constexpr, SHIFT: tl.constexpr, BINS: tl.constexpr):
    """The threshold with the digit of pass PASS, which began at bit SHIFT, and winners at it."""
    prefix = tl.load(state_ptr + PREFIX + PASS)
    wanted = tl.load(state_ptr + WANTED + PASS)
    digit, above = find_bin(histogram_ptr + PASS * BINS, wanted, BINS)
    short = (digit < 0) | (prefix < 0)
    refined = tl.where(short, -1, prefix | (tl.maximum(digit, 0).to(tl.int64) << SHIFT))
    return refined, tl.where(short, wanted, wanted - above)


@triton.jit
def digit_kernel(
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
    SAMPLES: tl.constexpr,
    TILE: tl.constexpr,
    PASS: tl.constexpr,
    SHIFT: tl.constexpr,
    PREVIOUS: tl.constexpr,
    BINS: tl.constexpr,
):
    """Count entries of listed tiles by the digit at SHIFT, if they match the bits above it.

    Only those that reach the floor, as the threshold does: about `quota` entries. Of all, the
    first pass would count 4096 a tile, most in the same few bins, whose additions wait for each
    other. By `tl.histogram` per program the additions would be fewer still, but Triton 3.6 counts
    by ballots (see `bound_histogram_kernel`).
    """
    prefix = tl.zeros((), tl.int64)
    if PASS > 0:
        prefix, wanted = refine(state_ptr, histogram_ptr, PASS - 1, PREVIOUS, BINS)
        if tl.program_id(0) == 0:
            tl.store(state_ptr + PREFIX + PASS, prefix)
            tl.store(state_ptr + WANTED + PASS, wanted)
    listed = tl.load(state_ptr + LISTED)
    floor = tl.load(state_ptr + FLOOR).to(tl.int32)
    for i in range(tl.program_id(0).to(tl.int64), listed, tl.num_programs(0)):
        key, _, _ = open_tile(
            table_ptr, noise_ptr, position_ptr, tile_offsets_ptr, tile_tensor_ptr,
            tile_start_ptr, tl.load(list_ptr + i), eps, EXP, SAMPLES, TILE,
        )  # fmt: skip
        matches = key >= floor
        if PASS > 0:
            matches &= (key >> PREVIOUS) == (prefix >> PREVIOUS)
            key &= (1 << PREVIOUS) - 1
        bin_ptr = histogram_ptr + PASS * BINS + (key >> SHIFT)
        tl.atomic_add(bin_ptr, 1, mask=matches, sem="relaxed")


@triton.jit
def threshold_of(state_ptr, histogram_ptr, BINS: tl.constexpr):
    """The threshold, and how many that tie with it win. If there are too few, all of those that
    were counted win: what reaches the floor."""
    threshold, ties = refine(state_ptr, histogram_ptr, 2, 0, BINS)
    return tl.where(threshold < 0, tl.load(state_ptr + FLOOR), threshold).to(tl.int32), ties


@triton.jit
def count_kernel(
    table_ptr,
    noise_ptr,
    position_ptr,
    tile_offsets_ptr,
    tile_tensor_ptr,
    tile_start_ptr,
    list_ptr,
    state_ptr,
    histogram_ptr,
    counts_ptr,
    eps,
    EXP: tl.constexpr,
    SAMPLES: tl.constexpr,
    TILE: tl.constexpr,
    BINS: tl.constexpr,
    PROGRAMS: tl.constexpr,
):
    """Per program: entries above the threshold, entries that tie, the least key of both."""
    threshold, _ = threshold_of(state_ptr, histogram_ptr, BINS)
    above, tied = tl.zeros((), tl.int64), tl.zeros((), tl.int64)
    least = tl.full((), INFINITY_BITS, tl.int32)
    first, last = share_of(tl.load(state_ptr + LISTED))
    for i in range(first, last):
        key, _, _ = open_tile(
            table_ptr, noise_ptr, position_ptr, tile_offsets_ptr, tile_tensor_ptr,
            tile_start_ptr, tl.load(list_ptr + i), eps, EXP, SAMPLES, TILE,
        )  # fmt: skip
        above += tl.sum((key > threshold).to(tl.int32), axis=0)
        tied += tl.sum((key == threshold).to(tl.int32), axis=0)
        reaching = tl.where(key >= threshold, key, INFINITY_BITS)
        least = tl.minimum(least, tl.min(reaching, axis=0))
    count_ptr = counts_ptr + tl.program_id(0)
    tl.store(count_ptr, above)
    tl.store(count_ptr + PROGRAMS, tied)
    tl.store(count_ptr + 2 * PROGRAMS, least.to(tl.int64))


@triton.jit
def write_kernel(
    table_ptr,
    noise_ptr,
    position_ptr,
    tile_offsets_ptr,
    tile_tensor_ptr,
    tile_start_ptr,
    list_ptr,
    state_ptr,
    histogram_ptr,
    counts_ptr,
    new_tensor_ptr,
    new_position_ptr,
    new_count_ptr,
    threshold_ptr,
    eps,
    EXP: tl.constexpr,
    SAMPLES: tl.constexpr,
    TILE: tl.constexpr,
    BINS: tl.constexpr,
    PROGRAMS: tl.constexpr,
):
    """List the winners in global order."""
    threshold, ties = threshold_of(state_ptr, histogram_ptr, BINS)
    before, all_above = before_and_all(counts_ptr, PROGRAMS)
    tied, all_tied = before_and_all(counts_ptr + PROGRAMS, PROGRAMS)
    if tl.program_id(0) == 0:
        total = all_above + tl.minimum(all_tied, ties)
        tl.store(new_count_ptr, total)
        if total > 0:
            programs = tl.arange(0, PROGRAMS)
            least = tl.load(
                counts_ptr + 2 * PROGRAMS + programs, mask=programs < tl.num_programs(0),
                other=INFINITY_BITS,
            )  # fmt: skip
            least_key = tl.min(least, axis=0).to(tl.int32)
            tl.store(threshold_ptr, least_key.to(tl.float32, bitcast=True))
    out = before + tl.minimum(tied, ties)
    first_listed, last_listed = share_of(tl.load(state_ptr + LISTED))
    for i in range(first_listed, last_listed):
        key, tensor, first = open_tile(
            table_ptr, noise_ptr, position_ptr, tile_offsets_ptr, tile_tensor_ptr,
            tile_start_ptr, tl.load(list_ptr + i), eps, EXP, SAMPLES, TILE,
        )  # fmt: skip
        ties_here = (key == threshold).to(tl.int32)
        # Counted from here in int32: ranks of int64 take twice the registers.
        ties_left = tl.minimum(tl.maximum(ties - tied, 0), TILE).to(tl.int32)
        chosen = (ties_here != 0) & (tl.cumsum(ties_here, axis=0) <= ties_left)
        wins = ((key > threshold) | chosen).to(tl.int32)
        rank = tl.cumsum(wins, axis=0) - 1
        entry = (first + tl.arange(0, TILE)).to(tl.int32)
        tl.store(new_position_ptr + out + rank, entry, mask=wins != 0)
        tl.store(new_tensor_ptr + out + rank, tl.zeros_like(entry) + tensor, mask=wins != 0)
        tied += tl.sum(ties_here, axis=0)
        out += tl.sum(wins, axis=0)


def cut(
    bound: Tensor,
    tiles: Tiles,
    active: ActiveSet,
    rule: Rule,
    targets: Tensor,
    found_inf: Tensor,
    new: NewEntries,
    scratch: Tensor,
) -> None:
    """See `reference.cut`; `tiles.size` is a power of two, at least 4 with noise."""
    sampling = samples(rule.noise, rule.exp)
    num_tiles = tiles.max.numel()
    if not num_tiles or not new.tensor.numel():
        new.count.zero_()
        return
    *location, listed, state, histograms, counts = carve(scratch, cut_pieces(num_tiles))
    bounds, digits = histograms[: 2 * BINS].view(2, BINS), histograms[2 * BINS :]
    opening = (
        bound, rule.noise if sampling else bound, active.position, tiles.offsets, *location,
        listed, state,
    )  # fmt: skip
    options = {
        "EXP": float(rule.exp), "SAMPLES": sampling, "TILE": tiles.size, "BINS": DIGIT_BINS,
        "num_warps": OPEN_WARPS, "enable_fp_fusion": False,
    }  # fmt: skip
    with torch.cuda.device_of(bound):
        begin_kernel[(blocks_of(num_tiles + 1, LOCATE_BLOCK),)](
            targets, active.progress, found_inf, new.count, active.position, active.offsets,
            tiles.offsets, *location, state, histograms, signed_length(targets),
            new.tensor.numel(), active.offsets.numel() - 1, num_tiles, TILE=tiles.size,
            COUNTERS=COUNTERS, CLEAR=CLEAR_BLOCK, BLOCK=LOCATE_BLOCK, num_warps=4,
        )  # fmt: skip
        list_tiles(opening, tiles, rule, bounds, counts)
        grid = (min(NUM_PROGRAMS, num_tiles),)
        for number, shift in enumerate(DIGIT_SHIFTS):
            digit_kernel[grid](
                *opening, digits, rule.eps, PASS=number, SHIFT=shift,
                PREVIOUS=DIGIT_SHIFTS[max(number - 1, 0)], **options,
            )  # fmt: skip
        options["PROGRAMS"] = NUM_PROGRAMS
        count_kernel[grid](*opening, digits, counts, rule.eps, **options)
        write_kernel[grid](
            *opening, digits, counts, new.tensor, new.position, new.count, new.threshold, rule.eps,
            **options,
        )  # fmt: skip

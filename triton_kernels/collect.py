"""collect: an exact running selection over gradients that come one at a time, as in the backward
pass, each of which may be freed after its call.

    collect_begin    quota of the step; no candidates; floor <- 1
    collect          limit <- max(floor, about the quota-th largest key of the call)
                     candidates <- candidates + frozen entries of the call that reach the limit
                     where they are many: the quota best are kept, floor <- the least key of them
    collect_end      the quota best, in global order

`quota` entries reach the floor, and `quota` of the call what it adds to the limit: nothing below
either can win. The call's part of the limit comes from a histogram of the upper bits of keys, of
the largest key of each group of entries: a group is a tile, or part of one where tiles are fewer
than twice the quota. Candidates come in any order, with their places; only integers are added
atomically: the result is the same in every run, bitwise that of `cut` over all the tensors.

There is room for ROOM candidates (candidate_list.py), at least four times the largest quota. Once
there are eight times as many as wanted, or half the room is taken, all but the best are dropped. A
call that finds more than there is room for selects its own best anew, slowly (settle.py).

Launches: 3 a call, or 4 where exp is not 0 or a tensor has fewer tiles than twice the quota; 1 to
begin; 2 to end, and a sort by torch. With the scan, 6 or 7 kernels for each large tensor, and a
copy of its row of the table.

Bytes: 12 per tile for locations, 4 for bounds twice (unless exp = 0 twice 8, with 4 more where
exp < 0); the tiles that reach the limit once; of four launches, those that reach the floor once
more. Each with its parameters unless exp = 0. 16 per candidate, three or four times where some are
dropped. Each program also reads 16 KB of the histogram, from L2.

7B in bfloat16 at exp = 0, k = 466 (291 tensors, 1.65e6 tiles, some 5,000 opened): 74 MB in a
backward pass. Predicted: bytes / bandwidth = 37 us on A100 (2.0 TB/s), 96 us on A6000 (0.768), 22
us on H100 (3.35), 15 us on H200 (4.8); launches take longer, 810 of 259 calls.
Not run on a GPU yet: compiled ahead of time and interpreted.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparse_optim.backends.operands import ActiveSet, NewEntries, Rule, Tiles
from sparse_optim.backends.targets import signed_length

from .candidate_list import (
    BEFORE,
    COUNT,
    FLOOR,
    collected_pieces,
    limit_of,
    room_in,
    write_candidates,
)
from .candidate_tiles import BINS, FLOOR_SHIFT, OPEN_WARPS, QUOTA
from .cut import quota_of
from .device_functions import INFINITY_BITS, bound_key
from .keep_best import (
    DIGIT_BINS,
    LAST_PLACE,
    LAST_POSITION,
    POSITION_BITS,
    SELECT_BLOCK,
    keep_best,
)
from .launch import Pieces, blocks_of, carve
from .settle import settle_kernel
from .tiles import LOCATE_BLOCK, locate, locate_block, location_pieces, open_tile

# Programs that share the tiles of a call. Unmeasured.
NUM_PROGRAMS = 512
# Groups of entries in a tile whose largest keys are counted, where tiles are too few. Of all
# entries, additions to a few bins would wait for each other.
GROUPS = 64
# Winners that one program writes.
WRITE_BLOCK = 1024


def collect_pieces(num_tiles: int) -> Pieces:
    """Scratch of a call: where tiles are, and their exact maxima."""
    return [*location_pieces(num_tiles), (num_tiles, torch.int32)]


@triton.jit(do_not_specialize=["num_targets", "max_quota"])
def collect_begin_kernel(
    targets_ptr, progress_ptr, state_ptr, histogram_ptr, num_targets, max_quota, BINS: tl.constexpr
):
    quota = quota_of(targets_ptr, progress_ptr, num_targets, max_quota)
    tl.store(state_ptr + QUOTA, quota)
    tl.store(state_ptr + COUNT, 0)
    tl.store(state_ptr + BEFORE, 0)
    tl.store(state_ptr + FLOOR, 1)
    tl.store(histogram_ptr + tl.arange(0, BINS), tl.zeros((BINS,), tl.int32))


@triton.jit(do_not_specialize=["num_tensors", "num_tiles"])
def locate_and_count_kernel(
    position_ptr,
    offsets_ptr,
    tile_offsets_ptr,
    tile_tensor_ptr,
    tile_start_ptr,
    tile_max_ptr,
    state_ptr,
    histogram_ptr,
    num_tensors,
    num_tiles,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Locate tiles, and count their largest keys by the upper bits."""
    if tl.load(state_ptr + QUOTA) == 0:
        return
    locate_block(
        position_ptr, offsets_ptr, tile_offsets_ptr, tile_tensor_ptr, tile_start_ptr, num_tensors,
        num_tiles, TILE, BLOCK,
    )  # fmt: skip
    tile_index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tile_max = tl.load(tile_max_ptr + tile_index, mask=tile_index < num_tiles, other=0)
    # NaN, which skips the step anyhow, has no bin.
    is_counted = (tile_max > 0) & (tile_max <= INFINITY_BITS)
    bin_ptr = histogram_ptr + (tile_max >> FLOOR_SHIFT)
    tl.atomic_add(bin_ptr, 1, mask=is_counted, sem="relaxed")


@triton.jit(do_not_specialize=["num_tiles"])
def group_maxima_kernel(
    table_ptr,
    position_ptr,
    tile_offsets_ptr,
    tile_tensor_ptr,
    tile_start_ptr,
    tile_max_ptr,
    param_bound_ptr,
    bound_ptr,
    state_ptr,
    histogram_ptr,
    num_tiles,
    eps,
    EXP: tl.constexpr,
    GROUPS: tl.constexpr,
    TILE: tl.constexpr,
):
    """Exact maxima of tiles that reach the floor; largest keys of their groups by upper bits."""
    if tl.load(state_ptr + QUOTA) == 0:
        return
    floor = tl.load(state_ptr + FLOOR).to(tl.int32)
    for tile_index in range(tl.program_id(0), num_tiles, tl.num_programs(0)):
        param_bound = tl.zeros((), tl.float32)
        if EXP < 0.0:
            param_bound = tl.load(param_bound_ptr + tile_index)
        bound = bound_key(tl.load(tile_max_ptr + tile_index), param_bound, eps, EXP)
        if bound >= floor:
            key, _, _ = open_tile(
                table_ptr, table_ptr, position_ptr, tile_offsets_ptr, tile_tensor_ptr,
                tile_start_ptr, tile_index, eps, EXP, False, TILE,
            )  # fmt: skip
            bound = tl.max(key, axis=0)
            largest = key
            if GROUPS < TILE:
                largest = tl.max(tl.reshape(key, (TILE // GROUPS, GROUPS)), axis=0)
            bin_ptr = histogram_ptr + (largest >> FLOOR_SHIFT)
            tl.atomic_add(bin_ptr, 1, mask=largest >= floor, sem="relaxed")
        tl.store(bound_ptr + tile_index, bound)


@triton.jit(do_not_specialize=["num_tiles", "first_tensor", "room"])
def collect_kernel(
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
    EXP: tl.constexpr,
    SCORED: tl.constexpr,
    TILE: tl.constexpr,
    BINS: tl.constexpr,
):
    """Append what reaches the limit, as far as there is room; count all of it."""
    quota = tl.load(state_ptr + QUOTA)
    if quota == 0:
        return
    limit = limit_of(state_ptr, histogram_ptr, quota, BINS)
    for tile_index in range(tl.program_id(0), num_tiles, tl.num_programs(0)):
        if tl.load(bound_ptr + tile_index) >= limit:
            key, tensor, first = open_tile(
                table_ptr, table_ptr, position_ptr, tile_offsets_ptr, tile_tensor_ptr,
                tile_start_ptr, tile_index, eps, EXP, False, TILE,
            )  # fmt: skip
            # Of those that find no room it is enough to know that there are some.
            reaches = (key >= limit) & (tl.load(state_ptr + COUNT) <= room)
            write_candidates(
                table_ptr, tensor, first, key, reaches, first_tensor, room, state_ptr, place_ptr,
                key_ptr, grad_ptr, SCORED, TILE,
            )  # fmt: skip


@triton.jit(do_not_specialize=["max_quota"])
def finish_kernel(
    found_inf_ptr,
    state_ptr,
    digit_histogram_ptr,
    place_ptr,
    key_ptr,
    grad_ptr,
    new_count_ptr,
    threshold_ptr,
    max_quota,
    DIGIT_BINS: tl.constexpr,
    SELECT: tl.constexpr,
):
    """Keep the best, as many as there is room for; what is behind them sorts last."""
    quota = tl.minimum(tl.load(state_ptr + QUOTA), max_quota)
    count = tl.load(state_ptr + COUNT)
    count = tl.where((tl.load(found_inf_ptr) != 0.0) | (quota == 0), 0, count)
    count, least = keep_best(
        place_ptr, key_ptr, grad_ptr, digit_histogram_ptr, count, quota, DIGIT_BINS, SELECT
    )
    tl.store(new_count_ptr, count)
    if count > 0:
        tl.store(threshold_ptr, least.to(tl.float32, bitcast=True))
    for start in range(count, max_quota, SELECT):
        offs = start + tl.arange(0, SELECT)
        none = tl.full((SELECT,), LAST_PLACE, tl.int64)
        tl.store(place_ptr + offs, none, mask=offs < max_quota)


@triton.jit
def write_in_order_kernel(
    sorted_place_ptr,
    order_ptr,
    grad_ptr,
    new_count_ptr,
    new_tensor_ptr,
    new_position_ptr,
    new_grad_ptr,
    BLOCK: tl.constexpr,
):
    """Winners and their gradients by place."""
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    in_bounds = offs < tl.load(new_count_ptr)
    place = tl.load(sorted_place_ptr + offs, mask=in_bounds, other=0)
    source = tl.load(order_ptr + offs, mask=in_bounds, other=0)
    tensor, position = place >> POSITION_BITS, place & LAST_POSITION
    tl.store(new_tensor_ptr + offs, tensor.to(tl.int32), mask=in_bounds)
    tl.store(new_position_ptr + offs, position.to(tl.int32), mask=in_bounds)
    tl.store(new_grad_ptr + offs, tl.load(grad_ptr + source, mask=in_bounds), mask=in_bounds)


def collect_begin(active: ActiveSet, targets: Tensor, max_quota: int, collected: Tensor) -> None:
    """See `backends.cuda`."""
    state, histogram, *_ = carve(collected, collected_pieces(0))
    with torch.cuda.device_of(collected):
        collect_begin_kernel[(1,)](
            targets, active.progress, state, histogram, signed_length(targets), max_quota,
            BINS=BINS, num_warps=4,
        )  # fmt: skip


def collect(
    bound: Tensor,
    tiles: Tiles,
    active: ActiveSet,
    rule: Rule,
    scored: bool,
    first: int,
    max_quota: int,
    collected: Tensor,
    scratch: Tensor,
) -> None:
    """See `backends.cuda`."""
    num_tiles, exp = tiles.max.numel(), float(rule.exp)
    if not num_tiles or not max_quota:
        return
    *location, maxima = carve(scratch, collect_pieces(num_tiles))
    room = room_in(collected)
    state, histogram, digits, *candidates = carve(collected, collected_pieces(room))
    groups = next((n for n in (1, GROUPS) if n * num_tiles >= 2 * max_quota), tiles.size)
    opening = (bound, active.position, tiles.offsets, *location)
    options = {
        "EXP": exp, "TILE": tiles.size, "num_warps": OPEN_WARPS, "enable_fp_fusion": False,
    }  # fmt: skip
    grid = (min(NUM_PROGRAMS, num_tiles),)
    with torch.cuda.device_of(bound):
        if exp == 0 and groups == 1:
            maxima = tiles.max
            locate_and_count_kernel[(blocks_of(num_tiles + 1, LOCATE_BLOCK),)](
                active.position, active.offsets, tiles.offsets, *location, maxima, state, histogram,
                active.offsets.numel() - 1, num_tiles, TILE=tiles.size, BLOCK=LOCATE_BLOCK,
                num_warps=4,
            )  # fmt: skip
        else:
            locate(tiles, active, *location)
            group_maxima_kernel[grid](
                *opening, tiles.max, tiles.param_bound if exp < 0 else tiles.max, maxima, state,
                histogram, num_tiles, rule.eps, GROUPS=min(groups, tiles.size), **options,
            )  # fmt: skip
        collecting = (*opening, maxima, state, histogram, *candidates, num_tiles, first, room,
                      rule.eps)  # fmt: skip
        options.update(SCORED=scored, BINS=BINS)
        collect_kernel[grid](*collecting, **options)
        settle_kernel[(1,)](
            *collecting, digits, DIGIT_BINS=DIGIT_BINS, SELECT=SELECT_BLOCK, **options
        )


def collect_end(found_inf: Tensor, new: NewEntries, grad: Tensor, collected: Tensor) -> None:
    """See `backends.cuda`; `new` may have less room than `max_quota`."""
    max_quota = new.position.numel()
    state, _, digits, place, key, held_grad = carve(collected, collected_pieces(room_in(collected)))
    with torch.cuda.device_of(collected):
        finish_kernel[(1,)](
            found_inf, state, digits, place, key, held_grad, new.count, new.threshold, max_quota,
            DIGIT_BINS=DIGIT_BINS, SELECT=SELECT_BLOCK, num_warps=OPEN_WARPS,
        )  # fmt: skip
        if not max_quota:
            return
        in_order, order = place[:max_quota].sort()
        write_in_order_kernel[(blocks_of(max_quota, WRITE_BLOCK),)](
            in_order, order, held_grad, new.count, new.tensor, new.position, grad,
            BLOCK=WRITE_BLOCK, num_warps=4,
        )  # fmt: skip

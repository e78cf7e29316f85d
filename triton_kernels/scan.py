"""scan: read every gradient once.

    tile_max[j]    <- max over frozen entries of tile j of the bits of |grad|
    active_grad[i] <- grad at active entry i
    grad_norm      <- sqrt(sum of grad^2) / grad_scale
    grad_factor    <- min(1, max_grad_norm / (grad_norm + 1e-6)) / grad_scale
    found_inf      <- 1 if it was 1 or any gradient is infinite or NaN

Bytes: one read of the gradients (4 N in float32, 2 N in bfloat16), about 32 per tile, 12 per active
entry. tile_max, active_grad and found_inf are bitwise equal to the reference; sums are float32 in a
tile and float64 above, in a fixed order, hence the same in every run but rounded otherwise.
Not run on a GPU yet: compiled ahead of time and interpreted.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .elements import (
    COLUMNS,
    GRAD,
    INFINITY_BITS,
    MAGNITUDE,
    NUMEL,
    grad_dtype,
    is_listed,
    load_entries,
    load_run,
)
from .tiles import locate, location_pieces
from .work import Pieces, blocks_of, carve

# Eight warps read a tile of 4096 float32 with four 16-byte loads a thread. Unmeasured.
SCAN_WARPS = 8
# Active entries gathered at once; a tile of 4096 holds some ten of them. Unmeasured.
GATHER_BLOCK = 128
# Partial sums, each of a fixed share of the tiles: as many as there are multiprocessors or more.
NUM_PARTIALS = 256
SUM_BLOCK = 1024
DENSE_BLOCK = 4096


def scan_pieces(num_tiles: int) -> Pieces:
    """Scratch: where tiles lie, sums of squares of tiles, partial sums."""
    return [
        *location_pieces(num_tiles), (num_tiles, torch.float32), (NUM_PARTIALS, torch.float64)
    ]  # fmt: skip


@triton.jit
def scan_kernel(
    table_ptr,
    position_ptr,
    tile_offsets_ptr,
    tile_tensor_ptr,
    tile_start_ptr,
    tile_max_ptr,
    tile_squares_ptr,
    active_grad_ptr,
    found_inf_ptr,
    TILE: tl.constexpr,
    GATHER: tl.constexpr,
):
    tile_index = tl.program_id(0)
    tensor = tl.load(tile_tensor_ptr + tile_index)
    address = tl.load(table_ptr + tensor * COLUMNS + GRAD)
    begin = tl.load(tile_start_ptr + tile_index)
    end = tl.load(tile_start_ptr + tile_index + 1)
    if address == 0:
        tl.store(tile_max_ptr + tile_index, 0)
        tl.store(tile_squares_ptr + tile_index, 0.0)
        return
    dtype = grad_dtype(table_ptr, tensor)
    first = (tile_index - tl.load(tile_offsets_ptr + tensor)) * TILE
    count = tl.minimum(tl.load(table_ptr + tensor * COLUMNS + NUMEL) - first, TILE)
    grad = load_run(address, dtype, first, count, TILE)
    # Integer maxima keep NaN, which floating-point maxima drop.
    bits = grad.to(tl.int32, bitcast=True) & MAGNITUDE
    if tl.max(bits, axis=0) >= INFINITY_BITS:
        tl.store(found_inf_ptr, 1.0)
    tl.store(tile_squares_ptr + tile_index, tl.sum(grad * grad, axis=0))
    if begin < end:
        entry = (first + tl.arange(0, TILE)).to(tl.int32)
        listed = is_listed(position_ptr + begin, (end - begin).to(tl.int32), entry)
        bits = tl.where(listed, 0, bits)
        for start in range(begin, end, GATHER):
            offs = start + tl.arange(0, GATHER)
            in_bounds = offs < end
            position = tl.load(position_ptr + offs, mask=in_bounds, other=0)
            values = load_entries(address, dtype, position, in_bounds)
            tl.store(active_grad_ptr + offs, values, mask=in_bounds)
    tl.store(tile_max_ptr + tile_index, tl.max(bits, axis=0))


@triton.jit(do_not_specialize=["num_tiles"])
def sum_kernel(tile_squares_ptr, partial_ptr, num_tiles, BLOCK: tl.constexpr):
    """partial[p] <- sum of blocks p, p + P, ... of tile_squares, in float64."""
    total = tl.zeros((BLOCK,), tl.float64)
    for start in range(tl.program_id(0) * BLOCK, num_tiles, tl.num_programs(0) * BLOCK):
        offs = start + tl.arange(0, BLOCK)
        squares = tl.load(tile_squares_ptr + offs, mask=offs < num_tiles, other=0.0)
        total += squares.to(tl.float64)
    tl.store(partial_ptr + tl.program_id(0), tl.sum(total, axis=0))


@triton.jit(do_not_specialize=["numel"])
def dense_kernel(grad_ptr, partial_ptr, found_inf_ptr, numel, BLOCK: tl.constexpr):
    """partial[p] += squares of blocks p, p + P, ... of one dense gradient."""
    total = tl.load(partial_ptr + tl.program_id(0))
    first = tl.program_id(0).to(tl.int64) * BLOCK
    for start in range(first, numel, tl.num_programs(0) * BLOCK):
        offs = start + tl.arange(0, BLOCK)
        grad = tl.load(grad_ptr + offs, mask=offs < numel, other=0.0).to(tl.float32)
        bits = grad.to(tl.int32, bitcast=True) & MAGNITUDE
        if tl.max(bits, axis=0) >= INFINITY_BITS:
            tl.store(found_inf_ptr, 1.0)
        total += tl.sum(grad * grad, axis=0).to(tl.float64)
    tl.store(partial_ptr + tl.program_id(0), total)


@triton.jit
def norm_kernel(
    partial_ptr,
    grad_scale_ptr,
    grad_norm_ptr,
    grad_factor_ptr,
    max_grad_norm,
    CLIPS: tl.constexpr,
    PARTIALS: tl.constexpr,
):
    scale = tl.load(grad_scale_ptr).to(tl.float64)
    sum_of_squares = tl.sum(tl.load(partial_ptr + tl.arange(0, PARTIALS)), axis=0)
    norm = tl.sqrt(sum_of_squares) / scale
    factor = 1.0 / scale
    if CLIPS:
        factor = tl.minimum(1.0, max_grad_norm / (norm + 1e-6)) / scale
    tl.store(grad_norm_ptr, norm)
    tl.store(grad_factor_ptr, factor.to(tl.float32))


def scan(
    bound: Tensor,
    dense_grads: Sequence[Tensor],
    position: Tensor,
    offsets: Tensor,
    tile_offsets: Tensor,
    grad_scale: Tensor,
    max_grad_norm: float,
    tile: int,
    tile_max: Tensor,
    active_grad: Tensor,
    grad_norm: Tensor,
    grad_factor: Tensor,
    found_inf: Tensor,
    scratch: Tensor,
) -> None:
    """See `reference.scan`; `tile` is a power of two."""
    num_tiles = tile_max.numel()
    tile_tensor, tile_start, tile_squares, partial = carve(scratch, scan_pieces(num_tiles))
    partial.zero_()
    with torch.cuda.device_of(bound):
        if num_tiles:
            locate(position, offsets, tile_offsets, tile, tile_tensor, tile_start)
            scan_kernel[(num_tiles,)](
                bound, position, tile_offsets, tile_tensor, tile_start, tile_max, tile_squares,
                active_grad, found_inf, TILE=tile, GATHER=GATHER_BLOCK, num_warps=SCAN_WARPS,
            )  # fmt: skip
            programs = min(NUM_PARTIALS, blocks_of(num_tiles, SUM_BLOCK))
            sum_kernel[(programs,)](tile_squares, partial, num_tiles, BLOCK=SUM_BLOCK, num_warps=4)
        for grad in dense_grads:
            if programs := min(NUM_PARTIALS, blocks_of(grad.numel(), DENSE_BLOCK)):
                dense_kernel[(programs,)](
                    grad, partial, found_inf, grad.numel(), BLOCK=DENSE_BLOCK, num_warps=8
                )
        clips = not math.isinf(max_grad_norm)
        norm_kernel[(1,)](
            partial, grad_scale, grad_norm, grad_factor, max_grad_norm if clips else 0.0,
            CLIPS=clips, PARTIALS=NUM_PARTIALS, num_warps=1,
        )  # fmt: skip

"""scan: read every gradient once.

    tile_max[j]    <- max over frozen entries of tile j of the bits of |grad|
    active_grad[i] <- grad at active entry i
    norms[i]       <- sqrt(sum of grad^2) of gradient i, the dense ones after the pool's
    found_inf      <- 1 if it was 1 or any gradient is infinite or NaN

Bytes: one read of the gradients (4 N in float32, 2 N in bfloat16), about 32 per tile, 12 per active
entry. tile_max, active_grad and found_inf are bitwise equal to the reference; sums are float32 in a
tile and float64 above, rounded otherwise than there, in an order that is the tensor's own: one that
is scanned alone has the same norm, bit for bit.

7B in bfloat16 (N = 6.74e9, B = 3.5e6 active entries, 1.65e6 tiles): 13.6 GB. Predicted: bytes /
bandwidth = 6.8 ms on A100 (2.0 TB/s), 17.7 ms on A6000 (0.768), 4.1 ms on H100 (3.35), 2.8 ms on
H200 (4.8).
Not run on a GPU yet: compiled ahead of time and interpreted.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparse_optim.backends.operands import ActiveSet, Tiles

from .device_functions import (
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
from .launch import Pieces, blocks_of, carve
from .tiles import locate, location_pieces

# Eight warps read a tile of 4096 float32 with four 16-byte loads a thread. Unmeasured.
SCAN_WARPS = 8
# Active entries gathered at once; a tile of 4096 holds some ten of them. Unmeasured.
GATHER_BLOCK = 128
# Tiles whose squares are added at once, by one program a tensor: the largest of a 7B model has
# 32,000 tiles, 128 KB that the scan has left in L2. Unmeasured.
SUM_BLOCK = 2048
# Programs that read a dense gradient at most, and gradients whose sums are kept at a time.
DENSE_PROGRAMS = 256
DENSE_GRADS = 32
DENSE_BLOCK = 4096


def scan_pieces(num_tiles: int) -> Pieces:
    """Scratch: where tiles are, sums of squares of tiles, and of programs that read dense ones."""
    return [
        *location_pieces(num_tiles), (num_tiles, torch.float32),
        (DENSE_GRADS * DENSE_PROGRAMS, torch.float64),
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


@triton.jit
def norms_kernel(tile_squares_ptr, tile_offsets_ptr, norms_ptr, BLOCK: tl.constexpr):
    """norms[i] <- root of the sum of tensor i's tile_squares, in float64."""
    tensor = tl.program_id(0)
    end = tl.load(tile_offsets_ptr + tensor + 1)
    total = tl.zeros((BLOCK,), tl.float64)
    for start in range(tl.load(tile_offsets_ptr + tensor), end, BLOCK):
        offs = start + tl.arange(0, BLOCK)
        squares = tl.load(tile_squares_ptr + offs, mask=offs < end, other=0.0)
        total += squares.to(tl.float64)
    tl.store(norms_ptr + tensor, tl.sqrt(tl.sum(total, axis=0)))


@triton.jit(do_not_specialize=["numel"])
def dense_kernel(grad_ptr, partial_ptr, found_inf_ptr, numel, BLOCK: tl.constexpr):
    """partial[p] <- squares of blocks p, p + P, ... of one dense gradient."""
    total = tl.zeros((), tl.float64)
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
def dense_norms_kernel(partial_ptr, norms_ptr, PROGRAMS: tl.constexpr):
    """norms[i] <- root of the sum of row i of partial."""
    row_ptr = partial_ptr + tl.program_id(0) * PROGRAMS
    squares = tl.sum(tl.load(row_ptr + tl.arange(0, PROGRAMS)), axis=0)
    tl.store(norms_ptr + tl.program_id(0), tl.sqrt(squares))


def scan(
    bound: Tensor,
    dense_grads: Sequence[Tensor],
    tiles: Tiles,
    active: ActiveSet,
    norms: Tensor,
    found_inf: Tensor,
    scratch: Tensor,
) -> None:
    """See `reference.scan`; `tiles.size` is a power of two."""
    num_tiles, num_tensors = tiles.max.numel(), active.offsets.numel() - 1
    tile_tensor, tile_start, tile_squares, partial = carve(scratch, scan_pieces(num_tiles))
    with torch.cuda.device_of(bound):
        if num_tiles:
            locate(tiles, active, tile_tensor, tile_start)
            scan_kernel[(num_tiles,)](
                bound, active.position, tiles.offsets, tile_tensor, tile_start, tiles.max,
                tile_squares, active.grad, found_inf, TILE=tiles.size, GATHER=GATHER_BLOCK,
                num_warps=SCAN_WARPS,
            )  # fmt: skip
        if num_tensors:
            norms_kernel[(num_tensors,)](
                tile_squares, tiles.offsets, norms, BLOCK=SUM_BLOCK, num_warps=8
            )
        for first in range(0, len(dense_grads), DENSE_GRADS):
            _scan_dense(
                dense_grads[first : first + DENSE_GRADS], partial, norms[num_tensors + first :],
                found_inf,
            )  # fmt: skip


def _scan_dense(grads: Sequence[Tensor], partial: Tensor, norms: Tensor, found_inf: Tensor) -> None:
    """norms[i] <- norm of gradient i of at most DENSE_GRADS."""
    partial.zero_()
    for grad, sums in zip(grads, partial.view(-1, DENSE_PROGRAMS), strict=False):
        if programs := min(DENSE_PROGRAMS, blocks_of(grad.numel(), DENSE_BLOCK)):
            dense_kernel[(programs,)](
                grad, sums, found_inf, grad.numel(), BLOCK=DENSE_BLOCK, num_warps=8
            )
    dense_norms_kernel[(len(grads),)](partial, norms, PROGRAMS=DENSE_PROGRAMS, num_warps=4)

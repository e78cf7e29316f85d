"""Locate tiles, and compute the importance of their entries.

    tile_tensor[j] <- tensor of tile j
    tile_start[j]  <- place in the active set of the first active entry in or behind tile j

so that the active entries of tile j are tile_start[j]:tile_start[j + 1]. Integers, exact.
Bytes: 12 per tile written; the searches read log2(S) + log2(capacity) words per tile, in a
separate kernel where thousands of them overlap, instead of holding up each tile's program.
Not run on a GPU yet: compiled ahead of time and interpreted.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparse_optim.backends.operands import ActiveSet, Tiles

from .device_functions import (
    COLUMNS,
    GRAD,
    NUMEL,
    PARAM,
    grad_dtype,
    importance_key,
    is_listed,
    load_lanes,
    lower_bound,
    param_dtype,
)
from .launch import Pieces, blocks_of
from .noise import perturbed

# Tiles that one program locates. Small, as there are few tiles and many multiprocessors: 27,000
# tiles make 105 programs. Unmeasured.
LOCATE_BLOCK = 256


def location_pieces(num_tiles: int) -> Pieces:
    """Scratch for what `locate` returns."""
    return [(num_tiles, torch.int32), (num_tiles + 1, torch.int64)]


@triton.jit
def locate_block(
    position_ptr,
    offsets_ptr,
    tile_offsets_ptr,
    tile_tensor_ptr,
    tile_start_ptr,
    num_tensors,
    num_tiles,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Locate this program's tiles."""
    tile_index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    in_bounds = tile_index < num_tiles
    first_tensor = tl.zeros((BLOCK,), tl.int32)
    behind = lower_bound(
        tile_offsets_ptr, first_tensor, first_tensor + num_tensors + 1, num_tensors + 1,
        tile_index + 1,
    )  # fmt: skip
    tensor = tl.where(in_bounds, behind - 1, 0)
    num_active = tl.load(offsets_ptr + num_tensors)
    begin = tl.load(offsets_ptr + tensor)
    end = tl.load(offsets_ptr + tensor + 1)
    first = (tile_index - tl.load(tile_offsets_ptr + tensor)) * TILE
    start = lower_bound(position_ptr, begin, end, num_active, first)
    tl.store(tile_tensor_ptr + tile_index, tensor, mask=in_bounds)
    start = tl.where(in_bounds, start, num_active)
    tl.store(tile_start_ptr + tile_index, start, mask=tile_index <= num_tiles)


@triton.jit(do_not_specialize=["num_tensors", "num_tiles"])
def locate_kernel(
    position_ptr,
    offsets_ptr,
    tile_offsets_ptr,
    tile_tensor_ptr,
    tile_start_ptr,
    num_tensors,
    num_tiles,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    locate_block(
        position_ptr, offsets_ptr, tile_offsets_ptr, tile_tensor_ptr, tile_start_ptr, num_tensors,
        num_tiles, TILE, BLOCK,
    )  # fmt: skip


def locate(tiles: Tiles, active: ActiveSet, tile_tensor: Tensor, tile_start: Tensor) -> None:
    """Fill tile_tensor (num_tiles,) int32 and tile_start (num_tiles + 1,) int64."""
    num_tiles = tile_tensor.numel()
    locate_kernel[(blocks_of(num_tiles + 1, LOCATE_BLOCK),)](
        active.position, active.offsets, tiles.offsets, tile_tensor, tile_start,
        active.offsets.numel() - 1, num_tiles, TILE=tiles.size, BLOCK=LOCATE_BLOCK, num_warps=4,
    )  # fmt: skip


@triton.jit
def open_tile(
    table_ptr,
    noise_ptr,
    position_ptr,
    tile_offsets_ptr,
    tile_tensor_ptr,
    tile_start_ptr,
    tile_index,
    eps,
    EXP: tl.constexpr,
    SAMPLES: tl.constexpr,
    TILE: tl.constexpr,
    LOAD: tl.constexpr = load_lanes,
):
    """Keys of all entries of a tile (0 where active), its tensor, and its first position.

    With SAMPLES, scores take the place of gradients, noise is in the keys, and EXP is 0. LOAD is
    `load_run` where nothing is scattered afterwards.
    """
    tensor = tl.load(tile_tensor_ptr + tile_index)
    row_ptr = table_ptr + tensor * COLUMNS
    first = (tile_index - tl.load(tile_offsets_ptr + tensor)) * TILE
    count = tl.minimum(tl.load(row_ptr + NUMEL) - first, TILE)
    grad = LOAD(tl.load(row_ptr + GRAD), grad_dtype(table_ptr, tensor), first, count, TILE)
    if SAMPLES:
        grad = perturbed(tl.abs(grad), noise_ptr, tensor, first, TILE)
    if EXP == 0.0:
        key = importance_key(grad, grad, eps, EXP)
    else:
        param = LOAD(tl.load(row_ptr + PARAM), param_dtype(table_ptr, tensor), first, count, TILE)
        key = importance_key(grad, param, eps, EXP)
    begin = tl.load(tile_start_ptr + tile_index)
    num_active = (tl.load(tile_start_ptr + tile_index + 1) - begin).to(tl.int32)
    if num_active > 0:
        entry = (first + tl.arange(0, TILE)).to(tl.int32)
        key = tl.where(is_listed(position_ptr + begin, num_active, entry), 0, key)
    return key, tensor, first

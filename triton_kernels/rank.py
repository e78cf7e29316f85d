"""rank: read dense scores once.

    tile_max[j] <- max over frozen entries of tile j of the bits of |score| (/ sqrt(E))

Bytes: one read of the scores, about 16 per tile. 7B (N = 6.74e9) with scores in float32: 27 GB.
Predicted: bytes / bandwidth = 13 ms on A100 (2.0 TB/s), 35 ms on A6000 (0.768), 8.0 ms on H100
(3.35), 5.6 ms on H200 (4.8); half of that in bfloat16. With noise, arithmetic comes on top: ten
rounds of Philox for four entries, a logarithm, a root and two divisions for each. Bitwise equal to
the reference.
Not run on a GPU yet: compiled ahead of time and interpreted.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparse_optim.backends.operands import ActiveSet, Tiles

from .device_functions import COLUMNS, GRAD, load_run
from .launch import Pieces, carve
from .noise import samples
from .tiles import locate, location_pieces, open_tile

# As for `scan`; with noise as where tiles are opened, else there was a stack. Unmeasured.
RANK_WARPS = 8
NOISE_WARPS = 16


def rank_pieces(num_tiles: int) -> Pieces:
    """Scratch: where tiles are."""
    return location_pieces(num_tiles)


@triton.jit
def rank_kernel(
    table_ptr,
    noise_ptr,
    position_ptr,
    tile_offsets_ptr,
    tile_tensor_ptr,
    tile_start_ptr,
    tile_max_ptr,
    SAMPLES: tl.constexpr,
    TILE: tl.constexpr,
):
    tile_index = tl.program_id(0)
    tensor = tl.load(tile_tensor_ptr + tile_index)
    if tl.load(table_ptr + tensor * COLUMNS + GRAD) == 0:
        tl.store(tile_max_ptr + tile_index, 0)
        return
    key, _, _ = open_tile(
        table_ptr, noise_ptr, position_ptr, tile_offsets_ptr, tile_tensor_ptr, tile_start_ptr,
        tile_index, 0.0, 0.0, SAMPLES, TILE, load_run,
    )  # fmt: skip
    tl.store(tile_max_ptr + tile_index, tl.max(key, axis=0))


def rank(bound: Tensor, tiles: Tiles, active: ActiveSet, noise: Tensor, scratch: Tensor) -> None:
    """See `reference.rank`; `tiles.size` is a power of two, at least 4 with noise."""
    sampling = samples(noise, 0.0)
    num_tiles = tiles.max.numel()
    if not num_tiles:
        return
    location = carve(scratch, rank_pieces(num_tiles))
    with torch.cuda.device_of(bound):
        locate(tiles, active, *location)
        rank_kernel[(num_tiles,)](
            bound, noise if sampling else bound, active.position, tiles.offsets, *location,
            tiles.max, SAMPLES=sampling, TILE=tiles.size,
            num_warps=NOISE_WARPS if sampling else RANK_WARPS, enable_fp_fusion=False,
        )  # fmt: skip

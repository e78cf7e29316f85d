"""The candidates of a running selection: an unordered list with a counter, and what to add to it.

    limit         <- max(floor, the lower edge of the bin of the quota-th largest key of the call)
    candidates    <- candidates + entries of a tile that reach the limit, while there is room

See collect.py. Not run on a GPU yet: compiled ahead of time and interpreted.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .candidate_tiles import BINS, FLOOR_SHIFT, find_bin
from .device_functions import COLUMNS, GRAD, PARAM, grad_dtype, load_entries, param_dtype
from .keep_best import DIGIT_BINS, POSITION_BITS
from .launch import Pieces, total_bytes

# Candidates that there is room for at least: 2 MB. Unmeasured.
ROOM = 1 << 17

# Places in `state`, int64, besides QUOTA: candidates, also those that found no room; candidates
# before the current call; the floor.
COUNT = tl.constexpr(1)
BEFORE = tl.constexpr(2)
FLOOR = tl.constexpr(3)
STATE = 4


def collected_pieces(room: int) -> Pieces:
    """What is held during a step: state, two histograms; of each candidate place, key, gradient."""
    return [
        (STATE, torch.int64), (BINS, torch.int32), (DIGIT_BINS, torch.int32),
        (room, torch.int64), (room, torch.int32), (room, torch.float32),
    ]  # fmt: skip


def collected_bytes(max_quota: int) -> int:
    """Bytes of `collected`: 2 MB, or 64 per entry of a quota above 32,768."""
    return total_bytes(collected_pieces(max(ROOM, 4 * max_quota)))


def room_in(collected: Tensor) -> int:
    """Candidates that there is room for, a multiple of four: then all pieces are aligned."""
    held = collected.numel() - total_bytes(collected_pieces(0))
    return held // total_bytes(collected_pieces(4)[3:]) * 4


@triton.jit
def limit_of(state_ptr, histogram_ptr, quota, BINS: tl.constexpr):
    """What frozen entries of the call must reach."""
    found, _ = find_bin(histogram_ptr, quota, BINS)
    floor = tl.load(state_ptr + FLOOR).to(tl.int32)
    return tl.maximum(tl.maximum(found, 0) << FLOOR_SHIFT, floor)


@triton.jit
def write_candidates(
    table_ptr,
    tensor,
    first,
    key,
    chosen,
    first_tensor,
    room,
    state_ptr,
    place_ptr,
    key_ptr,
    grad_ptr,
    SCORED: tl.constexpr,
    TILE: tl.constexpr,
):
    """Append the chosen entries of a tile, as far as there is room; count all of them.

    Each takes the next slot by an addition: they are few, and a cumulative sum over the tile, which
    would take one slot for all, takes more registers than anything else here.
    """
    count_ptr = state_ptr + COUNT + tl.zeros((TILE,), tl.int32)
    slot = tl.atomic_add(count_ptr, 1, mask=chosen, sem="relaxed")
    chosen &= slot < room
    row_ptr = table_ptr + tensor * COLUMNS
    if SCORED:
        address, dtype = tl.load(row_ptr + PARAM), param_dtype(table_ptr, tensor)
    else:
        address, dtype = tl.load(row_ptr + GRAD), grad_dtype(table_ptr, tensor)
    entry = first + tl.arange(0, TILE)
    grad = load_entries(address, dtype, entry, chosen)
    first_place = (first_tensor + tensor).to(tl.int64) << POSITION_BITS
    tl.store(key_ptr + slot, key, mask=chosen)
    tl.store(place_ptr + slot, first_place + entry, mask=chosen)
    tl.store(grad_ptr + slot, grad, mask=chosen)

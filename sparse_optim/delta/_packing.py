"""Ascending positions in few bits: an Elias-Fano code.

n positions below u are split after their lowest l = floor(log2(u / n)) bits (0 where n > u / 2):

    low    the lowest l bits of each position, one after the other
    high   bit (position >> l) + i is 1 for the i-th position, all others are 0

Both are bytes, the first bit of a byte is its lowest. That takes less than l + 3 bits a position:
8.6 where 1% of the entries are there, 12.0 at 0.1%; the entropy bound is 8.1 and 11.4.

Reference: Elias 1974, Efficient storage and retrieval by content and address of static files.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

PIECE = 1 << 20  # positions whose bits are spread to bytes at once; a multiple of 8


def low_bits(count: int, numel: int) -> int:
    """l, of `count` positions in a tensor of `numel` entries."""
    return max((numel // count).bit_length() - 1, 0) if count else 0


def packed_bytes(count: int, numel: int) -> int:
    """Bytes of `count` positions in a tensor of `numel` entries."""
    return sum(_sizes(count, numel))


def pack(position: Tensor, numel: int) -> tuple[Tensor, Tensor]:
    """The bytes of strictly ascending positions.

    Args:
        position: (n,), int64, 0 <= position < numel.

    Returns:
        (low, high), uint8.
    """
    values = position.numpy()
    bits = low_bits(len(values), numel)
    marks = np.zeros(_high_bits(len(values), numel, bits), dtype=np.uint8)
    marks[(values >> bits) + np.arange(len(values))] = 1
    shifts = np.arange(bits)
    low = [
        np.packbits(values[at : at + PIECE, None] >> shifts & 1, axis=None, bitorder="little")
        for at in range(0, len(values) if bits else 0, PIECE)
    ]
    return (
        torch.from_numpy(np.concatenate([np.zeros(0, np.uint8), *low])),
        torch.from_numpy(np.packbits(marks, bitorder="little")),
    )


def unpack(low: Tensor, high: Tensor, count: int, numel: int) -> Tensor:
    """The positions that `pack` was given: (count,), int64.

    Raises:
        ValueError: these are not the bytes of as many positions.
    """
    bits, sizes = low_bits(count, numel), _sizes(count, numel)
    for name, part, size in zip(("low", "high"), (low, high), sizes, strict=True):
        if part.dtype != torch.uint8 or part.shape != (size,):
            raise ValueError(
                f"{name} bits of {count} positions: expected {size} bytes, got "
                f"{tuple(part.shape)} {part.dtype}"
            )
    marks = np.unpackbits(high.numpy(), bitorder="little")
    found = np.flatnonzero(marks)
    if len(found) != count:
        raise ValueError(f"high bits: expected {count} positions, got {len(found)}")
    values = (found - np.arange(count)) << bits
    weights, source = 1 << np.arange(bits), low.numpy()
    for at in range(0, count if bits else 0, PIECE):
        piece = values[at : at + PIECE]
        spread = np.unpackbits(
            source[at * bits // 8 : -(-(at + len(piece)) * bits // 8)],
            count=len(piece) * bits,
            bitorder="little",
        )
        piece += spread.reshape(-1, bits) @ weights
    return torch.from_numpy(values)


def _sizes(count: int, numel: int) -> tuple[int, int]:
    bits = low_bits(count, numel)
    return -(-count * bits // 8), -(-_high_bits(count, numel, bits) // 8)


def _high_bits(count: int, numel: int, bits: int) -> int:
    return count + ((numel - 1) >> bits) + 1 if count else 0

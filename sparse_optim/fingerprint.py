"""Recognise a tensor by its bits.

    fingerprint(tensor) = xxh3_128(raw bytes of tensor, C order), 32 hex digits

Shape and dtype are not part of it. xxh3 finds accidents (another checkpoint, a damaged file), it
is no protection against a forger.
"""

from collections.abc import Iterator

import torch
import xxhash
from torch import Tensor

PIECE_BYTES = 1 << 26  # A tensor on an accelerator needs no more than this much host memory.


def raw_bytes(tensor: Tensor, piece_bytes: int = PIECE_BYTES) -> Iterator[memoryview]:
    """Yield the bytes of a tensor in C order, on the host, in pieces.

    Args:
        tensor: any shape, dtype, strides and device. A non-contiguous one is copied on its device.
        piece_bytes: greatest size of a piece, bytes.

    Raises:
        ValueError: the tensor is not strided or is on the meta device.
    """
    if tensor.layout is not torch.strided or tensor.device.type == "meta":
        raise ValueError(
            f"tensor: expected a strided tensor with data, got layout {tensor.layout} on device "
            f"{tensor.device}: densify or materialise it first"
        )
    plain = tensor.detach().resolve_conj().resolve_neg().contiguous()
    for piece in plain.reshape(-1).view(torch.uint8).split(piece_bytes):
        yield memoryview(piece.cpu().numpy())


def fingerprint(tensor: Tensor) -> str:
    """xxh3_128(raw bytes of `tensor`, C order), as 32 hex digits.

    Args:
        tensor: any shape, dtype, strides and device; an empty one is allowed.

    Raises:
        ValueError: the tensor is not strided or is on the meta device.

    Example:
        >>> fingerprint(torch.zeros(2)) == fingerprint(-torch.zeros(2))  # bits, not values
        False
    """
    state = xxhash.xxh3_128()
    for piece in raw_bytes(tensor):
        state.update(piece)
    return state.hexdigest()

"""Recognise a tensor by its bits.

    fingerprint(tensor) = xxh3_128(raw bytes of tensor, C order), 32 hex digits

Shape and dtype are not part of it. xxh3 detects accidents (another checkpoint, a damaged file); it
does not protect against forgery.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
import xxhash
from torch import Tensor

PIECE_BYTES = 1 << 26  # A tensor on an accelerator needs no more than this much host memory.


def raw_bytes(tensor: Tensor, piece_bytes: int = PIECE_BYTES) -> Iterator[memoryview]:
    """Yield the bytes of a tensor in C order, on the host, in pieces.

    Args:
        tensor: any shape, dtype, strides and device. A non-contiguous one is copied on its device.
        piece_bytes: maximum size of a piece, bytes.

    Raises:
        ValueError: the tensor is not strided or is on the meta device.
    """
    if tensor.layout is not torch.strided or tensor.device.type == "meta":
        raise ValueError(
            f"tensor: expected a strided tensor with data, got layout {tensor.layout} on device "
            f"{tensor.device}: densify or materialise it first"
        )
    if tensor.numel() == 0:  # its strides may be 0, as numpy's are, and then it has no other view
        return
    plain = tensor.detach().resolve_conj().resolve_neg().contiguous()
    flat = plain.reshape(-1).view(torch.uint8)
    for piece in (flat,) if flat.numel() <= piece_bytes else flat.split(piece_bytes):
        yield piece.cpu().numpy().data


def fingerprint(tensor: Tensor) -> str:
    """xxh3_128(raw bytes of `tensor`, C order), as 32 hex digits.

    Args:
        tensor: any shape, dtype, strides and device; an empty one is allowed.

    Raises:
        ValueError: the tensor is not strided or is on the meta device.

    Examples:
        >>> fingerprint(torch.zeros(2)) == fingerprint(-torch.zeros(2))  # bits, not values
        False
    """
    state = xxhash.xxh3_128()
    for piece in raw_bytes(tensor):
        state.update(piece)
    return state.hexdigest()


class Hasher:
    """How fingerprints of a pool are taken; another one knows of sharded tensors."""

    def fingerprints(self, pool: Sequence[Tensor], indices: Iterable[int]) -> list[str]:
        """Of the tensors at these places."""
        return [fingerprint(pool[index]) for index in indices]

    def mark(self, tensor: Tensor) -> tuple[int, int]:
        """Differs after a write that autograd sees, or after `.data` was replaced."""
        return tensor._version, tensor.data_ptr()

    def agreed(self, indices: list[int]) -> list[int]:
        """The places to be hashed again, of those that this process found."""
        return indices


class BaseFingerprints:
    """Fingerprints of the tensors in an optimizer's pool before the first step.

    Taken when the optimizer is built, so that its steps copy no weights to the host. A tensor that
    was written between then and the first step, in a way that autograd sees, is hashed again there.

    Args:
        values: fingerprints of a run that is resumed after its first step; empty for a new run.
        hasher: takes them.

    Attributes:
        values: fingerprint of each tensor of the pool, 32 hex digits.
        final: whether a step has been taken.
    """

    def __init__(self, values: Sequence[str] = (), hasher: Hasher | None = None) -> None:
        self.values, self._hasher = list(values), hasher or Hasher()
        self.final = bool(values)
        # index -> what a write would change (None: unknown), for tensors hashed since the last step
        self._marks: dict[int, tuple[int, int] | None] = {}

    def extended(self, pool: Sequence[Tensor], hasher: Hasher | None = None) -> BaseFingerprints:
        """A copy with the fingerprints of further tensors at the end of `pool`.

        Args:
            hasher: of the longer pool; None for the same.

        Raises:
            ValueError: as `fingerprint`.
        """
        grown = BaseFingerprints((), hasher or self._hasher)
        grown.final = self.final
        new = range(len(self.values), len(pool))
        grown.values = self.values + grown._hasher.fingerprints(pool, new)
        grown._marks = self._marks | {index: grown._hasher.mark(pool[index]) for index in new}
        return grown

    def finalize(self, pool: Sequence[Tensor]) -> None:
        """Hash the tensors that were written since, for the last time. Call it before a step."""
        if self.final and not self._marks:
            return
        marks = self._marks.items()
        changed = [index for index, mark in marks if mark != self._hasher.mark(pool[index])]
        again = self._hasher.agreed(changed)
        for index, value in zip(again, self._hasher.fingerprints(pool, again), strict=True):
            self.values[index] = value
        self._marks, self.final = {}, True

    def invalidate(self) -> None:
        """Make the next step hash again the tensors that may have changed unseen."""
        self._marks = dict.fromkeys(self._marks)

    def __getstate__(self) -> dict[str, object]:
        """Without the marks: the tensors of a copy count their versions from the start."""
        return {**vars(self), "_marks": dict.fromkeys(self._marks)}

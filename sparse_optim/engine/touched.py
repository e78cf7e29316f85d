"""Which entries were ever active, where entries leave the active set again."""

from __future__ import annotations

import torch
from torch import Tensor

PIECE_BYTES = 1 << 21  # Unpacked, they take 16 million entries' booleans: 16 MB.


class Touched:
    """One bit for each entry of the pool, so that the size is fixed.

    Args:
        bits: (ceil(N / 8),), uint8; entry i is bit i % 8 of byte i // 8.
    """

    def __init__(self, bits: Tensor) -> None:
        self.bits = bits

    @staticmethod
    def empty(entries: int, device: torch.device) -> Touched:
        """None of `entries` entries."""
        return Touched(torch.zeros(-(-entries // 8), dtype=torch.uint8, device=device))

    @staticmethod
    def of(index: Tensor, entries: int) -> Touched:
        """The entries at these global indices, (n,) int64, each once."""
        touched = Touched.empty(entries, index.device)
        touched.add(index)
        return touched

    def grown(self, entries: int) -> Touched:
        """A copy for a pool of `entries` entries that begins with this one's."""
        larger = Touched.empty(entries, self.bits.device)
        larger.bits[: self.bits.numel()] = self.bits
        return larger

    def add(self, index: Tensor) -> None:
        """Note the global indices, (n,) int64, each once, of a step's set."""
        byte, bit = index >> 3, (index & 7).to(torch.uint8)
        fresh = 1 - (self.bits[byte] >> bit & 1)
        self.bits.index_add_(0, byte, fresh << bit)  # bits of one byte differ: a sum is an or

    def index(self) -> Tensor:
        """Global indices, (n,), int64, ascending."""
        shifts = torch.arange(8, dtype=torch.uint8, device=self.bits.device)
        found = [torch.empty(0, dtype=torch.int64, device=self.bits.device)]
        for number, piece in enumerate(self.bits.split(PIECE_BYTES)):
            inside = (piece[:, None] >> shifts & 1).view(-1).nonzero().view(-1)
            found.append(inside + 8 * PIECE_BYTES * number)
        return torch.cat(found)

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self.bits.nbytes

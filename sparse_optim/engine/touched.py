"""Every entry that was ever active, where entries leave the active set again."""

from __future__ import annotations

import torch
from torch import Tensor


class Touched:
    """Global indices of the entries that were ever active.

    Sets are merged when as many are waiting as are merged already, so that a step costs no more
    than its own set: at most 16 bytes for each entry ever active, plus those of one step.

    Args:
        index: (n,), int64, ascending, each once.
    """

    def __init__(self, index: Tensor) -> None:
        self._merged = index
        self._waiting: list[Tensor] = []

    def add(self, index: Tensor) -> None:
        """Note the global indices, (n,) int64, of a step's set."""
        self._waiting.append(index)
        if sum(part.numel() for part in self._waiting) >= self._merged.numel():
            self._merge()

    def index(self) -> Tensor:
        """Global indices, (n,), int64, ascending, each once."""
        self._merge()
        return self._merged

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self._merged.nbytes + sum(part.nbytes for part in self._waiting)

    def _merge(self) -> None:
        if self._waiting:
            self._merged = torch.cat([self._merged, *self._waiting]).unique()
            self._waiting = []

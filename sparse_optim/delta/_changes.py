"""How much of each tensor a delta changes: entries, and their size beside the base's values."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from sparse_optim.delta._shared import Base, share
from sparse_optim.delta._tensors import bits
from sparse_optim.delta._types import Delta
from sparse_optim.delta._vectors import as_floats, vectors_of


@dataclass(frozen=True)
class Change:
    """What a delta changes in one tensor, or (added up) in several.

    Attributes:
        entries: changed entries; all of a tensor that is stored whole without a base's value.
        numel: entries of the tensor.
        squares: sums over the changed entries of (value - base)^2 and of base^2; None: not
            measured, or the base lacks the tensor.
    """

    entries: int
    numel: int
    squares: tuple[float, float] | None = None

    @property
    def share(self) -> float:
        """entries / numel, 0 of an empty tensor."""
        return self.entries / self.numel if self.numel else 0.0

    @property
    def relative(self) -> float | None:
        """||value - base|| / ||base|| over the changed entries: infinite where the base is 0 there;
        None without `squares` or entries."""
        if self.squares is None or not self.entries:
            return None
        change, base = self.squares
        if base == 0:
            return math.inf if change else 0.0
        return math.sqrt(change / base)

    def __add__(self, other: "Change") -> "Change":
        known = [each for each in (self, other) if each.entries]
        squares: tuple[float, float] | None = (0.0, 0.0)
        for each in known:
            if squares is None or each.squares is None:
                squares = None
            else:
                squares = (squares[0] + each.squares[0], squares[1] + each.squares[1])
        return Change(self.entries + other.entries, self.numel + other.numel, squares)


def tensor_changes(
    delta: Delta, base: Base | None = None, *, sizes: bool = False
) -> dict[str, Change]:
    """How much of each tensor a delta changes, in its parameter order.

    Without `sizes` only what the delta itself holds is read: an entry that it has counts as
    changed, and every entry of a tensor that it stores whole without the base's values.

    Args:
        base: as for `merge_deltas`. Names of the result are the base's.
        sizes: also measure the size of the changes, in float64. Needs `base` or stored originals.

    Raises:
        DeltaError: with `sizes` or `base` as `merge_deltas`: another base, no originals, an
            increment, integer or complex entries, NaN or infinite ones.
    """
    if base is None and not sizes:
        return _entries(delta)
    shared = share({"the delta": delta}, base)
    squares: dict[str, tuple[float, float]] = {}
    for vectors in vectors_of(shared):
        [vector] = vectors.deltas
        change, before = vector.tau**2, as_floats(vector.base) ** 2
        for name, part in vectors.parts(vector.position):
            squares[name] = (float(np.sum(change[part])), float(np.sum(before[part])))
    found = {
        name: Change(values.num_entries, values.numel, squares.get(name))
        for name, values in shared.changes[0].items()
    }
    return found | _whole(shared.whole)


def _entries(delta: Delta) -> dict[str, Change]:
    found = {name: Change(each.num_entries, each.numel) for name, each in delta.sparse.items()}
    for name, tensor in delta.dense.items():
        before = delta.dense_original.get(name)
        same = 0 if before is None else int((bits(before) == bits(tensor)).sum())
        found[name] = Change(tensor.numel() - same, tensor.numel())
    return found


def _whole(tensors: Mapping[str, Tensor]) -> dict[str, Change]:
    return {name: Change(tensor.numel(), tensor.numel()) for name, tensor in tensors.items()}

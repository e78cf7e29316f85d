"""Relate two deltas over one base: store one as an increment over the other, compare them."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sparse_optim.delta._content import known_fingerprint
from sparse_optim.delta._joined import (
    Array,
    Integers,
    Joined,
    Mask,
    find,
    groups,
    layout_of,
    split,
    starts_of,
)
from sparse_optim.delta._tensors import bits
from sparse_optim.delta._types import Delta
from sparse_optim.delta._values import DeltaError, SparseValues, unchecked


@dataclass(frozen=True)
class Overlap:
    """Compares the sparse entries of two deltas; dense tensors are not counted.

    Attributes:
        both, only_a, only_b: number of entries.
        equal: number of entries in both with the same bits.
        max_difference, mean_difference: maximum and mean of |value_a - value_b| over entries that
            are finite in both, in float64; 0 if there are none.
        same_base: whether every parameter in both has the same fingerprint.
    """

    both: int
    only_a: int
    only_b: int
    equal: int
    max_difference: float
    mean_difference: float
    same_base: bool

    @property
    def jaccard(self) -> float:
        """both / (both + only_a + only_b), 1 when neither has an entry."""
        union = self.both + self.only_a + self.only_b
        return self.both / union if union else 1.0


def increment(delta: Delta, parent: Delta) -> Delta:
    """The entries of `delta` that differ from an earlier delta over the same base.

        compose(parent, increment(delta, parent)) == delta        bit for bit

    Entries of the parent that `delta` no longer has are listed as removed. Dense tensors are
    stored whole, since they change at every step.

    Raises:
        DeltaError: a parameter has another shape, dtype or base fingerprint in the parent, or one
            of the two is an increment itself.
    """
    require_whole(delta=delta, parent=parent)
    changed, removed = dict(delta.sparse), dict[str, Tensor]()
    for names in groups(delta.sparse, parent.sparse):
        for name in names:
            _check_same_base(name, delta, parent)
        now = Joined.of([delta.sparse[name] for name in names])
        then = Joined.of([parent.sparse[name] for name in names])
        slot, found = find(now.key, then.key)
        same = _unchanged(now, then, slot, found)
        changed |= zip(names, now.take(np.flatnonzero(~same)), strict=True)
        gone = np.ones(then.key.shape, dtype=np.bool_)
        gone[slot[found]] = False
        index = np.flatnonzero(gone)
        pieces = torch.from_numpy(then.position[index]).split(then.counts(index))
        removed |= {name: piece for name, piece in zip(names, pieces, strict=True) if len(piece)}
    return unchecked(delta, sparse=changed, removed=removed, parent=known_fingerprint(parent))


def compose(parent: Delta, increment: Delta) -> Delta:
    """parent + increment = the whole delta, bit for bit as it was given to `increment`.

    Raises:
        DeltaError: `increment` is not an increment, or was made over another delta than `parent`.
    """
    require_whole(parent=parent)
    if increment.parent is None:
        raise DeltaError("increment: expected an increment, got a whole delta: apply it as it is")
    found = known_fingerprint(parent)
    if found != increment.parent:
        raise DeltaError(
            f"parent: the increment was made over delta {increment.parent}, got {found}"
        )
    whole = dict(increment.sparse)
    for names in groups(increment.sparse, parent.sparse):
        for name in names:
            _check_same_base(name, increment, parent)
        whole |= zip(names, _overlaid(names, parent, increment), strict=True)
    return unchecked(increment, sparse=whole, parent=None, removed={})


def overlap(delta_a: Delta, delta_b: Delta) -> Overlap:
    """Compare the sparse entries of two deltas.

    Raises:
        DeltaError: a parameter has two shapes or dtypes, or one of the deltas is an increment.
    """
    require_whole(a=delta_a, b=delta_b)
    both = equal = finite = 0
    total = largest = 0.0
    same_base = True
    for name in delta_a.sparse.keys() & delta_b.sparse.keys():
        first, second = delta_a.sparse[name], delta_b.sparse[name]
        check_same_layout(name, first, second)
        same_base &= delta_a.fingerprints[name] == delta_b.fingerprints[name]
        values = [
            values.take(torch.isin(values.position, other.position)).value
            for values, other in ((first, second), (second, first))
        ]
        both += values[0].numel()
        equal += int((bits(values[0]) == bits(values[1])).sum())
        distance = (_as_float64(values[0]) - _as_float64(values[1])).abs()
        distance = distance[distance.isfinite()]
        finite += distance.numel()
        total += float(distance.sum())
        largest = max(largest, float(distance.max()) if distance.numel() else 0.0)
    return Overlap(
        both=both,
        only_a=delta_a.num_entries - both,
        only_b=delta_b.num_entries - both,
        equal=equal,
        max_difference=largest,
        mean_difference=total / finite if finite else 0.0,
        same_base=same_base,
    )


def _as_float64(value: Tensor) -> Tensor:
    """float64, or complex128 for complex values (so that `abs` is a distance for both)."""
    return value.to(torch.complex128 if value.dtype.is_complex else torch.float64)


def require_whole(**deltas: Delta) -> None:
    """Raise DeltaError if one of the deltas is an increment."""
    for label, delta in deltas.items():
        if delta.parent is not None:
            raise DeltaError(f"{label}: an increment: compose it with its parent first")


def check_same_layout(name: str, first: SparseValues, second: SparseValues) -> None:
    """Raise DeltaError if a parameter has two shapes or dtypes."""
    if (first.shape, first.dtype) != (second.shape, second.dtype):
        raise DeltaError(
            f"{name!r}: {first.dtype} {first.shape} in one delta, "
            f"{second.dtype} {second.shape} in the other: they are of different models"
        )


def _check_same_base(name: str, delta: Delta, parent: Delta) -> None:
    values, before = delta.sparse[name], parent.sparse[name]
    same_layout = (values.shape, values.dtype) == (before.shape, before.dtype)
    if not same_layout or delta.fingerprints[name] != parent.fingerprints[name]:
        raise DeltaError(f"{name!r}: the parent delta is over another base")


def _unchanged(now: Joined, then: Joined, slot: Integers, found: Mask) -> Mask:
    """(n,) bool: which entries of `now` are in `then` with the same bits in every column.

    Args:
        slot: (n,), int64. Their places in `then`, for those that are `found`, (n,) bool.
    """
    if layout_of(now.parts[0]) != layout_of(then.parts[0]):
        return np.zeros_like(found)  # Other columns than before: store all of it.
    if not then.key.size:
        return found
    same: Mask = found.copy()
    for column, before in zip(now.columns, then.columns, strict=True):
        same &= column == before[slot]
    return same


def _overlaid(names: Sequence[str], parent: Delta, increment: Delta) -> list[SparseValues]:
    """The entries of the increment, and those of the parent that it neither has nor removes."""
    before = Joined.of([parent.sparse[name] for name in names])
    new = Joined.of([increment.sparse[name] for name in names])
    kept = np.ones(before.key.shape, dtype=np.bool_)
    removed = [
        increment.removed[name].numpy() + start
        for name, start in zip(names, starts_of(before.parts).tolist(), strict=True)
        if name in increment.removed
    ]
    if removed:
        slot, found = find(np.concatenate(removed), before.key)
        kept[slot[found]] = False
    slot, found = find(new.key, before.key)
    kept[slot[found]] = False
    index = np.flatnonzero(kept)
    if not index.size:
        return list(new.parts)
    if layout_of(before.parts[0]) != layout_of(new.parts[0]):
        first = next(name for name, count in zip(names, before.counts(index), strict=True) if count)
        raise DeltaError(f"{first!r}: parent and increment do not store the same columns")
    # Where the entries of the increment come to stand among those of the parent.
    ahead = np.concatenate([[0], kept.cumsum()])  # how many of the parent's stay, before each
    place = ahead[slot + (before.key[slot] < new.key)] + np.arange(new.key.size)
    is_old = np.ones(index.size + new.key.size, dtype=np.bool_)
    is_old[place] = False
    old_place = np.flatnonzero(is_old)

    def merged(old: Array, added: Array) -> Array:
        result = np.empty(is_old.shape, dtype=old.dtype)
        result[place] = added
        result[old_place] = old[index]
        return result

    added = np.diff(new.ends, prepend=0).tolist()
    counts = [a + b for a, b in zip(before.counts(index), added, strict=True)]
    columns = [merged(*pair) for pair in zip(before.columns, new.columns, strict=True)]
    position = merged(before.position, new.position)
    return split(new.parts, counts, position, columns, layout_of(new.parts[0]))

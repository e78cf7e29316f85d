"""Relate two deltas over one base: store one as an increment over the other, compare them."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sparse_optim.delta._format import content_fingerprint
from sparse_optim.delta._tensors import bits
from sparse_optim.delta._types import Delta, DeltaError, SparseValues


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
    sparse: dict[str, SparseValues] = {}
    removed: dict[str, Tensor] = {}
    for name, values in delta.sparse.items():
        before = parent.sparse.get(name)
        if before is None:
            sparse[name] = values
            continue
        _check_same_base(name, delta, parent)
        sparse[name] = values.take(~_unchanged(values, before))
        gone = before.position[~torch.isin(before.position, values.position)]
        if gone.numel():
            removed[name] = gone
    return replace(delta, sparse=sparse, parent=content_fingerprint(parent), removed=removed)


def compose(parent: Delta, increment: Delta) -> Delta:
    """parent + increment = the whole delta, bit for bit as it was given to `increment`.

    Raises:
        DeltaError: `increment` is not an increment, or was made over another delta than `parent`.
    """
    require_whole(parent=parent)
    if increment.parent is None:
        raise DeltaError("increment: expected an increment, got a whole delta: apply it as it is")
    found = content_fingerprint(parent)
    if found != increment.parent:
        raise DeltaError(
            f"parent: the increment was made over delta {increment.parent}, got {found}"
        )
    sparse = {
        name: _overlay(name, parent, increment) if name in parent.sparse else values
        for name, values in increment.sparse.items()
    }
    return replace(increment, sparse=sparse, parent=None, removed={})


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


def _unchanged(values: SparseValues, before: SparseValues) -> Tensor:
    """(n,) bool: which entries of `values` are in `before` with the same bits in every column."""
    in_both = torch.isin(values.position, before.position)
    now = values.take(in_both)
    then = before.take(torch.isin(before.position, values.position))
    same = bits(now.value) == bits(then.value)
    for column, earlier in ((now.unmask_step, then.unmask_step), (now.original, then.original)):
        if column is None and earlier is None:
            continue
        if column is None or earlier is None:
            return torch.zeros_like(in_both)  # Other columns than before: store all of it.
        same &= bits(column) == bits(earlier)
    unchanged = in_both.clone()
    unchanged[in_both] = same
    return unchanged


def _overlay(name: str, parent: Delta, increment: Delta) -> SparseValues:
    _check_same_base(name, increment, parent)
    before, values = parent.sparse[name], increment.sparse[name]
    gone = torch.cat([values.position, increment.removed.get(name, values.position[:0])])
    kept = before.take(~torch.isin(before.position, gone))
    if kept.num_entries == 0:
        return values
    position, order = torch.cat([kept.position, values.position]).sort()
    return replace(
        values,
        position=position,
        value=_interleave(kept.value, values.value, order),
        unmask_step=_interleave_optional(name, kept.unmask_step, values.unmask_step, order),
        original=_interleave_optional(name, kept.original, values.original, order),
    )


def _interleave(old: Tensor, new: Tensor, order: Tensor) -> Tensor:
    return torch.cat([bits(old), bits(new)])[order].view(old.dtype)


def _interleave_optional(
    name: str, old: Tensor | None, new: Tensor | None, order: Tensor
) -> Tensor | None:
    if old is None and new is None:
        return None
    if old is None or new is None:
        raise DeltaError(f"{name!r}: parent and increment do not store the same columns")
    return _interleave(old, new, order)

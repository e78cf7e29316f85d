"""Compare deltas over one base: which entries they share, and where they pull in different
directions."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations

import numpy as np
import torch

from sparse_optim.delta._series import check_same_layout, require_whole
from sparse_optim.delta._shared import Base, share
from sparse_optim.delta._types import Delta
from sparse_optim.delta._values import DeltaError
from sparse_optim.delta._vectors import Floats, Vectors, vectors_of


@dataclass(frozen=True)
class Common:
    """Counts the entries that two deltas change, in one parameter or in all.

    Attributes:
        entries_a, entries_b: entries of each delta.
        both: entries in both.
        expected: entries that would be in both if each delta had drawn its entries of every
            parameter at random: the sum of entries_a * entries_b / numel over the parameters.
    """

    entries_a: int
    entries_b: int
    both: int
    expected: float

    @property
    def overlap(self) -> float:
        """both / min(entries_a, entries_b), 0 without entries."""
        smaller = min(self.entries_a, self.entries_b)
        return self.both / smaller if smaller else 0.0

    @property
    def jaccard(self) -> float:
        """both / entries of the union, 0 without entries."""
        union = self.entries_a + self.entries_b - self.both
        return self.both / union if union else 0.0


@dataclass(frozen=True)
class Agreement(Common):
    """Compares the task vectors (value - base) of two deltas, in one parameter or in all.

    Attributes:
        entries_a, entries_b, both, expected: as of `Common`.
        opposite: entries in both that move away from the base in opposite directions.
        cosine: of the two task vectors over all entries, -1 to 1; 0 if one of them is all zeros.
        cosine_both: the same over the entries in both alone.
    """

    opposite: int
    cosine: float
    cosine_both: float

    @property
    def opposite_share(self) -> float:
        """opposite / both, 0 where nothing overlaps."""
        return self.opposite / self.both if self.both else 0.0


@dataclass(frozen=True)
class Conflict:
    """How two of several deltas agree.

    Attributes:
        a, b: their indices.
        total: over all entries.
        parameters: by the names of parameters that both change.
    """

    a: int
    b: int
    total: Agreement
    parameters: Mapping[str, Agreement]


@dataclass(frozen=True)
class Comparison:
    """How two deltas compare: each `Common` is an `Agreement` where the base's values are known.

    Attributes:
        total: over all entries.
        parameters: by the names of parameters that one of them changes, or groups of these.
    """

    total: Common
    parameters: Mapping[str, Common]


def conflicts(deltas: Sequence[Delta], base: Base | None = None) -> list[Conflict]:
    """Compare the task vectors of all pairs of deltas.

    Tensors that the base lacks (heads) are left out: they have no task vector. Unlike `overlap`,
    which compares values, this needs the base.

    Args:
        deltas: at least two, over one base.
        base: as for `merge_deltas`.

    Raises:
        DeltaError: fewer than two deltas, or as `merge_deltas`.
    """
    if len(deltas) < 2:
        raise DeltaError(f"deltas: expected at least two to compare, got {len(deltas)}")
    labels = {f"deltas[{at}]": delta for at, delta in enumerate(deltas)}
    pairs = list(combinations(range(len(deltas)), 2))
    rows: list[dict[str, Floats]] = [{} for _ in pairs]
    for vectors in vectors_of(share(labels, base, heads=False)):
        for found, (a, b) in zip(rows, pairs, strict=True):
            found |= _compare(vectors, a, b)
    return [
        Conflict(
            a,
            b,
            _agreement(sum(found.values(), np.zeros(COLUMNS))),
            {name: _agreement(row) for name, row in found.items() if row[2]},
        )
        for found, (a, b) in zip(rows, pairs, strict=True)
    ]


def compare_deltas(
    delta_a: Delta,
    delta_b: Delta,
    base: Base | None = None,
    *,
    group: Callable[[str], str] = str,
) -> Comparison:
    """Compare the entries of two deltas, and where the base's values are known, their task vectors.

    They are known with `base`, or if both deltas store originals of the same base (and no NaN or
    infinite ones). Otherwise only entries are counted. Without `base`, tensors that are stored
    whole are left out.

    Args:
        base: as for `merge_deltas`.
        group: name of a parameter -> of the row that it is added to; by default its own name.

    Raises:
        DeltaError: an increment, a parameter with two shapes or dtypes, or with `base` as
            `conflicts`.
    """
    if base is None:
        if not _measurable(delta_a, delta_b):
            return _counted(delta_a, delta_b, group)
        delta_a, delta_b = _without_whole(delta_a), _without_whole(delta_b)
    rows: dict[str, Floats] = {}
    for vectors in vectors_of(share({"A": delta_a, "B": delta_b}, base, heads=False)):
        for name, row in _compare(vectors, 0, 1).items():
            rows[group(name)] = rows.get(group(name), 0) + row
    total = sum(rows.values(), np.zeros(COLUMNS))
    changed = {name: row for name, row in rows.items() if row[0] or row[1]}
    return Comparison(_agreement(total), {name: _agreement(row) for name, row in changed.items()})


def _measurable(delta_a: Delta, delta_b: Delta) -> bool:
    """Whether two deltas have task vectors by themselves: one base, originals, finite numbers."""
    common = delta_a.sparse.keys() & delta_b.sparse.keys()
    if any(delta_a.fingerprints[name] != delta_b.fingerprints[name] for name in common):
        return False
    changed = [
        values
        for delta in (delta_a, delta_b)
        for values in delta.sparse.values()
        if values.num_entries
    ]
    return bool(changed) and all(
        values.original is not None
        and values.dtype.is_floating_point
        and bool(values.value.isfinite().all() & values.original.isfinite().all())
        for values in changed
    )


def _without_whole(delta: Delta) -> Delta:
    tied = {alias: name for alias, name in delta.tied.items() if name in delta.sparse}
    return replace(delta, dense={}, dense_original={}, tied=tied)


def _counted(delta_a: Delta, delta_b: Delta, group: Callable[[str], str]) -> Comparison:
    """Entries alone, by the names that the deltas have."""
    require_whole(a=delta_a, b=delta_b)
    rows: dict[str, Floats] = {}
    for name in dict.fromkeys((*delta_a.sparse, *delta_b.sparse)):
        first, second = delta_a.sparse.get(name), delta_b.sparse.get(name)
        row = np.zeros(4)
        row[0] = first.num_entries if first else 0
        row[1] = second.num_entries if second else 0
        if first and second:
            check_same_layout(name, first, second)
            row[2] = int(torch.isin(first.position, second.position, assume_unique=True).sum())
            row[3] = row[0] * row[1] / first.numel if first.numel else 0.0
        if row[0] or row[1]:
            rows[group(name)] = rows.get(group(name), 0) + row
    total = sum(rows.values(), np.zeros(4))
    return Comparison(_common(total), {name: _common(row) for name, row in rows.items()})


# Entries of a, of b, in both, expected in both, of opposite signs; of the task vectors a b, a^2
# and b^2, and a^2 and b^2 over the entries in both.
COLUMNS = 10


def _compare(vectors: Vectors, a: int, b: int) -> dict[str, Floats]:
    """The sums of COLUMNS over the entries of each parameter."""
    names = list(vectors.layouts)
    position = np.union1d(vectors.deltas[a].position, vectors.deltas[b].position)
    sizes = [part.stop - part.start for _, part in vectors.parts(position)]
    owner = np.arange(len(names)).repeat(sizes)  # parameter of each entry of the union
    first, second = np.zeros(owner.size), np.zeros(owner.size)
    in_a, in_b = np.zeros(owner.size, dtype=np.bool_), np.zeros(owner.size, dtype=np.bool_)
    for at, tau, inside in ((a, first, in_a), (b, second, in_b)):
        slot = position.searchsorted(vectors.deltas[at].position)
        tau[slot] = vectors.deltas[at].tau
        inside[slot] = True
    product, both = first * second, in_a & in_b
    squares = first**2, second**2
    columns = [in_a, in_b, both, np.zeros(0), product < 0, product, *squares]
    columns += [square * both for square in squares]
    sums = [
        np.bincount(owner[: column.size], weights=column, minlength=len(names))
        for column in columns
    ]
    numel = np.array([max(layout.numel, 1) for layout in vectors.layouts.values()])
    sums[3] = sums[0] * sums[1] / numel
    return dict(zip(names, np.stack(sums, axis=1), strict=True))


def _common(row: Floats) -> Common:
    entries_a, entries_b, both = (int(number) for number in row[:3])
    return Common(entries_a, entries_b, both, float(row[3]))


def _agreement(row: Floats) -> Agreement:
    entries_a, entries_b, both = (int(number) for number in row[:3])
    return Agreement(
        entries_a,
        entries_b,
        both,
        expected=float(row[3]),
        opposite=int(row[4]),
        cosine=_cosine(row[5], row[6] * row[7]),
        cosine_both=_cosine(row[5], row[8] * row[9]),
    )


def _cosine(product: float, squares: float) -> float:
    norms = float(np.sqrt(squares))
    cosine = float(product) / norms if norms else 0.0
    return max(-1.0, min(1.0, cosine))

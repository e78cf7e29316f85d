"""Report where deltas over one base pull in different directions, before merging them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from sparse_optim.delta._shared import Base, share
from sparse_optim.delta._types import Delta, DeltaError
from sparse_optim.delta._vectors import Floats, Vectors, vectors_of


@dataclass(frozen=True)
class Agreement:
    """Compares the task vectors (value - base) of two deltas, in one parameter or in all.

    Attributes:
        entries_a, entries_b: entries of each delta.
        both: entries in both.
        opposite: entries in both that move away from the base in opposite directions.
        cosine: of the two task vectors over all entries, -1 to 1; 0 if one of them is all zeros.
    """

    entries_a: int
    entries_b: int
    both: int
    opposite: int
    cosine: float

    @property
    def overlap(self) -> float:
        """both / min(entries_a, entries_b), 0 without entries."""
        smaller = min(self.entries_a, self.entries_b)
        return self.both / smaller if smaller else 0.0

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


COLUMNS = 7  # entries of a, of b, in both, of opposite signs; a b, a^2, b^2 of the task vectors


def _compare(vectors: Vectors, a: int, b: int) -> dict[str, Floats]:
    """The sums of COLUMNS over the entries of each parameter."""
    names = list(vectors.layouts)
    sizes = [part.stop - part.start for _, _, part in vectors.parts(vectors.position)]
    owner = np.arange(len(names)).repeat(sizes)  # parameter of each entry of the union
    first, second = np.zeros(owner.size), np.zeros(owner.size)
    in_a, in_b = np.zeros(owner.size, dtype=np.bool_), np.zeros(owner.size, dtype=np.bool_)
    for at, tau, inside in ((a, first, in_a), (b, second, in_b)):
        tau[vectors.slots[at]] = vectors.task_vector(at)
        inside[vectors.slots[at]] = True
    product = first * second
    sums = [
        np.bincount(owner, weights=column, minlength=len(names))
        for column in (in_a, in_b, in_a & in_b, product < 0, product, first**2, second**2)
    ]
    return dict(zip(names, np.stack(sums, axis=1), strict=True))


def _agreement(row: Floats) -> Agreement:
    entries_a, entries_b, both, opposite = (int(number) for number in row[:4])
    norms = float(np.sqrt(row[5] * row[6]))
    cosine = float(row[4]) / norms if norms else 0.0
    return Agreement(entries_a, entries_b, both, opposite, max(-1.0, min(1.0, cosine)))

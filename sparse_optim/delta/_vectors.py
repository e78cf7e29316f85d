"""Task vectors as arrays over the union of the entries that several deltas change.

    tau_i = value_i - base        float64, at the entries of delta i; 0 elsewhere

A group of parameters of one dtype at a time: they follow one another in one range of flat
positions, so that a step of a merge is one operation over all of them. Memory and time grow with
the entries of the deltas, not with the model.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sparse_optim.delta._shared import Shared
from sparse_optim.delta._tensors import Tensors, gather
from sparse_optim.delta._values import DeltaError, SparseValues

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]
Mask = NDArray[np.bool_]

# Entries of all deltas together: enough that calls cost little beside the work, few enough that
# the arrays stay in the cache and their memory is used again.
GROUP_ENTRIES = 1 << 15
# Entries on which torch works in one thread. Longer arrays are taken in pieces: threads that wait
# for each other made a merge ten times as long on a busy machine.
ONE_THREAD = 1 << 15


@dataclass(frozen=True)
class Vectors:
    """Deltas as arrays; u entries are in their union, n_i in delta i.

    Attributes:
        layouts: an example of each parameter's values, all of one dtype, in the order of the flat
            range.
        starts: (parameters + 1,), int64. Where each parameter begins in the flat range.
        position: (u,), int64, ascending. Places in the flat range.
        base: (u,), float64.
        slots: (n_i,), int64, ascending. Places of the entries of delta i in `position`.
        values: (n_i,), float64. Final values of delta i.
    """

    layouts: dict[str, SparseValues]
    starts: Integers
    position: Integers
    base: Floats
    slots: tuple[Integers, ...]
    values: tuple[Floats, ...]

    @property
    def dtype(self) -> torch.dtype:
        """Of the parameters."""
        return next(iter(self.layouts.values())).dtype

    def task_vector(self, index: int) -> Floats:
        """tau of a delta at its entries, (n_i,) float64."""
        tau: Floats = self.values[index] - self.base[self.slots[index]]
        return tau

    def parts(self, position: Integers) -> Iterator[tuple[str, int, slice]]:
        """Each parameter's name, its start in the flat range, and its part of `position`.

        Args:
            position: (n,), int64, ascending. Places in the flat range.
        """
        edges = pairwise(position.searchsorted(self.starts).tolist())
        for name, start, part in zip(self.layouts, self.starts[:-1].tolist(), edges, strict=True):
            yield name, start, slice(*part)


def vectors_of(shared: Shared) -> Iterator[Vectors]:
    """The task vectors of deltas over one base, by groups of parameters.

    The order is by dtype, then by name, so that the order of a delta's entries depends on it alone.

    Raises:
        DeltaError: a value or the base's value is NaN or infinite.
    """
    layouts: dict[str, SparseValues] = {}
    sizes: Counter[str] = Counter()
    for changes in shared.changes:
        layouts |= changes
        sizes.update({name: values.num_entries for name, values in changes.items()})
    group: dict[str, SparseValues] = {}
    entries = 0
    for name, layout in sorted(layouts.items(), key=lambda item: (str(item[1].dtype), item[0])):
        other = group and next(iter(group.values())).dtype != layout.dtype
        if other or entries >= GROUP_ENTRIES:
            yield _vectors(shared, group)
            group, entries = {}, 0
        group[name] = layout
        entries += sizes[name]
    if group:
        yield _vectors(shared, group)


def _vectors(shared: Shared, layouts: dict[str, SparseValues]) -> Vectors:
    starts = np.cumsum([0, *(layout.numel for layout in layouts.values())], dtype=np.int64)
    present = [[sparse.get(name) for name in layouts] for sparse in shared.changes]
    position, slots = _union([_flat_positions(parts, starts) for parts in present])
    values = tuple(
        as_floats([part.value for part in parts if part is not None]) for parts in present
    )
    vectors = Vectors(layouts, starts, position, np.zeros(position.size), slots, values)
    if shared.base is not None:
        vectors.base[:] = _base_values(shared.base, vectors)
    else:
        for slot, parts in zip(slots, present, strict=True):
            there = [part.original for part in parts if part is not None]
            originals = [each for each in there if each is not None]  # None only without entries
            vectors.base[slot] = as_floats(originals)
    _check_finite(vectors)
    return vectors


def _base_values(tensors: Tensors, vectors: Vectors) -> Floats:
    return as_floats(
        [
            gather(tensors[name], torch.from_numpy(vectors.position[part] - start))
            for name, start, part in vectors.parts(vectors.position)
            if part.start < part.stop
        ]
    )


def _union(positions: Sequence[Integers]) -> tuple[Integers, tuple[Integers, ...]]:
    """The union of ascending arrays, ascending, and the place of each entry in it.

    The stable sort merges runs that are sorted already.
    """
    joined = np.concatenate(positions)
    order = joined.argsort(kind="stable")
    ascending = joined[order]
    first = np.ones(joined.size, dtype=np.bool_)
    first[1:] = ascending[1:] != ascending[:-1]
    slots = np.empty(joined.size, dtype=np.int64)
    slots[order] = first.cumsum() - 1
    ends = np.cumsum([array.size for array in positions])
    return ascending[first], tuple(np.split(slots, ends[:-1]))


def _flat_positions(parts: Sequence[SparseValues | None], starts: Integers) -> Integers:
    """Places in the flat range of the entries of one delta; None: it leaves a parameter as it is"""
    there = [part for part in parts if part is not None]
    if not there:
        return np.empty(0, dtype=np.int64)
    counts = [0 if part is None else part.num_entries for part in parts]
    flat: Integers = starts[:-1].repeat(counts)
    flat += torch.cat([part.position for part in there]).numpy()
    return flat


def as_floats(tensors: Sequence[Tensor]) -> Floats:
    """The values of floating-point tensors as one float64 array, exactly."""
    if not tensors:
        return np.zeros(0)
    joined = torch.cat(list(tensors))
    if joined.dtype in (torch.float32, torch.float64):
        return joined.numpy().astype(np.float64)
    return np.concatenate([piece.double().numpy() for piece in joined.split(ONE_THREAD)])


def _check_finite(vectors: Vectors) -> None:
    if all(np.isfinite(array).all() for array in (vectors.base, *vectors.values)):
        return
    wrong = ~np.isfinite(vectors.base)
    for slot, value in zip(vectors.slots, vectors.values, strict=True):
        wrong[slot] |= ~np.isfinite(value)
    place = vectors.position[wrong.argmax()]
    at = int(vectors.starts.searchsorted(place, side="right")) - 1
    raise DeltaError(
        f"{list(vectors.layouts)[at]!r}: NaN or infinite at position {place - vectors.starts[at]}, "
        "in a delta or in the base: it can be neither merged nor compared"
    )

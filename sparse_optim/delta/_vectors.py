"""What deltas over one base change, as arrays.

    tau = value - base        float64: the task vector of a delta, at its entries; 0 elsewhere

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
from sparse_optim.delta._tensors import Tensors, bits, gather
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
NUMPY_HAS = (torch.float64, torch.float32)


@dataclass(frozen=True)
class TaskVector:
    """What a delta changes in a group of parameters: n entries.

    Attributes:
        position: (n,), int64, ascending. Places in the flat range.
        value: (n,), the parameters' dtype, on the host. Final values.
        base: (n,), as `value`.
    """

    position: Integers
    value: Tensor
    base: Tensor

    @property
    def tau(self) -> Floats:
        """(n,), float64."""
        return as_floats(self.value) - as_floats(self.base)


@dataclass(frozen=True)
class Vectors:
    """The task vectors of several deltas in a group of parameters.

    Attributes:
        layouts: an example of each parameter's values, all of one dtype, in the order of the flat
            range.
        starts: (parameters + 1,), int64. Where each parameter begins in the flat range.
        deltas: of each delta, without entries too.
    """

    layouts: dict[str, SparseValues]
    starts: Integers
    deltas: tuple[TaskVector, ...]

    @property
    def dtype(self) -> torch.dtype:
        """Of the parameters."""
        return next(iter(self.layouts.values())).dtype

    def parts(self, position: Integers) -> Iterator[tuple[str, slice]]:
        """Each parameter's name and its part of `position`, (n,), int64, ascending."""
        edges = pairwise(position.searchsorted(self.starts).tolist())
        return zip(self.layouts, (slice(*each) for each in edges), strict=True)

    def locate(self, place: int) -> tuple[str, int]:
        """The parameter that has a place of the flat range, and the position in it."""
        at = int(self.starts.searchsorted(place, side="right")) - 1
        return list(self.layouts)[at], place - int(self.starts[at])


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
    dtype = next(iter(layouts.values())).dtype
    present = [[sparse.get(name) for name in layouts] for sparse in shared.changes]
    bases: Sequence[Sequence[Tensor | None]] = (
        [[part.original for part in parts if part is not None] for parts in present]
        if shared.base is None
        else _base_values(shared.base, list(layouts), present)
    )
    deltas = tuple(
        TaskVector(
            _flat_positions(parts, starts),
            _concatenated([part.value for part in parts if part is not None], dtype),
            _concatenated(base, dtype),
        )
        for parts, base in zip(present, bases, strict=True)
    )
    vectors = Vectors(layouts, starts, deltas)
    _check_finite(vectors)
    return vectors


def _base_values(
    tensors: Tensors, names: Sequence[str], present: Sequence[Sequence[SparseValues | None]]
) -> list[list[Tensor]]:
    """The base's values at the entries of each delta, by parameter; each tensor is read once."""
    found: list[list[Tensor]] = [[] for _ in present]
    for name, parts in zip(names, zip(*present, strict=True), strict=True):
        position = [torch.empty(0, dtype=torch.int64) if p is None else p.position for p in parts]
        counts = [each.numel() for each in position]
        if not any(counts):
            continue
        values = gather(tensors[name], torch.cat(position))
        for pieces, piece in zip(found, values.split(counts), strict=True):
            pieces.append(piece)
    return found


def _concatenated(parts: Sequence[Tensor | None], dtype: torch.dtype) -> Tensor:
    """The parts one after the other; None has no entries."""
    there = [part for part in parts if part is not None]
    return torch.cat(there) if there else torch.empty(0, dtype=dtype)


def _flat_positions(parts: Sequence[SparseValues | None], starts: Integers) -> Integers:
    """Places in the flat range of the entries of one delta; None: it leaves a parameter as it is"""
    there = [part for part in parts if part is not None]
    if not there:
        return np.empty(0, dtype=np.int64)
    counts = [0 if part is None else part.num_entries for part in parts]
    flat: Integers = starts[:-1].repeat(counts)
    flat += torch.cat([part.position for part in there]).numpy()
    return flat


def take(values: Tensor, index: Integers | Mask) -> Tensor:
    """values[index] of a tensor on the host, (n,), in one thread."""
    return torch.from_numpy(bits(values).numpy()[index]).view(values.dtype)


def as_floats(values: Tensor) -> Floats:
    """The values of a floating-point tensor, (n,), in float64, exactly."""
    if values.dtype in NUMPY_HAS:
        return values.numpy().astype(np.float64)
    return np.concatenate([piece.double().numpy() for piece in values.split(ONE_THREAD)])


def finite(values: Tensor) -> Mask:
    """Which values of a floating-point tensor, (n,), are neither NaN nor infinite."""
    found: Mask = np.isfinite(values.numpy() if values.dtype in NUMPY_HAS else as_floats(values))
    return found


def _check_finite(vectors: Vectors) -> None:
    for each in vectors.deltas:
        right = finite(each.value), finite(each.base)
        if not (right[0].all() and right[1].all()):
            name, at = vectors.locate(int(each.position[(right[0] & right[1]).argmin()]))
            raise DeltaError(
                f"{name!r}: NaN or infinite at position {at}, in a delta or in the base: it can be "
                "neither merged nor compared"
            )

"""The entries of many parameters as one array each, for operations on whole deltas.

A delta of a transformer has hundreds of parameters with a few hundred entries each: an operation
on each would take longer than hashing them. So parameters of one dtype follow one another in one
range of flat positions, keys, and an operation is one over all of them: in numpy, whose single
thread does not wait for others.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from sparse_optim.delta._tensors import bits
from sparse_optim.delta._values import MAX_NUMEL, SparseValues, unchecked

Array = NDArray[Any]
Integers = NDArray[np.int64]
Mask = NDArray[np.bool_]
BLOCK = 2048  # keys that are looked up at once, so that where they can be stays in the cache
Layout = tuple[torch.dtype, bool, bool]


def layout_of(values: SparseValues) -> Layout:
    """dtype, and whether there are unmask steps and originals: equal for what can be joined."""
    return values.dtype, values.unmask_step is not None, values.original is not None


def groups(*deltas: Mapping[str, SparseValues]) -> Iterator[list[str]]:
    """The names that all `deltas` have, in their order in the first, by groups of parameters that
    can be joined in each of the deltas."""
    found: dict[object, list[str]] = {}
    entries, part = 0, 0
    for name, values in deltas[0].items():
        others = [delta.get(name) for delta in deltas[1:]]
        if None in others:
            continue
        entries += values.numel
        if entries > MAX_NUMEL:  # a key would not fit in int64
            entries, part = values.numel, part + 1
        layouts = [layout_of(each) for each in (values, *others) if each is not None]
        found.setdefault((part, *layouts), []).append(name)
    yield from found.values()


@dataclass(frozen=True)
class Joined:
    """n entries of several parameters of one layout.

    Attributes:
        parts: the parameters.
        position: (n,), int64.
        key: (n,), int64, strictly ascending: position + the start of the parameter in the range.
        ends: (parameters,), int64. Where the entries of each parameter end.
        columns: (n,) each: bits of the values, unmask steps and bits of the originals, as far as
            the layout has them.
    """

    parts: Sequence[SparseValues]
    position: Integers
    key: Integers
    ends: Integers
    columns: tuple[Array, ...]

    @classmethod
    def of(cls, parts: Sequence[SparseValues]) -> Joined:
        """At least one parameter, all of one layout."""
        counts = np.array([each.num_entries for each in parts])
        position = torch.cat([each.position for each in parts]).numpy()
        key = starts_of(parts).repeat(counts)
        key += position
        columns = [torch.cat([each.value for each in parts])]
        for name in ("unmask_step", "original"):
            if getattr(parts[0], name) is not None:
                columns.append(torch.cat([getattr(each, name) for each in parts]))
        as_bits = tuple(bits(column).numpy() for column in columns)
        return cls(parts, position, key, counts.cumsum(), as_bits)

    def take(self, index: Integers) -> list[SparseValues]:
        """The entries at `index`, (k,) ascending, by parameter."""
        columns = [column[index] for column in self.columns]
        layout = layout_of(self.parts[0])
        return split(self.parts, self.counts(index), self.position[index], columns, layout)

    def counts(self, index: Integers) -> list[int]:
        """How many of the entries at `index`, (k,) ascending, each parameter has."""
        found: list[int] = np.diff(index.searchsorted(self.ends), prepend=0).tolist()
        return found


def starts_of(parts: Sequence[SparseValues]) -> Integers:
    """(parameters,), int64: where each begins in the range of keys."""
    numel = np.array([each.numel for each in parts])
    starts: Integers = numel.cumsum() - numel
    return starts


def split(
    parts: Sequence[SparseValues],
    counts: list[int],
    position: Integers,
    columns: Sequence[Array],
    layout: Layout,
) -> list[SparseValues]:
    """Entries of several parameters, one after the other, as values of each.

    Args:
        parts: the parameters, of one dtype.
        counts: entries of each.
        position: (n,), int64; ascending in each parameter.
        columns: (n,) each, as of `Joined`.
        layout: of the result.
    """
    dtype, has_steps, has_originals = layout
    dtypes = [dtype, *[torch.int32] * has_steps, *[dtype] * has_originals]
    pieces = [
        torch.from_numpy(column).view(of).split(counts)
        for column, of in zip(columns, dtypes, strict=True)
    ]
    none = [None] * len(parts)
    return [
        unchecked(part, position=at, value=value, unmask_step=step, original=original)
        for part, at, value, step, original in zip(
            parts,
            torch.from_numpy(position).split(counts),
            pieces[0],
            pieces[1] if has_steps else none,
            pieces[-1] if has_originals else none,
            strict=True,
        )
    ]


def find(key: Integers, among: Integers) -> tuple[Integers, Mask]:
    """Where keys are among others.

    Args:
        key: (n,), ascending.
        among: (m,), strictly ascending.

    Returns:
        slot, (n,) int64: the place of each key in `among`, or any other one; found, (n,) bool.
    """
    slot = np.zeros(key.shape, dtype=np.int64)
    if not among.size:
        return slot, np.zeros(key.shape, dtype=np.bool_)
    begin = np.arange(0, key.size, BLOCK)
    edges = [*among.searchsorted(key[begin]).tolist(), among.size]
    for at, (first, last) in zip(begin.tolist(), pairwise(edges), strict=True):
        block = slice(at, at + BLOCK)
        slot[block] = among[first:last].searchsorted(key[block])
        slot[block] += first
    np.minimum(slot, among.size - 1, out=slot)
    found: Mask = among[slot] == key
    return slot, found

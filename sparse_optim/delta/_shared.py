"""Bring several deltas onto one base: the same names, and every tensor as changed entries.

Names may differ between deltas as they may between a delta and its base (`_names`). A tensor that
is tied in one of the deltas has one name in all. A tensor that a delta stores whole becomes the
entries in which it differs from the base; one that the base lacks (a fresh head) stays whole.
"""

import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from sparse_optim.delta._apply import check_base
from sparse_optim.delta._fingerprint import fingerprint
from sparse_optim.delta._folder import FolderTensors
from sparse_optim.delta._names import Naming, match_names, renamed, untied
from sparse_optim.delta._tensors import Model, Tensors, named_tensors, same_bits
from sparse_optim.delta._types import Delta, changed_entries
from sparse_optim.delta._values import DeltaError, SparseValues

Base = Model | str | os.PathLike[str]


@dataclass(frozen=True)
class Shared:
    """Deltas over one base.

    Attributes:
        changes: of each delta, changed entries by name. Shapes, dtypes and bases agree.
        fingerprints: of the base's tensors, for all names in `changes`.
        base: the base's tensors by these names; None: every entry in `changes` has an original.
        whole: tensors that the base lacks.
        tied: further names of tensors.
    """

    changes: tuple[Mapping[str, SparseValues], ...]
    fingerprints: Mapping[str, str]
    base: Tensors | None
    whole: Mapping[str, Tensor]
    tied: Mapping[str, str]


def share(
    deltas: Mapping[str, Delta], base: Base | None, keep: str | None = None, heads: bool = True
) -> Shared:
    """Bring deltas onto one base.

    Args:
        deltas: by what messages call them.
        base: a module, a mapping of tensors, or a model folder, which is read file by file;
            None to take the base's values from the deltas.
        keep: the delta whose whole tensors to keep where several deltas have different ones.
        heads: whether the result has whole tensors at all.

    Raises:
        DeltaError: an increment, another base, deltas that do not fit each other, or originals
            that are not stored.
    """
    for label, delta in deltas.items():
        if delta.parent is not None:
            raise DeltaError(f"{label}: an increment: compose it with its parent first")
    parts, tensors = _with_base_names(list(deltas.values()), base)
    parts, tied = _with_one_name_each(parts)
    named = dict(zip(deltas, parts, strict=True))
    prints = _checked_fingerprints(named, tensors)
    changes: list[Mapping[str, SparseValues]] = []
    whole: dict[str, dict[str, Tensor]] = {}
    for label, delta in named.items():
        sparse = dict(delta.sparse)
        for name, tensor in delta.dense.items():
            before = _before(label, name, delta, tensors)
            if before is None or not tensor.is_floating_point():
                whole.setdefault(name, {})[label] = tensor
                continue
            sparse[name] = _as_entries(name, before, tensor)
            found = prints.setdefault(name, fingerprint(before))
            if found != fingerprint(before):
                raise DeltaError(f"{label}: {name!r} is of another base than in the other deltas")
        _check_arithmetic(label, sparse, tensors is None)
        changes.append(sparse)
    _check_layouts(deltas, changes)
    kept = {name: _kept(name, found, keep) for name, found in whole.items()} if heads else {}
    both = kept.keys() & prints.keys()
    if both:
        raise DeltaError(
            f"{min(both)!r}: a delta changes entries of it, and {' and '.join(whole[min(both)])} "
            "hold it whole, in another shape or without the base's values: give the base, or leave "
            "one of the deltas out"
        )
    return Shared(tuple(changes), prints, tensors, kept, tied)


def _with_base_names(
    deltas: Sequence[Delta], base: Base | None
) -> tuple[list[Delta], Tensors | None]:
    """The deltas and the base's tensors, by the same names."""
    if base is None:
        return list(deltas), None
    tensors: Tensors = (
        named_tensors(base) if isinstance(base, nn.Module | Mapping) else FolderTensors(base)
    )
    namings = [match_names(delta, tensors, isinstance(base, nn.Module)) for delta in deltas]
    names = namings[0].base
    for naming in namings:  # a delta with a head gives a bare encoder the model's names
        if any(old != new for old, new in naming.base.items()):
            names = naming.base
    namings = [_with_names(naming, names) for naming in namings]
    fitted = [
        # What is named alike keeps its tied names, also those that the base lacks.
        delta if all(old == new for old, new in naming.delta.items()) else renamed(delta, naming)
        for delta, naming in zip(deltas, namings, strict=True)
    ]
    if isinstance(base, str | os.PathLike):
        return fitted, FolderTensors(base, names)
    return fitted, {names[name]: tensor for name, tensor in tensors.items()}


def _with_names(naming: Naming, names: Mapping[str, str]) -> Naming:
    """The naming with other names of the base's tensors."""
    stored = {new: old for old, new in naming.base.items()}
    ours = {
        name: names[stored[new]] if new in stored else new for name, new in naming.delta.items()
    }
    return replace(naming, delta=ours, base=names)


def _with_one_name_each(deltas: Sequence[Delta]) -> tuple[list[Delta], dict[str, str]]:
    """The deltas without tied names, and the tied names of all.

    If one of the deltas has different values under two names that are tied in another, every
    delta gets its values under each of its names.
    """
    first: dict[str, str] = {}

    def leader(name: str) -> str:
        while name in first:
            name = first[name]
        return name

    for delta in deltas:
        for pair in delta.tied.items():
            alias, name = map(leader, pair)
            if alias != name:
                first[alias] = name
    names = {name: leader(name) for name in {*first, *first.values()}}
    for delta in deltas:
        stored = [names[name] for name in (*delta.sparse, *delta.dense) if name in names]
        if len(set(stored)) < len(stored):
            return [untied(delta, names) for delta in deltas], {}
    tied = {alias: name for alias, name in sorted(names.items()) if alias != name}
    return [_by_leader(delta, names) if tied else delta for delta in deltas], tied


def _by_leader(delta: Delta, names: Mapping[str, str]) -> Delta:
    return replace(
        delta,
        sparse={names.get(name, name): values for name, values in delta.sparse.items()},
        fingerprints={names.get(name, name): text for name, text in delta.fingerprints.items()},
        dense={names.get(name, name): tensor for name, tensor in delta.dense.items()},
        dense_original={
            names.get(name, name): tensor for name, tensor in delta.dense_original.items()
        },
        tied={},
    )


def _checked_fingerprints(deltas: Mapping[str, Delta], tensors: Tensors | None) -> dict[str, str]:
    """The base fingerprints of all sparse parameters, each compared with the base once."""
    prints: dict[str, str] = {}
    for label, delta in deltas.items():
        for name, text in delta.fingerprints.items():
            if prints.get(name, text) != text:
                raise DeltaError(
                    f"{label}: {name!r} has another base fingerprint than in the other deltas: "
                    "only deltas over one base can be merged"
                )
        if tensors is not None:
            check_base(tensors, delta, [name for name in delta.sparse if name not in prints])
        prints |= delta.fingerprints
    return prints


def _before(label: str, name: str, delta: Delta, tensors: Tensors | None) -> Tensor | None:
    """The base's tensor for one that the delta stores whole, if it has it in that form."""
    tensor, original = delta.dense[name], delta.dense_original.get(name)
    before = original if tensors is None else tensors.get(name)
    if before is None or before.shape != tensor.shape or before.dtype != tensor.dtype:
        return None
    if original is not None and not same_bits(original, before.cpu()):
        raise DeltaError(f"{label}: {name!r} was not fine-tuned from the given base's values")
    return before


def _as_entries(name: str, before: Tensor, after: Tensor) -> SparseValues:
    values = changed_entries(name, before, after, store_original=True)
    if values is not None:
        return values
    none = after.new_empty(0)
    position = torch.empty(0, dtype=torch.int64)
    return SparseValues(tuple(after.shape), after.dtype, position, none, original=none)


def _check_arithmetic(label: str, sparse: Mapping[str, SparseValues], needs_original: bool) -> None:
    for name, values in sparse.items():
        if not values.dtype.is_floating_point:
            raise DeltaError(f"{label}: {name!r} is {values.dtype}, which has no task vector")
        if needs_original and values.original is None and values.num_entries:
            raise DeltaError(
                f"{label} stores no originals of {name!r}: give the base that was fine-tuned"
            )


def _check_layouts(labels: Collection[str], changes: Sequence[Mapping[str, SparseValues]]) -> None:
    known: dict[str, SparseValues] = {}
    for label, sparse in zip(labels, changes, strict=True):
        for name, values in sparse.items():
            other = known.setdefault(name, values)
            if (values.shape, values.dtype) != (other.shape, other.dtype):
                raise DeltaError(
                    f"{label}: {name!r} is {values.dtype} {values.shape}, in another delta "
                    f"{other.dtype} {other.shape}: they are of different models"
                )


def _kept(name: str, found: Mapping[str, Tensor], keep: str | None) -> Tensor:
    """The one tensor that the deltas hold, or that of `keep`."""
    first = next(iter(found.values()))
    if all(same_bits(first, tensor) for tensor in found.values()):
        return first
    if keep is not None and keep in found:
        return found[keep]
    raise DeltaError(
        f"{name!r}: {' and '.join(sorted(found))} hold different tensors without a common start "
        "(fresh heads?), which cannot be added up: name the delta whose tensors to keep "
        "(dense=INDEX, or --dense in `sparse-optim merge`)"
    )

"""Merge deltas over one base into one delta, and take one out again."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from sparse_optim.delta._combine import (
    Chooser,
    Part,
    Recipe,
    combine,
    keep_at_random,
    keep_largest,
)
from sparse_optim.delta._content import known_fingerprint
from sparse_optim.delta._joined import split
from sparse_optim.delta._shared import Base, Shared, share
from sparse_optim.delta._tensors import bits
from sparse_optim.delta._types import Delta, check_delta
from sparse_optim.delta._values import DeltaError, SparseValues
from sparse_optim.delta._vectors import TaskVector, Vectors, finite, vectors_of


def merge_deltas(
    deltas: Sequence[Delta],
    base: Base | None = None,
    *,
    method: str = "sum",
    weights: Sequence[float] | None = None,
    density: float | None = None,
    seed: int | None = None,
    dense: int | None = None,
    store_original: bool = False,
) -> Delta:
    """Merge deltas over one base into one delta.

        sum         theta = base + sum_i w_i (value_i - base)          at the union of the entries
        ties        trim each delta, elect a sign for each entry, take the mean of those that agree
        dare        drop entries at random, divide the others by `density`, then sum
        dare-ties   drop and divide, then elect and take the mean

    Computed in float64 and rounded once to the parameter's dtype. An entry to which one delta alone
    contributes, with weight 1, keeps that delta's bits. Entries that end at the base's value are
    left out. Time and memory grow with the entries of the deltas; the base's touched tensors are
    read once, to check their fingerprints. The order of the deltas makes no difference.

    A tensor that a delta stores whole counts as the entries in which it differs from the base. One
    that the base lacks (a fresh head) is copied, and may not differ between deltas, see `dense`.
    `base` must be as it was before training, without a fresh head of its own.

    Args:
        deltas: at least one, over one base.
        base: a module or state dict (float dtypes of the deltas), or a folder of safetensors,
            of which one file at a time is in memory. None: the deltas store originals.
        weights: one for each delta, 1 by default; negative ones take a task away.
        density: ties: share of each delta's entries that stays, the largest changes (1 by
            default); dare: the same, drawn at random (required). In (0, 1]. It is a share of the
            entries that the delta changes, not of the model's.
        seed: of dare, 0 by default. What a delta loses depends on the seed and the delta alone.
        dense: index of the delta to keep tensors of, where deltas have different ones that the
            base lacks. Its note of the model (`method["model"]`) is kept as well.
        store_original: keep the base's values, so that `revert_delta` works.

    Returns:
        A delta over the same base. Its `method` records the recipe, and the content fingerprint
        and weight of every input.

    Raises:
        DeltaError: another base or different bases, wrong settings, an increment, integer or
            complex entries, NaN or infinite ones, different heads, or a result that overflows.
        TypeError: one of `deltas` is not a Delta.

    References: Ilharco et al. 2023, arXiv 2212.04089; Yadav et al. 2023, arXiv 2306.01708;
    Yu et al. 2024, arXiv 2311.03099.
    """
    for at, delta in enumerate(deltas):
        check_delta(delta, f"deltas[{at}]")
    recipe = Recipe.of(method, density, seed)
    scales = _checked_weights(weights, len(deltas))
    if dense is not None and not 0 <= dense < len(deltas):
        raise DeltaError(f"dense: expected an index below {len(deltas)}, got {dense}")
    prints = [known_fingerprint(delta) for delta in deltas]
    order = sorted(range(len(deltas)), key=lambda at: (prints[at], scales[at]))
    labels = {f"deltas[{at}]": deltas[at] for at in order}
    shared = share(labels, base, None if dense is None else f"deltas[{dense}]")
    return Delta(
        sparse=_merged(shared, recipe, [(prints[at], scales[at]) for at in order], store_original),
        dense=shared.whole,
        fingerprints=shared.fingerprints,
        method={
            "name": "merge",
            "method": recipe.method,
            "density": recipe.density,
            "seed": recipe.seed,
            "dense": None if dense is None else prints[dense],
            "inputs": [
                {
                    "fingerprint": prints[at],
                    "weight": scales[at],
                    "method": deltas[at].method.get("name"),
                }
                for at in order
            ],
            **_model_note(deltas, dense),
        },
        tied=shared.tied,
    )


def unmerge(merged: Delta, delta: Delta, rest: Sequence[Delta], base: Base | None = None) -> Delta:
    """Take one delta out of a merged one.

        unmerge(merge_deltas([*rest, delta], base), delta, rest, base) == merge_deltas(rest, base)

    bit for bit. Rounding loses what would be needed to subtract, so the others are merged again,
    by the recipe that `merged` records.

    Args:
        merged: what `merge_deltas` gave.
        delta: the input to take out.
        rest: all other inputs, in any order.
        base: as for `merge_deltas`.

    Raises:
        DeltaError: `merged` was not made by `merge_deltas`, or its inputs are not `delta` and
            `rest`; or as `merge_deltas`.
    """
    for label, each in (("merged", merged), ("delta", delta)):
        check_delta(each, label)
    record: dict[str, Any] = dict(merged.method)
    if record.get("name") != "merge":
        raise DeltaError("merged: expected a delta that a merge made")
    weights: dict[str, list[float]] = {}
    for entry in _inputs(record):
        weights.setdefault(entry["fingerprint"], []).append(entry["weight"])
    out, kept = known_fingerprint(delta), [known_fingerprint(each) for each in rest]
    if len(set(weights.get(out, ()))) > 1:
        raise DeltaError("delta: it was merged twice, with two weights: merge the others again")
    found = []
    for label, text in (("delta", out), *((f"rest[{at}]", text) for at, text in enumerate(kept))):
        if not weights.get(text):
            raise DeltaError(f"{label}: it is not an input of the merged delta, or was named twice")
        found.append(weights[text].pop())
    missing = [text for text, left in weights.items() if left]
    if missing:
        entry = next(each for each in _inputs(record) if each["fingerprint"] == missing[0])
        raise DeltaError(
            f"rest: expected all other inputs of the merge, {len(_inputs(record)) - 1}; missing is "
            f"one of method {entry.get('method')!r}, weight {entry['weight']}, fingerprint "
            f"{entry['fingerprint']}"
        )
    if not rest:
        raise DeltaError("delta: it is the only input, nothing would be left: use the base")
    return merge_deltas(
        rest,
        base,
        method=record["method"],
        weights=found[1:],
        density=None if record["method"] == "sum" else record["density"],
        seed=record["seed"],
        dense=kept.index(record["dense"]) if record["dense"] in kept else None,
        store_original=any(values.original is not None for values in merged.sparse.values()),
    )


def _inputs(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    inputs = record.get("inputs")
    keys = {"fingerprint", "weight"}
    if not isinstance(inputs, list) or not all(
        isinstance(entry, dict) and keys <= entry.keys() for entry in inputs
    ):
        raise DeltaError("merged: its list of inputs is damaged")
    if not {"method", "density", "seed", "dense"} <= record.keys():
        raise DeltaError("merged: its recipe is damaged")
    return inputs


def _checked_weights(weights: Sequence[float] | None, count: int) -> list[float]:
    if count == 0:
        raise DeltaError("deltas: expected at least one, got none")
    given = [1.0] * count if weights is None else [float(weight) for weight in weights]
    if len(given) != count:
        raise DeltaError(f"weights: expected {count}, one for each delta, got {len(given)}")
    if not all(map(math.isfinite, given)):
        raise DeltaError(f"weights: expected finite numbers, got {given}")
    return given


def _model_note(deltas: Sequence[Delta], dense: int | None) -> dict[str, object]:
    """The note of how to build the model, where all deltas have the same or `dense` names one."""
    notes = [delta.method.get("model") for delta in deltas]
    note = notes[0] if dense is None else notes[dense]
    if note is None or (dense is None and any(other != note for other in notes)):
        return {}
    return {"model": note}


def _merged(
    shared: Shared, recipe: Recipe, inputs: Sequence[tuple[str, float]], store_original: bool
) -> dict[str, SparseValues]:
    """The entries that differ from the base; `inputs`: content and weight of each delta."""
    groups: Iterable[Vectors] = vectors_of(shared)
    keep: Sequence[Chooser | None] = [None] * len(inputs)
    if recipe.seed is not None:
        keep = [keep_at_random(recipe.density, f"{recipe.seed}/{content}") for content, _ in inputs]
    elif recipe.trims:
        groups = list(groups)
        keep = [
            keep_largest([vectors.deltas[at].tau for vectors in groups], recipe.density)
            for at in range(len(inputs))
        ]
    sparse: dict[str, SparseValues] = {}
    for vectors in groups:
        with np.errstate(over="ignore", invalid="ignore"):  # `_changed` finds what overflows
            parts = [
                Part.of(vectors.deltas[at], recipe.scale(weight), keep[at])
                for at, (_, weight) in enumerate(inputs)
            ]
            result = combine(parts, recipe.elects)
        sparse |= _changed(vectors, result, store_original)
    return sparse


def _changed(vectors: Vectors, result: TaskVector, store_original: bool) -> dict[str, SparseValues]:
    """The entries of the result that differ from the base, by parameter."""
    right = finite(result.value)
    if not right.all():  # or NaN, from inf - inf
        name, _ = vectors.locate(int(result.position[right.argmin()]))
        raise DeltaError(f"{name!r}: the result overflows {vectors.dtype}: use smaller weights")
    position = result.position
    value, original = bits(result.value).numpy(), bits(result.base).numpy()
    index = np.flatnonzero(value != original)
    if index.size < position.size:
        position, value, original = position[index], value[index], original[index]
    counts = np.diff(position.searchsorted(vectors.starts))
    parts = split(
        list(vectors.layouts.values()),
        counts.tolist(),
        position - vectors.starts[:-1].repeat(counts),
        (value, original) if store_original else (value,),
        (vectors.dtype, False, store_original),
    )
    return dict(zip(vectors.layouts, parts, strict=True))

"""What `inspect` and `diff` say of deltas, as JSON values, and which deltas can be compared."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from sparse_optim.delta import Change, Common, Comparison, Delta, Overlap


def facts_of(delta: Delta) -> dict[str, Any]:
    """The contents of a delta as JSON values."""
    from sparse_optim.delta import content_fingerprint

    steps = [
        step
        for values in delta.sparse.values()
        if values.unmask_step is not None and values.num_entries
        for step in (int(values.unmask_step.min()), int(values.unmask_step.max()))
    ]
    originals = any(values.original is not None for values in delta.sparse.values())
    # A number that is not finite becomes null: the file may be of a stranger.
    method = json.loads(json.dumps(dict(delta.method)), parse_constant=lambda _: None)
    return {
        "method": method,
        "sparse_entries": delta.num_entries,
        "sparse_numel": sum(values.numel for values in delta.sparse.values()),
        "tensor_bytes": delta.nbytes,
        "unmask_steps": [min(steps), max(steps)] if steps else None,
        "originals": bool(originals or delta.dense_original),
        "fingerprint": content_fingerprint(delta),
        "parent": delta.parent,
        "removed_entries": sum(position.numel() for position in delta.removed.values()),
        "sparse": [
            {
                "name": name,
                "shape": list(values.shape),
                "dtype": str(values.dtype).removeprefix("torch."),
                "entries": values.num_entries,
                "bytes": values.nbytes,
            }
            for name, values in delta.sparse.items()
        ],
        "dense": [
            {
                "name": name,
                "shape": list(tensor.shape),
                "dtype": str(tensor.dtype).removeprefix("torch."),
                "bytes": tensor.nbytes,
            }
            for name, tensor in delta.dense.items()
        ],
    }


def change_facts(changes: Mapping[str, Change]) -> dict[str, Any]:
    """How much of each tensor changed, as JSON values."""
    return {
        name: {
            "entries": change.entries,
            "numel": change.numel,
            "share": change.share,
            "relative": None if change.relative == math.inf else change.relative,
        }
        for name, change in changes.items()
    }


def overlap_facts(a: Delta, b: Delta, found: Overlap, compared: Comparison) -> dict[str, Any]:
    """The comparison of two deltas as JSON values."""
    return {
        **asdict(found),
        "jaccard": found.jaccard,
        "dense_in_both": len(a.dense.keys() & b.dense.keys()),
        "total": common_facts(compared.total),
        "modules": {name: common_facts(part) for name, part in compared.parameters.items()},
    }


def common_facts(part: Common) -> dict[str, Any]:
    """The entries that two deltas share as JSON values; null: the base's values are not known."""
    return {
        "opposite": None,
        "cosine": None,
        "cosine_both": None,
        **asdict(part),
        "jaccard": part.jaccard,
        "share_a": part.both / part.entries_a if part.entries_a else 0.0,
        "share_b": part.both / part.entries_b if part.entries_b else 0.0,
    }


def check_related(a: Delta, b: Delta) -> None:
    """Check that comparing the entries of two deltas says something.

    Raises:
        DeltaError: they share no parameter, or none of those that both change had the same values
            in the two bases.
    """
    from sparse_optim.delta import DeltaError

    shared = _shapes(a).items() & _shapes(b).items()
    if a.sparse and b.sparse:  # heads of the same shape are no sign of the same model
        shared = {each for each in shared if each[0] in a.sparse or each[0] in b.sparse}
    if not shared:
        raise DeltaError(
            "A and B are unrelated: they have no parameter of the same name and shape in common, "
            "so they are of different models, or change different parts of one"
        )
    both = a.sparse.keys() & b.sparse.keys()
    if both and not any(a.fingerprints[name] == b.fingerprints[name] for name in both):
        raise DeltaError(
            f"A and B are unrelated: they have different bases. None of the {len(both)} parameters "
            "in both had the same values before training"
        )


def _shapes(delta: Delta) -> dict[str, tuple[int, ...]]:
    sparse = {name: values.shape for name, values in delta.sparse.items()}
    return sparse | {name: tuple(tensor.shape) for name, tensor in delta.dense.items()}


def check_related_models(base: Mapping[str, Tensor], tuned: Mapping[str, Tensor]) -> list[str]:
    """Check that two models have tensors in common; return lines on those that only one has.

    Raises:
        DeltaError: no tensor of the same name and shape is in both.
    """
    from sparse_optim.delta import DeltaError

    both = {name for name in base.keys() & tuned.keys() if base[name].shape == tuned[name].shape}
    if not both:
        raise DeltaError(
            "A and B are unrelated models: no tensor of the same name and shape is in both"
        )
    dropped, added = len(base.keys() - tuned.keys()), len(tuned.keys() - both)
    lines = []
    if dropped:
        lines.append(f"{dropped:,} tensors only in A are not in the delta")
    if added:
        lines.append(f"{added:,} tensors of B, new or of another shape, are stored whole")
    return lines

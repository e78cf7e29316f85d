"""The first entries of a delta in the order in which they were unmasked."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from sparse_optim.delta._joined import Joined, groups
from sparse_optim.delta._values import SparseValues


def first_entries(sparse: Mapping[str, SparseValues], budget: int) -> dict[str, SparseValues]:
    """The first `budget` entries in (unmask_step, parameter order, position) order.

    Args:
        sparse: every parameter with entries has unmask steps.
        budget: >= 0.
    """
    steps = [values.unmask_step for values in sparse.values() if values.unmask_step is not None]
    step = torch.cat([torch.empty(0, dtype=torch.int32), *steps]).numpy()
    keep = np.ones(step.size, dtype=np.bool_)
    if budget < step.size:
        last = np.partition(step, budget)[budget]  # the step of the first entry that is left out
        keep = step < last
        same = np.flatnonzero(step == last)
        keep[same[: budget - int(keep.sum())]] = True
    ends = np.cumsum([values.num_entries for values in sparse.values()], dtype=np.int64)
    edges = dict(zip(sparse, zip([0, *ends.tolist()], ends.tolist(), strict=False), strict=True))
    found = dict(sparse)
    for names in groups(sparse):
        joined = Joined.of([sparse[name] for name in names])
        mask = (
            keep
            if len(names) == len(sparse)
            else np.concatenate([keep[slice(*edges[name])] for name in names])
        )
        found |= zip(names, joined.take(np.flatnonzero(mask)), strict=True)
    return found

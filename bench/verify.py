"""Check that a step selects the right entries, before it is timed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bench.subjects import D3_EPS, midway
from sparse_optim.backends.scoring import importance


def check_selection(params: Sequence[Tensor], budget: int, quota: int, exp: float) -> None:
    """Compare what scan and cut select with the importance of every entry.

    Raises:
        RuntimeError: if the number of entries is not `quota`, if one of them was already active, or
            if one that was left out is more important than one that was selected.
    """
    optimizer = midway(params, budget, quota, exp)
    engine = optimizer.engine
    with torch.no_grad():
        engine.begin(optimizer.param_groups)
        bound = engine.bind([])
        engine.scan(bound)
        engine.cut(bound)
        new = engine.work.new
        count = int(new.count)
        tensor, position = new.tensor[:count], new.position[:count].long()
        smallest_in, largest_out = float("inf"), 0.0
        for index, (param, grad) in enumerate(zip(engine.pool.params, bound.pool, strict=True)):
            score = importance(grad.view(-1), param.view(-1), exp, D3_EPS)
            score[engine.active.segment(index)["position"].long()] = 0
            chosen = position[tensor == index]
            if chosen.numel():
                smallest_in = min(smallest_in, float(score[chosen].min()))
            score[chosen] = 0
            largest_out = max(largest_out, float(score.max()))
    if count != quota or not smallest_in > 0 or smallest_in < largest_out:
        raise RuntimeError(
            f"the selection is wrong for budget {budget}, quota {quota}, exp {exp}: {count} "
            f"entries of importance {smallest_in} and above, {largest_out} left out"
        )

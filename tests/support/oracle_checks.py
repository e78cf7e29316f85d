"""Compare an optimizer with the brute force of `oracle`."""

from __future__ import annotations

import math
from typing import Any

import torch
from op_cases import assert_as_exact, assert_same_bits
from oracle import Oracle

from sparse_optim import MaskedAdamW


def assert_matches(optimizer: MaskedAdamW, exact: Oracle, same: Oracle) -> None:
    """Active entries and frozen bits exactly; values and moments by the tolerance rule."""
    active = optimizer.engine.active
    assert active.progress.tolist() == [exact.step_count, exact.num_active, exact.skipped]
    values = zip(same.values(), exact.values(), strict=True)
    moments = [
        (name, same.moment(name), exact.moment(name), exact.largest**power)
        for name, power in (("exp_avg", 1), ("exp_avg_sq", 2))
    ]
    for index, (param, (value32, value64)) in enumerate(
        zip(optimizer.engine.pool.params, values, strict=True)
    ):
        mask, segment = exact.mask[index], active.segment(index)
        got = torch.zeros(param.numel(), dtype=torch.bool)
        got[segment["position"].long()] = True
        assert torch.equal(got.view(mask.shape), mask), "active entries"
        assert_same_bits(param.detach()[~mask], exact.initial[index][~mask], "frozen entries")
        value = segment.get("master", param.detach()[mask])
        if "master" in segment:
            assert_same_bits(param.detach()[mask], value.to(param.dtype), "rounded master values")
        assert_as_exact(value, value32[mask], value64[mask], "values")
        for name, same_dtype, moment, scale in moments:
            assert_as_exact(
                segment[name], same_dtype[index][mask], moment[index][mask], name, scale
            )


def rank_oracles(optimizer: MaskedAdamW, **options: Any) -> tuple[Oracle, Oracle]:
    """The oracle of an optimizer's pool in float64, and in float32."""
    group_of = [
        group
        for group in optimizer.param_groups
        for _ in group["params"]
        if group["unmask"] == "rank"
    ]
    engine = optimizer.engine
    return tuple(
        Oracle(
            engine.pool.params, group_of, engine.targets.tolist(), exp=optimizer.importance.exp,
            eps=optimizer.importance.eps, bias_correction=optimizer.bias_correction, dtype=dtype,
            max_grad_norm=optimizer.max_grad_norm or math.inf,
        )
        for dtype in (torch.float64, torch.float32)
    )  # fmt: skip

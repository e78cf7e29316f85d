"""MaskedAdamW against brute force, over random pools, and its promises one by one."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from op_cases import DTYPES, EXPS, assert_same_bits
from oracle_checks import assert_matches, rank_oracles
from torch.nn import Parameter
from training import give_grads

from sparse_optim import D3, Increment, MaskedAdamW, Static

KINDS = ("normal", "ties", "equal", "zeros", "rows")


@st.composite
def pools(draw: st.DrawFn) -> dict[str, Any]:
    shapes = draw(
        st.lists(
            st.sampled_from([(0,), (1,), (), (3, 5), (129,), (511,), (2, 256), (513,), (40, 30)]),
            min_size=1,
            max_size=5,
        )
    )
    total = sum(torch.Size(shape).numel() for shape in shapes)
    if total == 0:
        shapes, total = [*shapes, (2,)], 2
    return {
        "shapes": shapes,
        "dtypes": draw(st.lists(st.sampled_from(DTYPES), min_size=1, max_size=2)),
        "budget": draw(st.integers(1, total)),
        "total_steps": draw(st.integers(1, 12)),
        "kinds": draw(st.lists(st.sampled_from(KINDS), min_size=1, max_size=4)),
        "missing": draw(st.sampled_from([0.0, 0.0, 0.3])),
        "importance": D3(draw(st.sampled_from(EXPS)), draw(st.sampled_from([1e-3, 0.5, 1.0]))),
        "bias_correction": draw(st.sampled_from(["entry", "global"])),
        "static": draw(st.booleans()),
        "max_grad_norm": draw(st.sampled_from([None, 1.0])),
        "seed": draw(st.integers(0, 2**16)),
    }


def run_against_oracle(pool: dict[str, Any], backend: str) -> None:
    generator = torch.Generator().manual_seed(pool["seed"])
    params = [
        Parameter(
            torch.randn(shape, generator=generator).to(pool["dtypes"][i % len(pool["dtypes"])])
        )
        for i, shape in enumerate(pool["shapes"])
    ]
    half = len(params) // 2
    groups = [
        {"params": params[:half], "lr": 3e-3, "weight_decay": 0.2, "betas": (0.8, 0.9)},
        {"params": params[half:], "maximize": True},
    ]
    steps = pool["total_steps"]
    selection = Static(pool["budget"]) if pool["static"] else Increment(pool["budget"], steps)
    optimizer = MaskedAdamW(
        groups, lr=1e-2, importance=pool["importance"], selection=selection, backend=backend,
        bias_correction=pool["bias_correction"], max_grad_norm=pool["max_grad_norm"],
    )  # fmt: skip
    exact, same = rank_oracles(optimizer)
    for step in range(steps + 2):
        kind = pool["kinds"][step % len(pool["kinds"])]
        grads = give_grads(params, kind, generator, pool["missing"])
        if step == 2:  # a step that must be skipped
            held = [grad for grad in grads if grad is not None and grad.numel()]
            if held:
                held[-1].view(-1)[-1] = math.inf
        if all(grad is None or grad.numel() == 0 for grad in grads):
            optimizer.step()  # nothing to do: not a step
            continue
        before = [None if grad is None else grad.clone() for grad in grads]
        optimizer.step()
        factor = float(optimizer.engine.work.scalars.grad_factor)
        same.step(grads, factor=factor)
        if exact.step(grads, factor=factor):
            assert factor == pytest.approx(exact.grad_factor, rel=2**-18)
        for grad, untouched in zip(grads, before, strict=True):
            if grad is not None:
                assert_same_bits(grad, untouched, "gradients are never written")
        for group in optimizer.param_groups:  # a scheduler at work
            group["lr"] *= 0.9
    assert_matches(optimizer, exact, same)


@given(pool=pools())
@settings(max_examples=120)
def test_cpp_is_the_oracle(pool):
    pytest.importorskip("sparse_optim.backends.cpp", reason="the C++ extension has not been built")
    run_against_oracle(pool, "cpp")


@given(pool=pools())
@settings(max_examples=25)
def test_reference_is_the_oracle(pool):
    run_against_oracle(pool, "reference")

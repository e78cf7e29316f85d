"""unmask="all" is torch.optim.AdamW; so is a pool of which everything is unmasked at once.

A fault planted by hand: gradients handed to the fused kernel with strides other than their
parameter's (test_dense_groups_of_any_strides saw it).
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from op_cases import DTYPES, assert_as_exact, assert_same_bits
from torch import Tensor
from torch.nn import Parameter
from training import give_grads, new_params, snapshot, trained_params

from sparse_optim import D3, Increment, IncrementalMaskedAdamW, MaskedAdamW, Static

SHAPES = ((40, 30), (1,), (0,), (), (513,))
OPTIONS: list[dict[str, Any]] = [
    {},
    {"lr": 0.1, "betas": (0.5, 0.7), "eps": 1e-4, "weight_decay": 0.3},
    {"maximize": True},
    {"lr": torch.tensor(0.05)},
    {"lr": 0.0, "betas": (0.0, 0.0)},
]


def dense(params: list[Parameter], **options: Any) -> MaskedAdamW:
    return MaskedAdamW(
        [{"params": params, "unmask": "all"}], importance=D3(), selection=Static(1), **options
    )


@pytest.mark.parametrize("options", OPTIONS, ids=[str(index) for index in range(len(OPTIONS))])
@pytest.mark.parametrize("dtype", DTYPES)
def test_unmask_all_is_fused_adamw_bit_for_bit(dtype, options):
    ours, theirs = (new_params(*SHAPES, dtype=dtype) for _ in range(2))
    sparse = dense(ours, **options)
    adam = torch.optim.AdamW(theirs, fused=True, **options)
    generator = torch.Generator().manual_seed(0)
    for _ in range(6):
        grads = give_grads(ours, "normal", generator, missing=0.2)
        for param, grad in zip(theirs, grads, strict=True):
            param.grad = grad
        sparse.step()
        adam.step()
    for a, b in zip(ours, theirs, strict=True):
        assert_same_bits(a.detach(), b.detach())
        for name, value in adam.state[b].items():
            assert_same_bits(sparse.state[a][name], value, name)


def test_unmask_all_is_plain_adamw_within_rounding():
    ours, theirs, exact = new_params(*SHAPES), new_params(*SHAPES), new_params(*SHAPES)
    exact = [Parameter(param.detach().double()) for param in exact]
    adams = [
        torch.optim.AdamW(params, lr=0.1, weight_decay=0.3, foreach=False)
        for params in (theirs, exact)
    ]
    sparse = dense(ours, lr=0.1, weight_decay=0.3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(6):
        grads = give_grads(ours, "normal", generator)
        for a, b, grad in zip(theirs, exact, grads, strict=True):
            a.grad, b.grad = grad, grad.double()
        for optimizer in (sparse, *adams):
            optimizer.step()
    for a, b, c in zip(ours, theirs, exact, strict=True):
        assert_as_exact(a.detach(), b.detach(), c.detach())


@pytest.mark.parametrize("bias_correction", ["entry", "global"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_budget_of_everything_is_adamw(dtype, bias_correction, backend):
    """Budget N, unmasked at step 1: AdamW on float32 copies of the parameters, rounded back.

    Under the tolerance rule: no further from float64 than twice what torch's float32 is.
    """
    ours = new_params((40, 30), (513,), dtype=dtype)
    single = [Parameter(param.detach().float()) for param in ours]
    double = [Parameter(param.detach().double()) for param in ours]
    options = {"lr": 0.02, "weight_decay": 0.1, "betas": (0.9, 0.95)}
    sparse = IncrementalMaskedAdamW(
        ours,
        budget=1.0,
        total_steps=1,
        bias_correction=bias_correction,
        backend=backend,
        **options,
        unmask_steps=1.0,
    )
    adams = [torch.optim.AdamW(params, **options) for params in (single, double)]
    generator = torch.Generator().manual_seed(0)
    for _ in range(8):
        grads = give_grads(ours, "normal", generator)
        for grad in grads:
            grad[grad == 0] = 1.0
        for a, b, grad in zip(single, double, grads, strict=True):
            a.grad, b.grad = grad.float(), grad.double()
        for optimizer in (sparse, *adams):
            optimizer.step()
    assert sparse.metrics()["active"] == 1713
    for index, (param, a, b) in enumerate(zip(ours, single, double, strict=True)):
        state = sparse.engine.active.segment(index)
        value = state.get("master", param.detach().view(-1))
        assert_as_exact(value, a.detach().view(-1), b.detach().view(-1), "value")
        assert_same_bits(param.detach().view(-1), value.to(dtype))
        for name in ("exp_avg", "exp_avg_sq"):
            moments = (adam.state[p][name].view(-1) for adam, p in zip(adams, (a, b), strict=True))
            assert_as_exact(state[name], *moments, name, scale=4.0)


def test_master_values_keep_updates_that_bfloat16_loses():
    """100 steps of 1e-4 from 1.0: bfloat16 alone would stay at 1."""
    params = [Parameter(torch.ones(8, dtype=torch.bfloat16))]
    optimizer = MaskedAdamW(params, lr=1e-4, weight_decay=0.0, importance=D3(), selection=Static(8))
    for _ in range(100):
        params[0].grad = torch.ones(8, dtype=torch.bfloat16)
        optimizer.step()
    torch.testing.assert_close(optimizer.engine.active.master, torch.full((8,), 0.99))
    assert (params[0] == torch.tensor(0.99).bfloat16()).all()


@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format])
def test_dense_groups_of_any_strides(memory_format):
    """A channels_last weight moves as AdamW moves it, though its gradient has other strides."""
    initial = torch.randn(4, 3, 5, 5, generator=torch.Generator().manual_seed(0))
    ours, theirs = (
        Parameter(initial.clone().contiguous(memory_format=torch.channels_last)) for _ in range(2)
    )
    sparse, adam = dense([ours], lr=0.1), torch.optim.AdamW([theirs], lr=0.1, foreach=False)
    generator = torch.Generator().manual_seed(1)
    for _ in range(3):
        grad = torch.randn(4, 3, 5, 5, generator=generator)
        ours.grad = grad.contiguous(memory_format=memory_format)
        theirs.grad = grad.contiguous(memory_format=memory_format)
        sparse.step()
        adam.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)
    assert ours.is_contiguous(memory_format=torch.channels_last)


def test_clipping_and_skips_reach_dense_groups():
    ours, theirs = new_params((300,), (40,)), new_params((300,), (40,))
    sparse = dense(ours, lr=0.1, max_grad_norm=0.5)
    adam = torch.optim.AdamW(theirs, lr=0.1, fused=True)
    generator = torch.Generator().manual_seed(0)
    for step in range(5):
        grads = give_grads(ours, "normal", generator)
        given = [grad.clone() for grad in grads]
        for param, grad in zip(theirs, grads, strict=True):
            param.grad = grad.clone()
        torch.nn.utils.clip_grad_norm_(theirs, 0.5)
        if step == 2:
            before = snapshot(ours)
            grads[1][3] = math.nan
            sparse.step()
            for param, value in zip(ours, before, strict=True):
                assert_same_bits(param.detach(), value)
            continue
        sparse.step()
        adam.step()
        for grad, value in zip(grads, given, strict=True):
            assert_same_bits(grad, value, "gradients are never written")
    assert float(sparse.state[ours[0]]["step"]) == 4
    assert sparse.metrics()["step"] == 4
    assert sparse.metrics()["skipped_steps"] == 1
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_frozen_groups_stay_whatever_they_hold():
    """unmask="none" takes anything: integers, gradients, NaN."""
    ranked, frozen = new_params((50,), (60,))
    codes = Parameter(torch.arange(10), requires_grad=False)
    initial = snapshot([frozen, codes])
    optimizer = IncrementalMaskedAdamW(
        [{"params": [ranked]}, {"params": [frozen, codes], "unmask": "none"}],
        lr=1.0, weight_decay=0.5, budget=50, total_steps=1, unmask_steps=1.0,
    )  # fmt: skip
    ranked.grad, frozen.grad = torch.ones(50), torch.full((60,), math.nan)
    optimizer.step()
    assert optimizer.metrics()["step"] == 1
    for param, value in zip([frozen, codes], initial, strict=True):
        assert_same_bits(param.detach(), value)
    assert (ranked.detach() != snapshot(new_params((50,)))[0]).all()


def test_all_and_rank_side_by_side_do_not_disturb_each_other():
    """A fresh head beside a sparse body: each as if it were alone."""

    def train(groups: list[str]) -> dict[str, Tensor]:
        params = dict(zip(("body", "head"), new_params((200,), (30,)), strict=True))
        optimizer = IncrementalMaskedAdamW(
            [
                {"params": [params[name]], "unmask": "rank" if name == "body" else "all"}
                for name in groups
            ],
            lr=0.1, budget=50, total_steps=5, unmask_steps=1.0,
        )  # fmt: skip
        for step in range(5):
            generator = torch.Generator().manual_seed(step)
            give_grads(list(params.values()), "normal", generator)
            optimizer.step()
        return {name: params[name].detach() for name in groups}

    both, body, head = train(["body", "head"]), train(["body"]), train(["head"])
    assert_same_bits(both["body"], body["body"])
    assert_same_bits(both["head"], head["head"])


def half_dense() -> MaskedAdamW:
    """A ranked tensor, and dense ones that clipping scales."""
    params = new_params((40, 30), (1,), (513,))
    return MaskedAdamW(
        [{"params": params[:1]}, {"params": params[1:], "unmask": "all"}],
        importance=D3(), selection=Static(50), max_grad_norm=0.5,
    )  # fmt: skip


@pytest.mark.parametrize("taken", [0, 2])
def test_a_step_without_memory_moves_nothing_and_can_be_taken_again(monkeypatch, taken):
    """Clipped gradients are there before anything moves; moments are since construction."""
    whole, broken = half_dense(), half_dense()
    generators = [torch.Generator().manual_seed(0) for _ in range(2)]
    for step in range(4):
        for optimizer, generator in zip((whole, broken), generators, strict=True):
            give_grads(trained_params(optimizer), "normal", generator)
        if step == taken:
            params = trained_params(broken)
            before = [*snapshot(params), broken.engine.active.progress.clone()]

            def no_memory(*args: Any, **kwargs: Any) -> Tensor:
                raise torch.OutOfMemoryError("made up")

            with monkeypatch.context() as patch:
                patch.setattr("sparse_optim.optim.dense_groups.torch.empty_like", no_memory)
                with pytest.raises(torch.OutOfMemoryError):
                    broken.step()
            for value, old in zip([*params, broken.engine.active.progress], before, strict=True):
                assert_same_bits(value.detach(), old)
        whole.step()
        broken.step()
    for a, b in zip(trained_params(whole), trained_params(broken), strict=True):
        assert_same_bits(a.detach(), b.detach())


@pytest.mark.parametrize("backend", ["cpp", "reference"])
def test_the_norm_of_what_moves_counts_dense_gradients_where_nothing_is_ranked(backend):
    norms = []
    for norm in ("all", "active"):
        param = Parameter(torch.zeros(4))
        param.grad = torch.full((4,), 100.0)
        optimizer = MaskedAdamW(
            [{"params": [param], "unmask": "all"}], lr=1.0, eps=1e3, weight_decay=0.0,
            importance=D3(), selection=Increment(3, 5), max_grad_norm=0.1, norm=norm,
            backend=backend,
        )  # fmt: skip
        optimizer.step()
        norms.append(float(optimizer.grad_norm))
        assert float(param.detach().abs().max()) < 1e-4, norm  # clipped
        param.grad = torch.full((4,), torch.inf)
        optimizer.step()
        assert optimizer.metrics()["skipped_steps"] == 1
        assert param.isfinite().all()
    assert norms == [200.0, 200.0]

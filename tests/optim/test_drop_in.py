"""MaskedAdamW in the place of AdamW: closures, schedulers, scalers, clipping, outside writes.

A fault planted by hand: the loss scale not taken out of the gradients (test_grad_scaler saw it).
"""

from __future__ import annotations

import math

import pytest
import torch
from op_cases import assert_same_bits
from training import active_of, everything, give_grads, new_params, set_grads

from sparse_optim import D3, IncrementalMaskedAdamW, MaskedAdamW, Static


def test_closure_runs_with_gradients_and_its_loss_comes_back():
    model = torch.nn.Linear(4, 1)
    optimizer = IncrementalMaskedAdamW(
        model.parameters(), budget=2, total_steps=1, unmask_steps=1.0
    )
    seen = []

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = model(torch.ones(3, 4)).square().sum()
        loss.backward()
        seen.append(torch.is_grad_enabled())
        return loss

    loss = optimizer.step(closure)
    assert seen == [True]
    assert loss.requires_grad
    assert optimizer.metrics()["active"] == 2


def test_schedulers_drive_lr_and_betas():
    """OneCycleLR moves betas too: with every entry active this is AdamW under the same schedule."""
    ours, theirs = new_params((200,)), new_params((200,))
    sparse = MaskedAdamW(ours, lr=0.1, importance=D3(), selection=Static(200))
    adam = torch.optim.AdamW(theirs, lr=0.1)
    schedules = [
        torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=20)
        for optimizer in (sparse, adam)
    ]
    generator = torch.Generator().manual_seed(0)
    betas = set()
    for _ in range(15):
        theirs[0].grad = give_grads(ours, "normal", generator)[0]
        sparse.step()
        adam.step()
        for schedule in schedules:
            schedule.step()
        betas.add(tuple(sparse.param_groups[0]["betas"]))
    assert len(betas) > 5
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", [(), (1,)])
def test_lr_may_be_a_tensor(shape, backend):
    ours, theirs = new_params((200,), (9,)), new_params((200,), (9,))
    lr = torch.full(shape, 0.1)
    kwargs = {"importance": D3(), "selection": Static(50), "backend": backend}
    tensor = MaskedAdamW(
        [{"params": ours[:1]}, {"params": ours[1:], "unmask": "all"}], lr=lr, **kwargs
    )
    number = MaskedAdamW(
        [{"params": theirs[:1]}, {"params": theirs[1:], "unmask": "all"}], lr=0.1, **kwargs
    )
    generator = torch.Generator().manual_seed(0)
    for step in range(4):
        if step == 2:
            lr.mul_(0.5)
            for group in number.param_groups:
                group["lr"] = float(lr)
        grads = give_grads(ours, "normal", generator)
        for param, grad in zip(theirs, grads, strict=True):
            param.grad = grad.clone()
        tensor.step()
        number.step()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def test_maximize_is_minimizing_the_negative(backend):
    up, down = new_params((100,)), new_params((100,))
    kwargs = {"importance": D3(), "selection": Static(30), "backend": backend}
    ascend = MaskedAdamW(up, maximize=True, **kwargs)
    descend = MaskedAdamW(down, **kwargs)
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        down[0].grad = -give_grads(up, "normal", generator)[0]
        ascend.step()
        descend.step()
    assert_same_bits(up[0].detach(), down[0].detach())


def test_clipping_inside_is_clipping_outside():
    """max_grad_norm = clip_grad_norm_ before the step, without touching the gradients."""
    ours, theirs = new_params((300,), (40,)), new_params((300,), (40,))

    def build(params, **extra):
        return IncrementalMaskedAdamW(
            [{"params": params[:1]}, {"params": params[1:], "unmask": "all"}],
            lr=0.05, budget=90, total_steps=6, **extra, unmask_steps=1.0,
        )  # fmt: skip

    inside, outside = build(ours, max_grad_norm=0.7), build(theirs)
    generator = torch.Generator().manual_seed(0)
    for _ in range(6):
        grads = give_grads(ours, "normal", generator)
        for param, grad in zip(theirs, grads, strict=True):
            param.grad = grad.clone()
        norm = torch.nn.utils.clip_grad_norm_(theirs, 0.7)
        inside.step()
        outside.step()
        assert float(inside.grad_norm) == pytest.approx(float(norm), rel=1e-6)
        assert float(outside.grad_norm) == pytest.approx(0.7, rel=1e-5)
    assert active_of(inside) == active_of(outside)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_norm_counts_dense_groups_but_not_frozen_ones(backend):
    params = new_params((300,), (40,), (50,), dtype=torch.float16)
    optimizer = IncrementalMaskedAdamW(
        [{"params": params[:1]}, {"params": params[1:2], "unmask": "all"},
         {"params": params[2:], "unmask": "none"}],
        budget=9, total_steps=3, unmask_steps=1.0, backend=backend,
    )  # fmt: skip
    grads = give_grads(params, "normal", torch.Generator().manual_seed(0))
    optimizer.step()
    exact = math.sqrt(sum(float(grad.double().square().sum()) for grad in grads[:2]))
    assert float(optimizer.grad_norm) == pytest.approx(exact, rel=1e-6)
    assert optimizer.metrics()["grad_norm"] == float(optimizer.grad_norm)


@pytest.mark.parametrize("unscale_first", [False, True])
def test_grad_scaler(unscale_first):
    """Scaled training moves as unscaled training does; an overflow moves nothing but its count."""
    ours, theirs = new_params((300,), (40,)), new_params((300,), (40,))

    def build(params):
        return IncrementalMaskedAdamW(
            [{"params": params[:1]}, {"params": params[1:], "unmask": "all"}],
            lr=0.05, budget=90, total_steps=6, max_grad_norm=1.5, unmask_steps=1.0,
        )  # fmt: skip

    scaled, plain = build(ours), build(theirs)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=100)
    generator = torch.Generator().manual_seed(0)
    for step in range(6):
        grads = give_grads(theirs, "normal", generator)
        scaler.scale(torch.ones(()))  # as the loss of a training loop does
        for param, grad in zip(ours, grads, strict=True):
            param.grad = grad * scaler.get_scale()
        overflow = step == 3
        if overflow:
            ours[step % 2].grad[5] = math.inf
            before = everything(scaled)
        if unscale_first:
            scaler.unscale_(scaled)
        scaler.step(scaled)
        scaler.update()
        if overflow:
            for got, expected in zip(everything(scaled), before, strict=True):
                assert_same_bits(got, expected)
            assert scaler.get_scale() == 512.0
        else:
            plain.step()
            assert float(scaled.grad_norm) == pytest.approx(float(plain.grad_norm), rel=1e-6)
    assert scaled.metrics()["skipped_steps"] == 1
    assert scaled.metrics()["step"] == plain.metrics()["step"] == 5
    assert active_of(scaled) == active_of(plain)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_step_hooks_and_zero_grad_are_torchs():
    params = new_params((30,))
    optimizer = IncrementalMaskedAdamW(params, budget=3, total_steps=1, unmask_steps=1.0)
    calls = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    set_grads(params, 1.0)
    optimizer.step()
    optimizer.zero_grad()
    assert calls == ["before", "after"]
    assert params[0].grad is None


def test_autograd_notices_the_step():
    """A graph that saved the old values refuses to run backward, as after any optimizer."""
    params = new_params((30,))
    optimizer = IncrementalMaskedAdamW(params, budget=3, total_steps=1, unmask_steps=1.0)
    loss = params[0].square().sum()
    set_grads(params, 1.0)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# Parameters written from outside


def test_values_loaded_in_mid_run_replace_master_values():
    params = new_params((200,), dtype=torch.bfloat16)
    optimizer = IncrementalMaskedAdamW(
        params, lr=1e-5, weight_decay=0.0, budget=100, total_steps=2, unmask_steps=1.0
    )
    set_grads(params, 1.0)
    optimizer.step()
    loaded = torch.linspace(3, 4, 200).bfloat16()
    with torch.no_grad():
        params[0].copy_(loaded)
    optimizer.step()
    state = optimizer.engine.active.segment(0)
    taken = loaded[state["position"].long()].float()
    assert (state["master"] - taken).abs().max() < 1e-4
    assert (state["master"] != taken).any()


@pytest.mark.parametrize("how", ["in place", "data and refresh"])
@pytest.mark.parametrize("exp", [-1.0, -0.5])
def test_bounds_follow_weights_written_from_outside(exp, how, backend):
    """exp < 0 keeps the largest |param| of each tile; a stale one would hide the new winner."""
    params = new_params((4000,))
    optimizer = IncrementalMaskedAdamW(
        params, budget=4, total_steps=4, importance=D3(exp), backend=backend, unmask_steps=1.0
    )
    set_grads(params, 1.0)
    optimizer.step()
    if how == "in place":
        with torch.no_grad():
            params[0][1234] = 1e6
    else:
        params[0].data[1234] = 1e6
        optimizer.refresh()
    optimizer.step()
    assert ("group0.param0", 1234) in active_of(optimizer)


def test_refresh_adopts_values_written_through_data():
    params = new_params((50,), dtype=torch.float16)
    optimizer = MaskedAdamW(params, lr=1e-6, importance=D3(), selection=Static(50))
    set_grads(params, 1.0)
    optimizer.step()
    params[0].data.fill_(7.0)
    optimizer.refresh()
    assert (optimizer.engine.active.master == 7).all()


def test_data_that_moves_to_other_memory_is_followed():
    """`param.data = ...` changes the data_ptr between steps; nothing may be written to the old."""
    params = new_params((600,))
    optimizer = MaskedAdamW(params, lr=0.1, importance=D3(), selection=Static(600))
    set_grads(params, 1.0)
    optimizer.step()
    old = params[0].data
    kept = old.clone()
    params[0].data = old.clone()
    set_grads(params, 1.0)
    optimizer.step()
    assert_same_bits(old, kept)
    assert (params[0].detach() != kept).all()


# Reading


def test_metrics(backend):
    weight, head = new_params((300,), (4,))
    optimizer = IncrementalMaskedAdamW(
        [{"params": [("body", weight)]}, {"params": [("head", head)], "unmask": "all"}],
        budget=90, total_steps=3, backend=backend, unmask_steps=1.0,
    )  # fmt: skip
    weight.grad = torch.arange(300.0)
    optimizer.step()
    metrics = optimizer.metrics()
    state_bytes = metrics.pop("state_bytes")
    assert metrics == {
        "step": 1, "skipped_steps": 0, "active": 30, "budget": 90, "budget_left": 60,
        "threshold": 270.0, "grad_norm": pytest.approx(float(weight.grad.norm())),
        "active/body": 30,
    }  # fmt: skip
    assert 90 * (16 + 4) <= state_bytes < 90 * 40  # state and the active gradients; no N in it


def test_memory_of_state_is_of_the_budget_not_of_the_model():
    """Nothing of the size of the pool is kept: 4 bytes per tile of 512 entries are."""
    params = new_params((1_000_000,))
    optimizer = MaskedAdamW(params, importance=D3(), selection=Static(10))
    assert optimizer.metrics()["state_bytes"] < 10_000

"""fuse_backward=True: the same steps bit for bit, no gradient left, and clear refusals.

Faults planted by hand: the floor of the last step kept for the next one (test_same_bits, by a
wrong selection); squares added in the order of the hooks (test_same_bits, by the norm).
"""

from __future__ import annotations

import math

import pytest
import torch
from backward_nets import assert_same_state, build, loss_of, new_net, train_both
from op_cases import EXPS, assert_same_bits
from torch import Tensor, nn

from sparse_optim import D3, IncrementalMaskedAdamW, Linear, MaskedAdamW, Static
from sparse_optim.engine import fused_backward


@pytest.fixture
def small_batches(monkeypatch):
    """So that one step has many batches, of one tensor and of several."""
    monkeypatch.setattr(fused_backward, "BATCH_BYTES", 1 << 9)


@pytest.mark.usefixtures("small_batches")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("exp", EXPS)
def test_same_bits(backend, dtype, exp):
    """Beyond the unmasking, with skipped steps, and with entries of zero importance."""
    options = {"importance": D3(exp=exp, eps=1e-2), "backend": backend, "schedule": Linear()}
    fused, _ = train_both(dtype, 100, overflows=(4, 60), **options)
    metrics = fused.metrics()
    assert (metrics["step"], metrics["active"], metrics["skipped_steps"]) == (98, 300, 2)


@pytest.mark.usefixtures("small_batches")
@pytest.mark.slow
def test_same_bits_over_hundreds_of_steps(backend):
    options = {"backend": backend, "total_steps": 280, "budget": 900}
    fused, _ = train_both(torch.float32, 300, overflows=(50,), **options)
    assert fused.metrics()["active"] == 900


@pytest.mark.usefixtures("small_batches")
def test_same_bits_with_any_exponent():
    """The reference's pow depends on where an entry stands: equality is promised of C++ only."""
    pytest.importorskip("sparse_optim.backends.cpp", reason="the C++ extension has not been built")
    train_both(torch.float32, 30, importance=D3(exp=1.7, eps=1e-2), backend="cpp")


@pytest.mark.parametrize("clip", [math.inf, 1e-3])
def test_same_bits_with_one_batch(backend, clip):
    """Everything waits for the step; with and without clipping."""
    train_both(torch.float16, 12, backend=backend, max_grad_norm=clip)


def test_static_ranks_at_the_first_step_only(backend, monkeypatch):
    nets = [new_net(), new_net()]
    optimizers = [
        MaskedAdamW(net.parameters(), lr=0.01, importance=D3(), selection=Static(200),
                    max_grad_norm=1.0, backend=backend, fuse_backward=fuse)
        for net, fuse in zip(nets, (True, False), strict=True)
    ]  # fmt: skip
    for step in range(4):
        if step == 1:
            monkeypatch.setattr(fused_backward.FusedBackward, "_rank", None)
        for net, optimizer in zip(nets, optimizers, strict=True):
            loss_of(net, torch.Generator().manual_seed(step)).backward()
            optimizer.step()
            optimizer.zero_grad()
        assert_same_state(*optimizers, step)


def test_a_non_finite_gradient_of_a_frozen_entry_skips_the_step_when_nothing_is_left():
    param = nn.Parameter(torch.randn(50))
    optimizer = IncrementalMaskedAdamW(
        [param],
        budget=3,
        total_steps=1,
        max_grad_norm=math.inf,
        fuse_backward=True,
        unmask_steps=1.0,
    )
    (param * torch.arange(50.0)).sum().backward()
    optimizer.step()
    assert optimizer.metrics()["active"] == 3
    factors = torch.ones(50)
    factors[0] = math.nan
    before = param.detach().clone()
    (param * factors).sum().backward()
    optimizer.step()
    assert optimizer.metrics()["skipped_steps"] == 1
    assert_same_bits(param.detach(), before)


def test_gradients_are_freed_one_by_one(small_batches):
    """No more than the waiting ones, less than a batch, are alive when the next one comes."""
    net = nn.Sequential(*(nn.Linear(40, 40) for _ in range(6)))
    optimizer = IncrementalMaskedAdamW(
        net.parameters(),
        budget=5,
        total_steps=5,
        max_grad_norm=1.0,
        fuse_backward=True,
        unmask_steps=1.0,
    )
    alive = []

    def note(_: Tensor) -> None:
        held = [param.grad for param in net.parameters() if param.grad is not None]
        waiting = optimizer._fused_backward._waiting.values()
        alive.append(sum(grad.nbytes for grad in [*held, *waiting]))

    for param in net.parameters():
        param.register_hook(note)
    net(torch.randn(3, 40)).sum().backward()
    assert len(alive) == 12
    assert max(alive) < fused_backward.BATCH_BYTES


def test_schedulers_and_closures_work_as_ever():
    net = new_net()
    optimizer = build(net, fuse=True, total_steps=6)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, total_iters=6)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = loss_of(net, torch.Generator().manual_seed(0))
        loss.backward()
        return loss

    losses = []
    for _ in range(6):
        losses.append(optimizer.step(closure).item())
        schedule.step()
    assert optimizer.metrics()["step"] == 6
    assert losses[-1] < losses[0]

"""accelerate's own loop: prepare, accumulate, clip_grad_norm_; gradients are clipped once."""

from __future__ import annotations

import copy
import math
import sys

import pytest

pytest.importorskip("accelerate", reason="needs the extra 'finetune'")

import accelerate
import torch
from op_cases import assert_same_bits
from processes import start_group
from repository import ROOT
from torch import nn

from sparse_optim import IncrementalMaskedAdamW, apply_delta, load_delta
from sparse_optim.amp import GradScaler

pytestmark = pytest.mark.usefixtures("one_thread")

LIMIT, MICRO_BATCHES, STEPS = 0.02, 2, 6


def new_net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))


def optimizer_of(net: nn.Module, **options) -> IncrementalMaskedAdamW:
    given = {"lr": 0.05, "budget": 60, "total_steps": STEPS, "unmask_steps": 1.0, **options}
    return IncrementalMaskedAdamW(net.named_parameters(), **given)


def batches() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(4, 8, generator=generator) for _ in range(STEPS * MICRO_BATCHES)]


def scheduler_of(optimizer):
    return torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, STEPS)


def by_hand(clips: bool, **options) -> nn.Module:
    net = new_net()
    optimizer = optimizer_of(net, **options)
    scheduler = scheduler_of(optimizer)
    for number, data in enumerate(batches()):
        (net(data).square().mean() / MICRO_BATCHES).backward()
        if number % MICRO_BATCHES == MICRO_BATCHES - 1:
            if clips:
                nn.utils.clip_grad_norm_(net.parameters(), LIMIT)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
    return net


def by_accelerate(clips: bool, **options):
    """The loop of accelerate's documentation."""
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerate.state.GradientState._reset_state()
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=MICRO_BATCHES)
    net = new_net()
    optimizer = optimizer_of(net, model=net, **options)
    net, optimizer, scheduler = accelerator.prepare(net, optimizer, scheduler_of(optimizer))
    for data in batches():
        with accelerator.accumulate(net):
            accelerator.backward(net(data).square().mean())
            if clips and accelerator.sync_gradients:
                accelerator.clip_grad_norm_(net.parameters(), LIMIT)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
    return net, optimizer.optimizer


def same_bits(net: nn.Module, other: nn.Module) -> None:
    for got, value in zip(net.parameters(), other.parameters(), strict=True):
        assert_same_bits(got.detach(), value.detach())


@pytest.mark.parametrize(
    ("clips", "options"),
    [(False, {}), (True, {}), (False, {"max_grad_norm": LIMIT}), (True, {"max_grad_norm": LIMIT})],
)
def test_accumulation_and_clipping_are_those_of_a_plain_loop(clips, options):
    net, optimizer = by_accelerate(clips, **options)
    same_bits(net, by_hand(clips, **options))
    base = new_net()
    apply_delta(base, optimizer.delta(net))
    same_bits(base, net)
    assert optimizer.metrics()["active"] == 60


def test_clipped_twice_by_one_limit_is_clipped_once():
    """As `clip_grad_norm_` leaves a norm just below the limit, the step finds nothing to clip."""
    twice, _ = by_accelerate(True, max_grad_norm=LIMIT)
    once, _ = by_accelerate(False, max_grad_norm=LIMIT)
    free, _ = by_accelerate(False)
    for got, value in zip(twice.parameters(), once.parameters(), strict=True):
        torch.testing.assert_close(got, value, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(twice[0].weight, free[0].weight, rtol=1e-2)


def test_sampled_gradients_accumulate():
    options = {"max_grad_norm": LIMIT, "every": 2, "norm": "active"}
    sampled, optimizer = by_accelerate(False, sampled_backward=True, **options)
    assert optimizer.metrics()["active"] == 60
    for got, value in zip(
        sampled.parameters(), by_hand(False, **options).parameters(), strict=True
    ):
        torch.testing.assert_close(got, value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scaler", [GradScaler, torch.amp.GradScaler])
def test_float16_autocast_with_a_scaled_loss(scaler):
    """Beside accelerate, which scales on a GPU alone: one scale too high is skipped as a whole."""
    net = new_net()
    base, optimizer = copy.deepcopy(net), optimizer_of(net, max_grad_norm=1.0)
    scale, losses = scaler("cpu", init_scale=2.0**24), []
    for data in batches()[:STEPS] * 2:
        with torch.autocast("cpu", dtype=torch.float16):
            output = net(data)
        assert output.dtype == torch.float16
        loss = output.float().square().mean()
        scale.scale(loss).backward()
        scale.step(optimizer)
        scale.update()
        optimizer.zero_grad()
        losses.append(loss.item())
    metrics = optimizer.metrics()
    assert metrics["skipped_steps"] > 0
    assert metrics["step"] == 2 * STEPS - metrics["skipped_steps"]
    assert math.isfinite(metrics["grad_norm"])
    assert losses[-1] < losses[0]
    apply_delta(base, optimizer.delta(net, finished=False))
    same_bits(base, net)


def test_the_fsdp2_plugin_from_prepare_to_load_state(tmp_path):
    """Sharded, accumulated, clipped, saved in mid-unmasking and resumed bit for bit."""
    script = str(ROOT / "tests/support/accelerate_fsdp.py")
    for done in start_group([sys.executable, script, str(tmp_path)], ACCELERATE_USE_CPU="true"):
        assert done.returncode == 0, done.stderr
    whole = (tmp_path / "whole0").read_bytes()
    for name in ("whole1", "resumed0", "resumed1"):
        assert (tmp_path / name).read_bytes() == whole
    delta = load_delta(tmp_path / "whole0")
    assert delta.num_entries == 60

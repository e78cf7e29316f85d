"""Our GradScaler against torch's, step by step: the same skips, scales and weights.

Faults planted by hand: the flag not copied back (test_equals_torchs_scaler); the optimizer's own
flag handed out, not a copy (test_several_optimizers); a flag of an earlier step taken where there
was no gradient (test_steps_without_gradients).
"""

from __future__ import annotations

import math

import pytest
import torch
from op_cases import assert_same_bits
from training import give_grads, new_params

from sparse_optim import IncrementalMaskedAdamW, MaskedAdamW
from sparse_optim.optim.grad_scaler import GradScaler

OPTIONS = {"init_scale": 2.0**12, "growth_interval": 3}
OVERFLOWS = {2: (0, math.inf), 3: (1, math.nan), 9: (2, -math.inf)}  # step: (parameter, value)


def build(params) -> MaskedAdamW:
    """A ranked, a dense and a frozen group; parameter 3 is frozen."""
    return IncrementalMaskedAdamW(
        [{"params": params[:2]}, {"params": params[2:3], "unmask": "all"},
         {"params": params[3:4], "unmask": "none"}],
        lr=0.05, budget=60, total_steps=9, max_grad_norm=0.5, unmask_steps=1.0,
    )  # fmt: skip


def train(scaler, dtype, unscale_first=False, others=False):
    """Scale and skipped steps after each step, and all weights at the end."""
    params = new_params((200,), (30, 4), (17,), (5,), (40,), dtype=dtype)
    optimizers = [build(params)]
    if others:
        optimizers.append(torch.optim.SGD(params[4:], lr=0.1))
    generator = torch.Generator().manual_seed(0)
    seen = []
    for step in range(12):
        grads = give_grads(params, "normal", generator)
        scaler.scale(torch.ones(()))
        for grad in grads:
            grad.mul_(scaler.get_scale())
        if step in OVERFLOWS:
            index, value = OVERFLOWS[step]
            grads[index].view(-1)[-1] = value
        if others and step == 6:
            grads[4][0] = math.inf
        if unscale_first:
            scaler.unscale_(optimizers[0])
        for optimizer in optimizers:
            scaler.step(optimizer)
        scaler.update()
        seen.append((scaler.get_scale(), optimizers[0].metrics()["skipped_steps"]))
    return seen, params


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("unscale_first", [False, True])
@pytest.mark.parametrize("others", [False, True])
def test_equals_torchs_scaler(dtype, unscale_first, others):
    runs = [
        train(kind("cpu", **OPTIONS), dtype, unscale_first, others)
        for kind in (GradScaler, torch.amp.GradScaler)
    ]
    (ours, params), (theirs, expected) = runs
    assert ours == theirs
    assert ours[-1][1] == 3
    assert len({scale for scale, _ in ours}) >= 3
    for got, want in zip(params, expected, strict=True):
        assert_same_bits(got.detach(), want.detach())


def test_no_pass_over_the_gradients(monkeypatch):
    """torch's inspection is not called; gradients keep their bits."""
    params = new_params((50,))
    optimizer = IncrementalMaskedAdamW(params, budget=5, total_steps=1, unmask_steps=1.0)
    monkeypatch.setattr(GradScaler, "_unscale_grads_", None)
    scaler = GradScaler("cpu", **OPTIONS)
    params[0].grad = torch.full((50,), 3.0)
    scaler.scale(torch.ones(()))
    scaler.step(optimizer)
    scaler.update()
    assert optimizer.metrics()["step"] == 1
    assert float(optimizer.grad_norm) == pytest.approx(3 * math.sqrt(50) / 2**12)
    assert (params[0].grad == 3).all()


def test_several_optimizers_of_ours_keep_flags_of_their_own():
    params = new_params((50,), (50,))
    optimizers = [
        IncrementalMaskedAdamW([param], budget=5, total_steps=1, unmask_steps=1.0)
        for param in params
    ]
    scaler = GradScaler("cpu", **OPTIONS)
    scaler.scale(torch.ones(()))
    for param, value in zip(params, (1.0, math.inf), strict=True):
        param.grad = torch.full((50,), value)
    for optimizer in optimizers:
        scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0**11
    assert [optimizer.metrics()["step"] for optimizer in optimizers] == [1, 0]
    assert float(optimizers[0].engine.work.scalars.found_inf) == 0


def test_steps_without_gradients_say_what_torch_says():
    """Nothing to scan: no flag of an earlier step is taken for this one's."""
    params = new_params((80,), (7,), (5,), (3,))
    optimizer = build(params)
    scaler = GradScaler("cpu", **OPTIONS)
    scaler.scale(torch.ones(()))
    for param in params:
        param.grad = torch.full(param.shape, math.inf)
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0**11
    for param in params[:3]:
        param.grad = None
    params[3].grad = torch.ones(3)  # frozen: torch inspects it, the scan does not
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0**11
    params[3].grad = None
    scaler.step(optimizer)
    with pytest.raises(AssertionError, match="No inf checks were recorded"):
        scaler.update()


def test_frozen_groups_are_not_inspected():
    params = new_params((80,), (7,), (5,), (3,))
    optimizer = build(params)
    scaler = GradScaler("cpu", **OPTIONS)
    scaler.scale(torch.ones(()))
    for param in params:
        param.grad = torch.ones(param.shape)
    params[3].grad.fill_(math.nan)
    scaler.step(optimizer)
    scaler.update()
    assert optimizer.metrics()["step"] == 1


def test_checkpoints_are_torchs():
    scaler = GradScaler("cpu", **OPTIONS)
    scaler.load_state_dict(torch.amp.GradScaler("cpu", init_scale=8.0).state_dict())
    assert scaler.get_scale() == 8.0
    other = torch.amp.GradScaler("cpu")
    other.load_state_dict(scaler.state_dict())
    assert other.state_dict() == scaler.state_dict()


def test_disabled_it_only_steps():
    params = new_params((50,))
    optimizer = IncrementalMaskedAdamW(params, budget=5, total_steps=1, unmask_steps=1.0)
    params[0].grad = torch.ones(50)
    scaler = GradScaler("cpu", enabled=False)
    assert scaler.scale(params[0]) is params[0]
    scaler.step(optimizer)
    scaler.update()
    assert optimizer.metrics()["active"] == 5

"""fuse_backward=True with importances other than D3: masks of PaFi, Fish, chance and SNIP.

Faults planted by hand: noise keyed by the place in the part instead of the pool's tensor, and a
static set of fixed scores that is filled up later (both: other entries are active).
"""

from __future__ import annotations

import math

import pytest
import torch
from backward_nets import as_on_a_device, assert_pool_is_free, assert_same_state, loss_of, new_net
from torch import Tensor, nn

from sparse_optim import Increment, Magnitude, MaskedAdamW, Random, Scores, Snip, Static
from sparse_optim.engine import fused_backward, ranking


def few_scores() -> Scores:
    """Of two tensors and one that misses gradients: many ties, fewer above zero than the budget."""
    generator = torch.Generator().manual_seed(1)
    shapes = {"layers.0.weight": (24, 24), "embedding.weight": (60, 24), "rare": (24,)}
    return Scores(
        {name: torch.randint(-9, 3, shape, generator=generator).clamp(min=0).float()
         for name, shape in shapes.items()}
    )  # fmt: skip


def own(name: str, param: Tensor, grad: Tensor) -> Tensor:
    """A user's own."""
    return (grad.float().abs() + 1e-3) * (2.0 if "layers" in name else 1.0)


IMPORTANCES = {
    "magnitude": Magnitude(),
    "random": Random(2**40 + 7),
    "scores": few_scores(),
    "snip": Snip(),
    "own": own,
}


def pair(importance, selection, backend: str, dtype=torch.float32):
    nets = [new_net(dtype) for _ in range(2)]
    optimizers = [
        MaskedAdamW(net.named_parameters(), lr=0.01, importance=importance, selection=selection,
                    max_grad_norm=0.5, backend=backend, fuse_backward=fuse)
        for net, fuse in zip(nets, (True, False), strict=True)
    ]  # fmt: skip
    return nets, optimizers


STATIC, INCREMENT = Static(700), Increment(700, 5)


@pytest.mark.filterwarnings(
    "ignore:Scores.of 3 parameters. scores every entry 0"
)  # once all are in
@pytest.mark.parametrize(
    ("kind", "selection", "on_host"),
    [
        *((kind, STATIC, True) for kind in IMPORTANCES),
        *((kind, INCREMENT, True) for kind in ("random", "scores", "own")),
        ("random", STATIC, False),
        ("magnitude", INCREMENT, False),
    ],
)
def test_same_bits(backend, kind, selection, on_host, monkeypatch):
    """With a parameter that misses gradients, and a skipped step at the beginning."""
    monkeypatch.setattr(fused_backward, "BATCH_BYTES", 1 << 9)
    monkeypatch.setattr(ranking, "NOISE_ENTRIES", 256)
    nets, optimizers = pair(IMPORTANCES[kind], selection, backend)
    if not on_host:
        as_on_a_device(optimizers[0])
    for step in range(7):
        factor = math.inf if step in (0, 3) else 1.0
        for net, optimizer in zip(nets, optimizers, strict=True):
            loss = loss_of(net, torch.Generator().manual_seed(step), rare=step % 3 == 2)
            (loss * factor).backward()
            if optimizer.fuse_backward:
                assert_pool_is_free(optimizer)
            optimizer.step()
            optimizer.zero_grad()
        assert_same_state(*optimizers, step)
    metrics = optimizers[0].metrics()
    assert metrics["skipped_steps"] == 2
    if kind == "scores":
        left = {name: int((score > 0).sum()) for name, score in few_scores().scores.items()}
        assert 0 < left["rare"] < sum(left.values()) < 700
        # A static set is complete after one step, though that step had no gradient of `rare`.
        missing = left["rare"] if selection is STATIC else 0
        assert metrics["active"] == sum(left.values()) - missing
    else:
        assert metrics["active"] == 700


@pytest.mark.parametrize("kind", ["magnitude", "snip"])
def test_same_bits_in_half_precision(backend, kind):
    nets, optimizers = pair(IMPORTANCES[kind], Static(300), backend, torch.bfloat16)
    for step in range(3):
        for net, optimizer in zip(nets, optimizers, strict=True):
            loss_of(net, torch.Generator().manual_seed(step)).backward()
            optimizer.step()
        assert_same_state(*optimizers, step)
        optimizers[1].zero_grad()


def test_a_static_set_is_scored_once(monkeypatch):
    (net, _), (optimizer, _) = pair(Magnitude(), Static(50), "auto")
    for step in range(3):
        if step == 1:
            monkeypatch.setattr(fused_backward.FusedBackward, "_rank", None)
        loss_of(net, torch.Generator().manual_seed(step)).backward()
        optimizer.step()
    assert optimizer.metrics()["active"] == 50


def test_scores_that_say_little_warn_at_the_step():
    a, b = nn.Parameter(torch.randn(4, 3)), nn.Parameter(torch.zeros(3, 2))
    options = {"selection": Static(4), "max_grad_norm": math.inf, "fuse_backward": True}
    optimizer = MaskedAdamW([a, b], importance=Magnitude(), **options)
    (a @ b).sum().backward()
    with pytest.warns(UserWarning, match="1 of the ranked matrices are all zeros"):
        optimizer.step()
    optimizer.fuse_backward = False
    c, d = nn.Parameter(torch.zeros(4, 3)), nn.Parameter(torch.zeros(3, 2))
    optimizer = MaskedAdamW([c, d], importance=Snip(), **options)
    (c @ d).sum().backward()
    with pytest.warns(UserWarning, match="Snip.* scores every entry 0"):
        optimizer.step()
    assert optimizer.metrics()["active"] == 0


def test_a_wrong_score_stops_backward_and_changes_nothing():
    param = nn.Parameter(torch.randn(9))
    before = param.detach().clone()
    optimizer = MaskedAdamW(
        [("w", param)], importance=lambda name, param, grad: -grad.abs(), selection=Static(2),
        max_grad_norm=1.0, fuse_backward=True,
    )  # fmt: skip
    param.square().sum().backward()
    with pytest.raises(ValueError, match="importance of w is negative"):
        optimizer.step()
    optimizer.zero_grad()
    assert torch.equal(param, before)
    assert optimizer.metrics()["step"] == 0

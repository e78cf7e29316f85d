"""DPS Mix: mixout against its formula and expectation, where it applies, the score, resume.

Faults planted by hand: the factor 1 / (1 - p) left out, mixing in sparse windows, the count of kept
steps not reset, the pretrained weights of a resumed run taken from the model.
"""

from __future__ import annotations

import copy
import gc
import io
import math

import pytest
import torch
from torch import nn

from sparse_optim import methods
from sparse_optim.methods._dps import DynamicParameterSelection
from sparse_optim.methods._dps_mix import DPSMix

SHARE, WINDOW, P = 0.25, 3, 0.4


def new_net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(7, 8), nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 3))


def loss_of(net: nn.Module, step: int) -> torch.Tensor:
    tokens = torch.randint(0, 7, (5,), generator=torch.Generator().manual_seed(step))
    return net(tokens).square().sum()


def new_mix(net: nn.Module, window: int = WINDOW, **options) -> DPSMix:
    chosen = {"p": P, "lr": 1e-2, **options}
    return DPSMix(net.parameters(), [net[1], net[3]], SHARE, window, **chosen)


def take_steps(net: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        loss_of(net, step).backward()
        optimizer.step()
        optimizer.zero_grad()


def mixed(weight, pretrained, kept, p):
    """The formula, entry by entry; `kept` for each column."""
    out = torch.empty_like(weight)
    for i in range(weight.shape[0]):
        for j in range(weight.shape[1]):
            m = float(kept[j])
            value = m * weight[i, j] + (1 - m) * pretrained[i, j] - p * pretrained[i, j]
            out[i, j] = value / (1 - p)
    return out


def test_the_formula_and_its_gradient():
    net = new_net()
    before = net[1].weight.detach().clone()
    optimizer = new_mix(net)
    with torch.no_grad():
        net[1].weight += torch.randn_like(net[1].weight)
    kept = optimizer.kept(0)
    assert 0 < kept.sum() < 8
    x = torch.randn(4, 8, requires_grad=True)
    weight = net[1].weight.detach().requires_grad_()
    target = mixed(weight, before, kept, P)
    expected = x @ target.T + net[1].bias
    found = net[1](x)
    torch.testing.assert_close(found, expected)
    direction = torch.randn_like(found)
    by_hand = torch.autograd.grad(expected, (weight, x), direction)
    ours = torch.autograd.grad(found, (net[1].weight, x), direction)
    for one, other in zip(ours, by_hand, strict=True):
        torch.testing.assert_close(one, other)
    assert not ours[0][:, ~kept].any()  # exactly zero, or the counts of kept steps are wrong
    assert torch.equal(net[1](x), found)  # a recomputed activation is the same


def test_its_expectation_is_the_weight():
    net = new_net()
    optimizer = new_mix(net)
    with torch.no_grad():
        net[1].weight += torch.randn_like(net[1].weight)
    x = torch.randn(1, 8)
    plain = x @ net[1].weight.T + net[1].bias
    draws = []
    for step in range(1000):
        optimizer.param_groups[0]["steps_taken"] = 2 * WINDOW * step  # of a dense window
        draws.append(net[1](x).detach())
    found = torch.cat(draws)
    error = found.std(0) / math.sqrt(len(draws))
    assert ((found.mean(0) - plain).abs() < 5 * error).all()
    counts = sum(new_mix(new_net(), seed=seed).kept(1).sum().item() for seed in range(100))
    assert abs(counts / (100 * 6) - (1 - P)) < 0.1


def test_it_mixes_in_dense_windows_of_training_alone():
    net, x = new_net(), torch.randn(4, 8)
    optimizer = new_mix(net)
    take_steps(net, optimizer, range(1))  # now the weights are not the pretrained ones

    def is_mixed() -> bool:
        plain = nn.functional.linear(x, net[1].weight, net[1].bias)
        return not torch.equal(net[1](x), plain)

    assert is_mixed()
    net.eval()
    assert not is_mixed()
    net.train()
    take_steps(net, optimizer, range(1, WINDOW))
    assert not is_mixed()  # a sparse window begins
    take_steps(net, optimizer, range(WINDOW, 2 * WINDOW))
    assert is_mixed()
    del optimizer
    gc.collect()
    assert not is_mixed()  # without its optimizer it is the plain model


@pytest.mark.parametrize("window", [WINDOW, 50])
def test_the_score_is_the_mean_over_the_steps_that_kept_an_entry(window):
    net = new_net()
    optimizer = new_mix(net, window)
    for cycle in range(2):
        begin = 2 * window * cycle
        squares = torch.zeros_like(net[1].weight)
        steps = torch.zeros(8)
        for step in range(begin, begin + window):
            steps += optimizer.kept(0)
            loss_of(net, step).backward()
            squares += net[1].weight.grad ** 2
            optimizer.step()
            optimizer.zero_grad()
        score = squares / steps.clamp(min=1)
        if window >= 50:
            score = score * torch.exp(-steps / window)
        best = score.view(-1).topk(round(SHARE * 48)).indices.sort().values
        before = net[1].weight.detach().clone()
        take_steps(net, optimizer, range(begin + window, begin + window + 1))
        moved = (net[1].weight != before).view(-1).nonzero().view(-1)
        assert torch.equal(moved, best)
        take_steps(net, optimizer, range(begin + window + 1, begin + 2 * window))


@pytest.mark.parametrize("stop", [2, WINDOW, WINDOW + 1, 2 * WINDOW])
def test_resume_ends_where_the_uninterrupted_run_ends(stop):
    whole, half = new_net(), new_net()
    take_steps(whole, kept := new_mix(whole, seed=5), range(9))
    first = new_mix(half, seed=5)
    take_steps(half, first, range(stop))
    again = new_net()  # as a new process does: hooks of its own
    again.load_state_dict(half.state_dict())
    second = new_mix(again, seed=5)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    take_steps(again, second, range(stop, 9))
    assert all(map(torch.equal, whole.parameters(), again.parameters()))
    assert not torch.equal(kept.pretrained(0), whole[1].weight)


def test_sums_in_bfloat16_do_not_stop_growing_and_survive_a_checkpoint():
    """In the dtype of the weights a count ends at 256, and a resumed run would round it."""
    net = new_net().to(torch.bfloat16)
    optimizer = new_mix(net, 1000, p=0.0, lr=0.0)
    for _ in range(301):
        for module in (net[1], net[3]):
            module.weight.grad = torch.ones_like(module.weight)
        optimizer._mixed_in.update((0, 1))
        optimizer.step()
    again = new_mix(net, 1000, p=0.0, lr=0.0)
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for one in (optimizer, again):
        state = one.state[net[1].weight]
        assert (state["kept_steps"] == 301).all()
        assert (state["fisher"] == 301).all()


def test_a_copy_or_a_pickled_model_is_the_plain_one():
    net, x = new_net(), torch.randn(4, 8)
    optimizer = new_mix(net)
    take_steps(net, optimizer, range(1))
    file = io.BytesIO()
    torch.save(net, file)
    file.seek(0)
    plain = nn.functional.linear(x, net[1].weight, net[1].bias)
    for other in (copy.deepcopy(net), torch.load(file, weights_only=False)):
        assert torch.equal(other[1](x), plain)
    assert not torch.equal(net[1](x), plain)
    assert torch.equal(net[1](input=x), net[1](x))


def test_by_name_and_wrong_input():
    net = new_net()
    optimizer = methods.build("dps-mix", net, budget=33, total_steps=41, fresh=["3"], seed=7)
    assert (optimizer.share, optimizer.window, optimizer.p) == (33 / 48, 3, 0.7)
    assert (optimizer.seed, [id(param) for param in optimizer.linear]) == (7, [id(net[1].weight)])
    with pytest.raises(ValueError, match="p must be at least 0 and below 1, got 1"):
        new_mix(net, p=1.0)
    with pytest.raises(ValueError, match="no ranked weight of a Linear"):
        methods.build("dps-mix", nn.Embedding(3, 4), budget=0.5)


def test_without_mixing_it_is_dps():
    net, plain = new_net(), new_net()
    take_steps(net, kept := new_mix(net, p=0.0), range(9))
    options = {"linear": [plain[1].weight, plain[3].weight], "share": SHARE, "window": WINDOW}
    dps = DynamicParameterSelection(plain.parameters(), lr=1e-2, **options)
    take_steps(plain, dps, range(9))
    for one, other in zip(net.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one, other)
    assert kept.kept(0).all()

"""Masks that are tried in the quality experiment: which entries each of them takes."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

pytest.importorskip("typer", reason="the command needs the extra 'finetune'")

from bench import masks
from sparse_optim.methods import MethodRequest

BUDGET = 40


class Model(nn.Module):
    """Four layers of one width, and a head."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))
        self.head = nn.Linear(8, 2)

    def forward(self, inputs, labels):
        for layer in self.layers:
            inputs = torch.relu(layer(inputs)) + inputs
        return SimpleNamespace(loss=nn.functional.cross_entropy(self.head(inputs), labels))


def batches(count=16):
    generator = torch.Generator().manual_seed(1)
    return [
        {
            "inputs": torch.randn(6, 8, generator=generator),
            "labels": torch.randint(2, (6,), generator=generator),
        }
        for _ in range(count)
    ]


def mask_of(build, seed=0):
    model = Model()
    named = list(model.named_parameters())
    fresh = frozenset({"head.weight", "head.bias"})
    request = MethodRequest(
        model=model, named=named, fresh=fresh, budget=BUDGET, calibration=batches, seed=seed
    )
    optimizer = build(request)
    model(**batches(1)[0]).loss.backward()
    optimizer.step()
    active = optimizer.active_entries()
    return {name: set(active[name].tolist()) for name in active if len(active[name])}


@pytest.mark.parametrize("name", masks.CANDIDATES)
def test_the_whole_budget_is_spent_on_weights_of_layers(name):
    found = mask_of(masks.CANDIDATES[name])
    assert sum(map(len, found.values())) == BUDGET
    assert all(key.startswith("layers.") and key.endswith(".weight") for key in found)
    if name == "upper":
        assert found.keys() <= {"layers.2.weight", "layers.3.weight"}


def test_a_strong_tilt_takes_the_largest_gradients_and_none_is_random():
    total = {}
    model = Model().eval()
    for batch in batches():
        model.zero_grad()
        model(**batch).loss.backward()
        for name, param in model.layers.named_parameters(prefix="layers"):
            if param.ndim == 2:
                total[name] = total.get(name, 0) + param.grad
    flat = torch.cat([grad.flatten() for grad in total.values()]).abs()
    least = flat.topk(BUDGET).values[-1]
    largest = {
        name: set((grad.abs().flatten() >= least).nonzero().flatten().tolist())
        for name, grad in total.items()
    }
    strong = mask_of(lambda request: masks.tilt(request, 300.0))
    assert strong == {name: entries for name, entries in largest.items() if entries}
    even = [mask_of(lambda request: masks.tilt(request, 0.0), seed) for seed in (0, 1)]
    assert even[0] != even[1]
    assert mask_of(masks.CANDIDATES["tilt-0.5"]) not in (strong, *even)


@pytest.mark.parametrize(("shape", "count"), [((64, 64), 256), ((128, 32), 500), ((32, 128), 7)])
def test_a_regular_mask_fills_rows_and_columns_evenly(shape, count):
    mask = masks.regular_mask(torch.Size(shape), count, torch.Generator().manual_seed(0))
    assert int(mask.sum()) == count
    for lines in (mask.sum(0), mask.sum(1)):
        assert lines.max() - lines.min() <= 4  # of random masks 7 to 23


def balanced_by_hand(sizes, rounds=200):
    """Sinkhorn's factors, by their fixed point."""
    sizes = sizes.double()
    rows, columns = torch.ones(sizes.shape[0]).double(), torch.ones(sizes.shape[1]).double()
    for _ in range(rounds):
        rows = sizes.shape[1] / (sizes @ columns)
        columns = sizes.shape[0] / (sizes.T @ rows)
    return rows[:, None] * sizes * columns


def test_balancing_gives_all_rows_and_columns_one_mean():
    sizes = torch.rand(40, 24, generator=torch.Generator().manual_seed(0)) ** 2
    found = masks.balanced(sizes)
    torch.testing.assert_close(found.double(), balanced_by_hand(sizes), rtol=1e-3, atol=1e-4)
    empty = torch.zeros(42, 26)
    empty[:40, :24] = sizes
    order = torch.randperm(42, generator=torch.Generator().manual_seed(1))
    found = masks.balanced(empty[order])[order.argsort()]  # the same, and ones where nothing is
    torch.testing.assert_close(
        found[:40, :24].double(), balanced_by_hand(sizes), rtol=1e-3, atol=1e-4
    )
    assert (found[40:] == 1).all()
    assert (found[:, 24:] == 1).all()
    assert (masks.balanced(torch.zeros(3, 5)) == 1).all()


def test_own_rates_give_the_first_steps_of_all_matrices_one_relative_size():
    model = Model()
    named = list(model.named_parameters())
    request = MethodRequest(
        model=model, named=named, fresh=frozenset({"head.weight", "head.bias"}), budget=BUDGET,
        lr=0.1, head_lr=0.5, calibration=batches,
    )  # fmt: skip
    with torch.no_grad():
        model.layers[0].weight.mul_(10)
    optimizer = masks.CANDIDATES["own-rates"](request)
    rates = {group["param_names"][0]: group["lr"] for group in optimizer.param_groups}
    assert rates["head.weight"] == 0.5
    before = {name: param.detach().clone() for name, param in named}
    assert len({rates[f"layers.{i}.weight"] for i in range(4)}) == 4
    total, _ = masks.sums(request)
    model(**batches(1)[0]).loss.backward()
    optimizer.step()
    active, sizes = optimizer.active_entries(), []
    for i in range(4):
        name = f"layers.{i}.weight"
        step = torch.zeros(64)
        step[active[name]] = total[name].reshape(-1)[active[name]].sign()
        weight = masks.spectral_norm(before[name])
        sizes.append(rates[name] * masks.spectral_norm(step.view(8, 8)) / weight)
    assert sizes == pytest.approx([sizes[0]] * 4)

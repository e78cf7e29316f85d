"""The size of a first step against singular values, and of a LoRA against the weights it makes."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from sparse_optim.analysis.relative_step import (
    BEST_LORA_STEP,
    BEST_STEP,
    relative_step,
    spectral_norm,
)


class Net(nn.Module):
    """Two Linear modules and an embedding."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(9, 24)
        self.first, self.second = nn.Linear(24, 32), nn.Linear(32, 3)

    def forward(self, inputs, labels):
        hidden = torch.tanh(self.first(self.embedding(inputs)))
        return SimpleNamespace(loss=nn.functional.cross_entropy(self.second(hidden), labels))


def batches(count=2):
    generator = torch.Generator().manual_seed(1)
    return [
        {
            "inputs": torch.randint(9, (8,), generator=generator),
            "labels": torch.randint(3, (8,), generator=generator),
        }
        for _ in range(count)
    ]


def gradients(net, batch):
    names = [name for name, _ in net.named_parameters()]
    grads = torch.autograd.grad(net(**batch).loss, list(net.parameters()))
    return dict(zip(names, grads, strict=True))


def test_it_is_the_mean_of_spectral_norms_of_signs_over_those_of_weights():
    net = Net()
    mask = {
        "first.weight": torch.arange(0, 24 * 32, 7),
        "second.weight": torch.arange(3 * 32),
        "embedding.weight": torch.arange(40),
        "first.bias": torch.arange(32),
    }
    before = {name: param.detach().clone() for name, param in net.named_parameters()}
    ratios = []
    for batch in batches():
        grads = gradients(net, batch)
        for name in ("first.weight", "second.weight"):
            signs = torch.zeros_like(grads[name])
            signs.view(-1)[mask[name]] = grads[name].reshape(-1)[mask[name]].sign()
            norms = [torch.linalg.matrix_norm(m, ord=2) for m in (signs, before[name])]
            ratios.append(float(norms[0] / norms[1]))
    found = relative_step(net, batches(), mask)
    assert found.matrices == 2
    assert found.size == pytest.approx(sum(ratios) / 4, rel=0.03)
    assert found.lr == pytest.approx(BEST_STEP / found.size)
    assert all(torch.equal(param, before[name]) for name, param in net.named_parameters())
    assert all(param.grad is None for param in net.parameters())


def test_a_block_makes_a_longer_step_than_spread_entries():
    net = Net()
    block = (torch.arange(8)[:, None] * 24 + torch.arange(8)).flatten()
    spread = torch.randperm(24 * 32, generator=torch.Generator().manual_seed(0))[:64]
    sizes = [relative_step(net, batches(), {"first.weight": m}).size for m in (block, spread)]
    assert sizes[0] > 1.5 * sizes[1]


def test_masks_of_biases_and_embeddings_have_none():
    mask = {"first.bias": torch.arange(32), "embedding.weight": torch.arange(9)}
    assert relative_step(Net(), batches(), mask) is None


@pytest.mark.parametrize("trained", ["B", "both"])
def test_a_lora_counts_as_the_weight_that_it_makes(trained):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    settings = peft.LoraConfig(r=4, lora_alpha=12, target_modules=["first"])
    net = peft.get_peft_model(Net(), settings).eval()
    layer = net.base_model.model.first
    if trained == "both":
        nn.init.normal_(layer.lora_B["default"].weight, std=0.1)
    mask = {
        name: torch.arange(param.numel())
        for name, param in net.named_parameters()
        if "lora_B" in name or ("lora_A" in name and trained == "both")
    }
    (batch,) = batches(1)
    found = relative_step(net, [batch], mask)
    weight = layer.base_layer.weight.detach()
    before = layer.get_delta_weight("default").detach().clone()
    named = dict(net.named_parameters())
    grads = torch.autograd.grad(net(**batch).loss, [named[name] for name in mask])
    lr = 1e-5
    with torch.no_grad():
        for name, grad in zip(mask, grads, strict=True):
            named[name] -= lr * grad.sign()
    change = layer.get_delta_weight("default").detach() - before
    assert found.matrices == 1
    assert found.lr == pytest.approx(BEST_LORA_STEP / found.size)
    moved = float(torch.linalg.matrix_norm(change.double(), ord=2)) / lr
    size = moved / float(torch.linalg.matrix_norm(weight, ord=2))
    assert found.size == pytest.approx(size, rel=0.03)


class Transposed(nn.Linear):
    """Its gradient has the strides of a transposed matrix."""

    def __init__(self):
        super().__init__(6, 6, bias=False)
        self.weight = nn.Parameter(self.weight.detach().t())

    def forward(self, inputs):
        return SimpleNamespace(loss=(inputs @ self.weight.t()).square().sum())


def test_gradients_of_any_strides_are_read():
    torch.manual_seed(0)
    layer = Transposed()
    (grad,) = torch.autograd.grad(layer(torch.ones(2, 6)).loss, [layer.weight])
    assert not grad.is_contiguous()
    found = relative_step(layer, [{"inputs": torch.ones(2, 6)}], {"weight": torch.arange(0, 36, 5)})
    signs = torch.zeros(36)
    signs[::5] = grad.reshape(-1)[::5].sign()[: len(signs[::5])]
    exact = torch.linalg.matrix_norm(signs.view(6, 6), ord=2)
    assert found.size == pytest.approx(
        float(exact / torch.linalg.matrix_norm(layer.weight.detach(), ord=2)), rel=0.03
    )


def test_the_power_method_finds_the_largest_singular_value():
    matrix = torch.randn(30, 50, generator=torch.Generator().manual_seed(2))
    exact = float(torch.linalg.matrix_norm(matrix, ord=2))
    assert 0.9 * exact < spectral_norm(matrix) <= exact * (1 + 1e-5)
    assert spectral_norm(torch.zeros(3, 4)) == 0.0

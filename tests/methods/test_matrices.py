"""Masks chosen in each matrix: LIFT, GEM, SHiRA, Super, each against its formula by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from training import active_of

from sparse_optim import methods
from sparse_optim.calibration import wanda
from sparse_optim.methods._matrices import low_rank, spread

BUDGET = 30
SIZES = {"first.weight": 12 * 8, "second.weight": 4 * 12}


class Net(nn.Module):
    """Two matrices of different shapes, and a head."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(8, 12), nn.Linear(12, 4)
        self.head = nn.Linear(4, 2)

    def forward(self, inputs, labels, attention_mask=None):
        hidden = self.second(torch.tanh(self.first(inputs)))
        logits = self.head(hidden.mean(1) if hidden.ndim == 3 else hidden)
        return Loss(nn.functional.cross_entropy(logits, labels))


class Loss:
    def __init__(self, loss):
        self.loss = loss


def batches():
    generator = torch.Generator().manual_seed(1)
    return [
        {
            "inputs": torch.randn(5, 8, generator=generator),
            "labels": torch.randint(0, 2, (5,), generator=generator),
        }
        for _ in range(3)
    ]


def mean_gradients(net):
    sum(net(**batch).loss for batch in batches()).div(3).backward()
    grads = {name: param.grad.clone() for name, param in net.named_parameters()}
    net.zero_grad()
    return grads


def chosen(method):
    net = Net()
    optimizer = methods.build(
        method, net, fresh=["head"], budget=BUDGET, total_steps=2, calibration=batches
    )
    net(**batches()[0]).loss.backward()
    optimizer.step()
    active = active_of(optimizer)
    return net, {name: {at for owner, at in active if owner == name} for name in SIZES}


def top(scores, counts):
    return {
        name: set(scores[name].flatten().topk(count).indices.tolist())
        for name, count in counts.items()
    }


def test_lift_takes_the_largest_entries_of_the_truncated_decomposition():
    net = Net()
    scores = {}
    for name in SIZES:
        weight = net.get_parameter(name).detach()
        left, values, right = torch.linalg.svd(weight)
        rank = min(weight.shape) // 4
        scores[name] = sum(values[i] * torch.outer(left[:, i], right[i]) for i in range(rank)).abs()
    counts = {"first.weight": 17, "second.weight": 13}  # 30 x 20/36 = 16.7, 30 x 16/36 = 13.3
    assert chosen("lift")[1] == top(scores, counts)


def test_the_closest_matrix_of_a_rank():
    matrix = torch.randn(9, 16, generator=torch.Generator().manual_seed(3))
    values = torch.linalg.svdvals(matrix)
    found = low_rank(matrix)  # a quarter of 9
    assert torch.linalg.matrix_rank(found) == 2
    torch.testing.assert_close((matrix - found).norm(), values[2:].norm())


def test_gem_weighs_gradients_by_size_and_matrices_by_entropy():
    net = Net()
    grads = mean_gradients(net)
    scores, entropies = {}, {}
    for name in SIZES:
        weight = net.get_parameter(name).detach().abs()
        scores[name] = grads[name].abs() / (weight + 1e-8)
        shares = (weight / weight.sum()).flatten().tolist()
        entropies[name] = -sum(share * math.log(share) for share in shares)
    exact = BUDGET * entropies["first.weight"] / sum(entropies.values())
    counts = {"first.weight": round(exact), "second.weight": BUDGET - round(exact)}
    assert chosen("gem")[1] == top(scores, counts)


@pytest.mark.parametrize(
    ("method", "score"),
    [
        ("shira", lambda weight, grad: weight.abs()),
        ("shira-grad", lambda weight, grad: grad.abs()),
        ("shira-snip", lambda weight, grad: (weight * grad).abs()),
    ],
)
def test_shira_takes_the_same_share_of_every_matrix(method, score):
    net = Net()
    grads = mean_gradients(net)
    scores = {name: score(net.get_parameter(name).detach(), grads[name]) for name in SIZES}
    assert chosen(method)[1] == top(scores, {"first.weight": 20, "second.weight": 10})


def test_super_takes_the_largest_products_of_weight_and_input_norm():
    net = Net()
    rows = torch.cat([batch["inputs"] for batch in batches()])
    with torch.no_grad():
        inputs = {"first.weight": rows, "second.weight": torch.tanh(net.first(rows))}
    scores = {
        name: net.get_parameter(name).detach().abs() * inputs[name].norm(dim=0) for name in SIZES
    }
    assert chosen("super")[1] == top(scores, {"first.weight": 20, "second.weight": 10})


def test_padding_enters_no_norm_and_the_model_is_as_before():
    net = Net()
    net.train()
    inputs, labels = torch.randn(2, 3, 8), torch.tensor([0, 1])
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    batch = {"inputs": inputs, "labels": labels, "attention_mask": mask}
    scores = wanda(net, [batch], params=["first.weight"])
    norms = inputs[mask.bool()].norm(dim=0)
    expected = net.first.weight.detach().abs() * norms
    torch.testing.assert_close(scores["first.weight"], expected)
    assert net.training
    assert not any(module._forward_pre_hooks for module in net.modules())
    assert net.first.weight.requires_grad
    with pytest.raises(ValueError, match=r"first\.bias is not the weight of a Linear"):
        wanda(net, [batch], params=["first.bias"])


def test_parts_are_whole_and_none_is_beyond_its_size():
    sizes = {"a": 3, "b": 50, "c": 50}
    assert spread(10, {"a": 1, "b": 1, "c": 2}, sizes) == {"a": 3, "b": 2, "c": 5}
    assert spread(40, {"a": 5, "b": 1, "c": 2}, sizes) == {"a": 3, "b": 12, "c": 25}
    assert spread(103, {"a": 1, "b": 1, "c": 1}, sizes) == sizes
    assert spread(0, {"a": 1, "b": 1, "c": 1}, sizes) == {"a": 0, "b": 0, "c": 0}
    with pytest.raises(ValueError, match="budget is 104 entries, and all matrices have 103"):
        spread(104, {"a": 1, "b": 1, "c": 1}, sizes)


def test_a_model_without_matrices_is_refused():
    with pytest.raises(ValueError, match="weights of Linear modules, and none is ranked"):
        methods.build("lift", nn.LayerNorm(4), budget=2, total_steps=1)

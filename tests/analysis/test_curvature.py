"""Curvature against dense Hessians, the suggested rate against a search along the step."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from sparse_optim.analysis.curvature import crowding, curvature


class Net(nn.Module):
    """Small enough for a dense Hessian; one parameter is unused, one enters linearly."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 2)
        self.unused = nn.Parameter(torch.ones(2))
        self.double()


def loss(net, batch):
    inputs, targets = batch
    out = net.second(torch.tanh(net.first(inputs)))
    return nn.functional.mse_loss(out, targets)


def batches(count=3):
    generator = torch.Generator().manual_seed(1)
    return [
        (
            torch.randn(6, 3, generator=generator, dtype=torch.float64),
            torch.randn(6, 2, generator=generator, dtype=torch.float64),
        )
        for _ in range(count)
    ]


MASK = {
    "first.weight": torch.tensor([0, 3, 5, 11]),
    "second.weight": torch.tensor([1, 2, 6]),
    "second.bias": torch.tensor([0]),
    "unused": torch.tensor([1]),
}


def dense(net, data):
    """Loss, parameters, positions of the mask; gradient and Hessian on the mask, of data's mean."""
    params = dict(net.named_parameters())
    flat = torch.cat([param.detach().reshape(-1) for param in params.values()])

    def at(vector):
        parts = vector.split([param.numel() for param in params.values()])
        named = {
            name: part.view(param.shape)
            for (name, param), part in zip(params.items(), parts, strict=True)
        }
        total = 0.0
        for inputs, targets in data:
            hidden = torch.tanh(inputs @ named["first.weight"].T + named["first.bias"])
            out = hidden @ named["second.weight"].T + named["second.bias"]
            total = total + nn.functional.mse_loss(out, targets)
        return total / len(data)

    begins, start = {}, 0
    for name, param in params.items():
        begins[name] = start
        start += param.numel()
    chosen = torch.cat([positions + begins[name] for name, positions in MASK.items()])
    grad = torch.autograd.functional.jacobian(at, flat)[chosen]
    return at, flat, chosen, grad, torch.autograd.functional.hessian(at, flat)[chosen][:, chosen]


def test_slope_and_curvature_are_those_of_the_dense_hessians():
    net = Net()
    before = {name: param.detach().clone() for name, param in net.named_parameters()}
    found = curvature(net, batches(), MASK, loss=loss, iterations=60)
    slopes, along = [], []
    for batch in batches():
        *_, grad, hessian = dense(net, [batch])
        slopes.append(float(grad.abs().sum()))
        along.append(float(grad.sign() @ hessian @ grad.sign()))
    assert found.entries == 9
    assert found.slope == pytest.approx(sum(slopes) / 3, rel=1e-5)
    assert found.sign_curvature == pytest.approx(sum(along) / 3, rel=1e-4)
    eigenvalues = torch.linalg.eigvalsh(dense(net, batches())[-1])
    largest = float(eigenvalues[eigenvalues.abs().argmax()])
    assert found.sharpness == pytest.approx(largest, rel=1e-3)
    assert all(torch.equal(param, before[name]) for name, param in net.named_parameters())
    assert all(param.grad is None and param.requires_grad for param in net.parameters())


def test_the_rate_is_the_lowest_point_along_the_first_step():
    net, data = Net(), batches(1)
    found = curvature(net, data, MASK, loss=loss, iterations=0)
    assert math.isnan(found.sharpness)
    at, flat, chosen, grad, hessian = dense(net, data)
    step = torch.zeros_like(flat)
    step[chosen] = grad.sign()
    value, sign = at(flat), grad.sign()

    def quadratic(lr):
        return value - lr * grad.abs().sum() + lr**2 / 2 * (sign @ hessian @ sign)

    near = [quadratic(found.lr * factor) for factor in (0.9, 1.0, 1.1)]
    assert near[1] == min(near)
    small = found.lr / 100
    assert float(at(flat - small * step)) == pytest.approx(float(quadratic(small)), rel=1e-5)


def test_a_loss_without_curvature_has_no_rate():
    net = nn.Linear(3, 1)
    found = curvature(
        net, [torch.ones(2, 3)], {"weight": torch.arange(3)}, loss=lambda net, x: net(x).sum()
    )
    assert (found.sign_curvature, found.sharpness, found.lr) == (0.0, 0.0, None)


@pytest.mark.parametrize(
    ("mask", "data", "message"),
    [
        ({"weight": torch.arange(0)}, [torch.ones(1, 3)], "mask: it has no entry"),
        ({"weight": torch.arange(2)}, [], "batches is empty"),
        ({"other": torch.arange(2)}, [torch.ones(1, 3)], "no parameter 'other'"),
    ],
)
def test_wrong_input_is_named(mask, data, message):
    with pytest.raises(ValueError, match=message):
        curvature(nn.Linear(3, 1), data, mask, loss=lambda net, x: net(x).square().sum())


def test_crowding_by_hand():
    shapes = {"a": (3, 4), "b": (2, 2)}
    mask = {"a": torch.tensor([0, 1, 2, 4]), "b": torch.tensor([3]), "bias": torch.tensor([0])}
    found = crowding(shapes, mask)
    assert (found.row, found.column) == ((3 * 3 + 1 + 1) / 5, (2 * 2 + 1 + 1 + 1) / 5)
    assert (found.empty_rows, found.empty_columns) == (1 + 1, 1 + 1)
    assert crowding(shapes, {}).row == 0.0

"""Parameters that change under the optimizer: a step raises an error that names them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import Parameter

from sparse_optim import D3, MaskedAdamW, Static

Change = Callable[[Parameter], None]


def give(param: Parameter, value: torch.Tensor) -> None:
    param.data = value


CHANGES: dict[str, tuple[Change, str]] = {
    "smaller, as many tiles": (
        lambda p: give(p, p.detach()[:490].clone()),
        r"\(500,\) .* to \(490,",
    ),
    "larger": (lambda p: give(p, torch.randn(600)), r"\(500,\) .* to \(600,\)"),
    "another shape": (lambda p: give(p, p.detach().view(20, 25)), r"to \(20, 25\)"),
    "bfloat16": (lambda p: give(p, p.detach().bfloat16()), "float32 to .*bfloat16"),
    "transposed": (lambda p: give(p, torch.randn(500, 2)[:, 0]), r"with strides \(2,\)"),
    "empty": (lambda p: give(p, torch.empty(0)), r"to \(0,\)"),
}
USES: dict[str, Callable[[MaskedAdamW], Any]] = {
    "state_dict": MaskedAdamW.state_dict,
    "delta": MaskedAdamW.delta,
    "refresh": MaskedAdamW.refresh,
    "extend": lambda optimizer: optimizer.extend(budget=500),
    "add_param_group": lambda optimizer: optimizer.add_param_group(
        {"params": [("new", Parameter(torch.ones(3)))]}
    ),
}


def build(backend: str, fuse: bool) -> tuple[Parameter, MaskedAdamW]:
    param = Parameter(torch.randn(500, generator=torch.Generator().manual_seed(0)))
    optimizer = MaskedAdamW(
        [("emb", param)], lr=0.1, importance=D3(), selection=Static(400), backend=backend,
        fuse_backward=fuse, max_grad_norm=1.0,
    )  # fmt: skip
    step(param, optimizer)
    return param, optimizer


def step(param: Parameter, optimizer: MaskedAdamW) -> None:
    param.grad = None
    (param.float().view(-1) * torch.arange(1.0, param.numel() + 1)).sum().backward()
    optimizer.step()


@pytest.mark.parametrize("fuse", [False, True])
@pytest.mark.parametrize("change", CHANGES)
def test_a_step_on_a_changed_parameter_is_refused_by_name(backend, fuse, change):
    param, optimizer = build(backend, fuse)
    apply, message = CHANGES[change]
    apply(param)
    before = param.detach().clone()
    with pytest.raises(RuntimeError, match=f"emb has changed since .*{message}"):
        step(param, optimizer)
    assert torch.equal(param.detach(), before)


def test_nothing_is_written_beyond_a_smaller_parameter(backend):
    param, optimizer = build(backend, False)
    room = torch.full((1000,), 7.0)
    room[:490] = param.detach()[:490]
    param.data = room[:490]
    with pytest.raises(RuntimeError, match="emb has changed"):
        step(param, optimizer)
    assert (room[490:] == 7).all()


@pytest.mark.parametrize("use", USES)
def test_no_state_of_a_changed_parameter_is_read_or_written(backend, use):
    """A checkpoint of it could not be loaded again; a delta would name positions it lacks."""
    param, optimizer = build(backend, False)
    give(param, param.detach()[:490].clone())
    with pytest.raises(RuntimeError, match="emb has changed"):
        USES[use](optimizer)


def test_a_model_converted_after_the_optimizer_was_built_is_named():
    """Its active entries have no master values: small updates would be lost."""
    model = nn.Linear(8, 4)
    optimizer = MaskedAdamW(model.named_parameters(), importance=D3(), selection=Static(9))
    model.bfloat16()
    model(torch.ones(1, 8, dtype=torch.bfloat16)).sum().backward()
    with pytest.raises(RuntimeError, match=r"weight has changed .*build the optimizer"):
        optimizer.step()


def test_values_may_be_replaced():
    """As loaders do: the same shape and dtype in other memory."""
    param, optimizer = build("reference", False)
    give(param, torch.ones(500))
    step(param, optimizer)
    assert optimizer.metrics()["step"] == 2

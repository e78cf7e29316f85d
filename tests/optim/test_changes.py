"""What is changed between steps: options, budget, engines; nothing of a run is lost by it."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import Parameter
from training import give_grads, new_params, snapshot

import sparse_optim
from sparse_optim import D3, Increment, IncrementalMaskedAdamW, MaskedAdamW, Static
from sparse_optim.amp import GradScaler


def build(params: list[Parameter], **options: object) -> IncrementalMaskedAdamW:
    arguments = {"budget": 60, "total_steps": 10, "max_grad_norm": 1.0, **options}
    return IncrementalMaskedAdamW(
        [("a", params[0]), ("b", params[1])], **arguments, unmask_steps=1.0
    )


def train(params: list[Parameter], optimizer: MaskedAdamW, steps: range) -> None:
    for step in steps:
        give_grads(params, "normal", torch.Generator().manual_seed(step))
        optimizer.step()


@pytest.mark.parametrize("change", ["extend", "add_param_group"])
def test_master_values_survive_a_change_before_the_model_is_loaded(backend, change):
    """Of the optimizer's checkpoint: they are not compared with the base that is still there."""

    def changed(optimizer: MaskedAdamW) -> MaskedAdamW:
        if change == "extend":
            optimizer.extend(budget=80)
        else:
            optimizer.add_param_group({"params": [("new", Parameter(torch.ones(3).bfloat16()))]})
        return optimizer

    params = new_params((40, 5), (30,), dtype=torch.bfloat16)
    optimizer = build(params, lr=1e-4, backend=backend)
    train(params, optimizer, range(5))
    saved, values = copy.deepcopy(optimizer.state_dict()), snapshot(params)
    master = optimizer.engine.active.master[: int(optimizer.engine.active.progress[1])].clone()

    again = new_params((40, 5), (30,), dtype=torch.bfloat16)
    resumed = build(again, lr=1e-4, backend=backend)
    resumed.load_state_dict(saved)
    changed(resumed)
    with torch.no_grad():
        for param, value in zip(again, values, strict=True):
            param.copy_(value)
    assert torch.equal(resumed.engine.active.master[: master.numel()], master)
    changed(optimizer)
    train(params, optimizer, range(5, 8))
    train(again, resumed, range(5, 8))
    for one, other in zip(params, again, strict=True):
        assert torch.equal(one, other)


def test_what_the_last_step_left_can_be_read_after_a_change():
    params = new_params((40, 5), (30,))
    optimizer = build(params)
    train(params, optimizer, range(3))
    before = {name: optimizer.metrics()[name] for name in ("threshold", "grad_norm")}
    optimizer.extend(budget=80)
    assert {name: optimizer.metrics()[name] for name in before} == before
    assert before["threshold"] > 0


def test_steps_that_were_taken_cannot_be_taken_back():
    params = new_params((40, 5), (30,))
    optimizer = build(params)
    train(params, optimizer, range(3))
    with pytest.raises(ValueError, match="total_steps 2 is below the 3 steps already taken"):
        optimizer.extend(total_steps=2)
    optimizer.extend(total_steps=3)
    train(params, optimizer, range(3, 5))
    assert optimizer.metrics()["active"] == 60


def test_max_grad_norm_may_be_changed_within_its_range():
    params = new_params((40, 5), (30,))
    optimizer = build(params, max_grad_norm=None)
    optimizer.max_grad_norm = 0.5
    with pytest.raises(ValueError, match=r"max_grad_norm must be above 0 \(None does not clip\)"):
        optimizer.max_grad_norm = 0
    assert optimizer.max_grad_norm == 0.5


def test_a_group_on_another_device_is_refused():
    optimizer = IncrementalMaskedAdamW(new_params((9,)), budget=3, total_steps=2, unmask_steps=1.0)
    pool = copy.copy(optimizer.engine.pool)
    object.__setattr__(pool, "device", torch.device("cuda", 0))
    with pytest.raises(ValueError, match=r"new parameters are on cuda:0, but .* built for cpu"):
        optimizer.engine.with_pool(pool)


def test_a_step_that_raises_leaves_the_loss_scale_as_it_was():
    """torch deletes what it hands over only after a step that returns."""
    layer = nn.Linear(4, 2)
    optimizer = IncrementalMaskedAdamW(
        layer.parameters(),
        budget=3,
        total_steps=9,
        fuse_backward=True,
        max_grad_norm=1e9,
        unmask_steps=1.0,
    )
    scaler = GradScaler("cpu", init_scale=8.0)

    def backward() -> None:
        scaler.scale(layer(torch.ones(1, 4)).sum()).backward()

    backward()
    with pytest.raises(RuntimeError, match="got a second gradient"):
        backward()
    with pytest.raises(RuntimeError, match="got a second gradient"):
        scaler.step(optimizer)
    optimizer.zero_grad()
    scaler.update()
    backward()
    scaler.step(optimizer)
    assert float(optimizer.grad_norm) == pytest.approx(10**0.5)


def test_a_repeated_step_is_refused_after_a_change_too():
    params = new_params((40, 5), (30,))
    optimizer = build(params, fuse_backward=True)
    sum((param**2).sum() for param in params).backward()
    optimizer.step()
    optimizer.extend(budget=80)
    with pytest.raises(RuntimeError, match="no gradient has come since the last step"):
        optimizer.step()


def test_hooks_end_with_their_optimizer():
    """In a search over hyper-parameters, say: many optimizers over one model."""
    params = new_params((40, 5), (30,))
    for _ in range(3):
        build(params, fuse_backward=True)
    assert not any(param._post_accumulate_grad_hooks for param in params)


@pytest.mark.parametrize("fuse", [False, True])
@pytest.mark.parametrize("how", ["replaced", "deleted", "appended", "reordered"])
def test_other_parameters_in_the_groups_are_refused(fuse, how):
    """As wrappers do that shard a model after the optimizer was built: nothing would be trained."""
    params = new_params((40, 5), (30,))
    optimizer = build(params, fuse_backward=fuse)
    held = optimizer.param_groups[0]["params"]
    if how == "replaced":
        optimizer.param_groups[0]["params"] = [Parameter(param.detach().clone()) for param in held]
    elif how == "deleted":
        del held[1]
    elif how == "appended":
        held.append(Parameter(torch.ones(3)))
    else:
        held.reverse()
    give_grads(held, "normal", torch.Generator().manual_seed(0))
    before = snapshot(params)
    with pytest.raises(RuntimeError, match="param_groups holds other parameters than"):
        optimizer.step()
    assert all(map(torch.equal, params, before))


class Named:
    """An importance whose methods have names that could mean something else."""

    def fixed(self) -> None: ...

    def check(self) -> None: ...

    uniform = noise_seed = ordinal = trusted = 7

    def __call__(self, name: str, param: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
        return grad.abs()


def test_names_of_a_users_importance_mean_nothing():
    params = new_params((40, 5), (30,))
    plain = MaskedAdamW(params, importance=D3(), selection=Increment(60, 4))
    named = MaskedAdamW(
        copies := new_params((40, 5), (30,)), importance=Named(), selection=Increment(60, 4)
    )
    train(params, plain, range(4))
    train(copies, named, range(4))
    for one, other in zip(params, copies, strict=True):
        assert torch.equal(one, other)
    MaskedAdamW(new_params((9,)), importance=Named(), selection=Static(2))


@pytest.mark.parametrize("name", ["amp", "methods", "calibration", "integrations", "analysis"])
def test_packages_are_attributes_of_the_package(name):
    """As README writes them: `import sparse_optim; sparse_optim.amp.GradScaler`."""
    assert getattr(sparse_optim, name).__name__ == f"sparse_optim.{name}"

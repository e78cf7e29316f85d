"""Mistakes with devices, without a GPU: several devices, a gradient elsewhere, no memory left.

Each gives a clear error and changes nothing. tests/gpu/test_gpu_runs.py has the same on a GPU.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from torch import distributed, nn
from torch.overrides import TorchFunctionMode

from sparse_optim import D3, IncrementalMaskedAdamW, MaskedAdamW, Static
from sparse_optim.engine.engine import Engine
from sparse_optim.optim.gradient_watch import STEPS_WITHOUT_GRADIENTS

FACTORIES = (torch.empty, torch.zeros, torch.ones, torch.full, torch.tensor, torch.arange)


class Elsewhere(nn.Parameter):
    """A parameter that says that it lies on a GPU."""

    device = property(lambda self: torch.device("cuda", 0))  # type: ignore[assignment]


class GradElsewhere(nn.Parameter):
    """A parameter whose gradient lies on another device, which torch itself forbids."""

    grad = property(lambda self: torch.empty(self.shape, device="meta"))  # type: ignore[assignment]


class NoMemory(TorchFunctionMode):
    """The allocation of this number, counted from 0, fails."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.left = number

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in FACTORIES or func in (torch.Tensor.new_empty, torch.Tensor.clone):
            self.left -= 1
            if self.left < 0:
                raise torch.OutOfMemoryError("made up")
        return func(*args, **(kwargs or {}))


def param_of(size: int, kind: type = nn.Parameter) -> nn.Parameter:
    return kind(torch.linspace(-1, 1, size))


def trained(backend: str, **options) -> IncrementalMaskedAdamW:
    """An optimizer after two of its steps."""
    named = [("first", param_of(700)), ("second", param_of(9))]
    options = {"budget": 20, "total_steps": 10, "backend": backend, **options}
    optimizer = IncrementalMaskedAdamW(named, **options, unmask_steps=1.0)
    for _ in range(2):
        step(optimizer)
    return optimizer


def step(optimizer: MaskedAdamW) -> None:
    for group in optimizer.param_groups:
        for param in group["params"]:
            param.grad = param.detach().roll(1).sub(0.1)
    optimizer.step()


def everything(optimizer: MaskedAdamW) -> list[torch.Tensor]:
    """Parameters, active entries and their state, counts and schedule, copied."""
    params = [param for group in optimizer.param_groups for param in group["params"]]
    engine = optimizer.engine
    held = (*params, *vars(engine.active).values(), engine.targets)
    return [tensor.detach().clone() for tensor in held]


def assert_same(one: MaskedAdamW, other: MaskedAdamW) -> None:
    assert all(map(torch.equal, everything(one), everything(other)))


# Devices


def test_parameters_on_several_devices_are_refused():
    message = r"several devices: group0.param0 on cpu, group0.param1 on cuda:0; use one optimizer"
    with pytest.raises(ValueError, match=message):
        MaskedAdamW([param_of(9), param_of(9, Elsewhere)], importance=D3(), selection=Static(3))
    groups = [{"params": [param_of(9)]}, {"params": [param_of(9, Elsewhere)], "unmask": "all"}]
    with pytest.raises(ValueError, match=r"several devices: group0.param0 on cpu, group1.param0"):
        MaskedAdamW(groups, importance=D3(), selection=Static(3))


def test_a_group_on_another_device_leaves_the_optimizer_as_it_was(backend):
    optimizer, twin = trained(backend), trained(backend)
    with pytest.raises(ValueError, match=r"several devices.*use one optimizer per device"):
        optimizer.add_param_group({"params": [("third", param_of(9, Elsewhere))]})
    assert len(optimizer.param_groups) == 1
    for each in (optimizer, twin):
        step(each)
    assert_same(optimizer, twin)


@pytest.mark.parametrize("unmask", ["rank", "all"])
def test_a_gradient_on_another_device_is_refused(unmask):
    """Before anything has moved, in ranked and in dense groups."""
    with pytest.raises(RuntimeError, match="device"):  # torch itself
        param_of(9).grad = torch.empty(9, device="meta")
    groups = [{"params": [("first", param_of(30))]},
              {"params": [("second", param_of(9))], "unmask": unmask}]  # fmt: skip
    optimizer = IncrementalMaskedAdamW(
        groups, budget=4, total_steps=4, backend="reference", unmask_steps=1.0
    )
    step(optimizer)
    before = everything(optimizer)
    optimizer.param_groups[1]["params"][0].__class__ = GradElsewhere
    message = r"the gradient of second \(9,\) on cpu has shape \(9,\) on meta; it must have"
    with pytest.raises(ValueError, match=message):
        optimizer.step()
    assert all(map(torch.equal, before, everything(optimizer)))


# Memory


def failing_at_each_allocation(
    make: Callable[[], object], call: Callable[[object], object]
) -> Iterator[object]:
    """What `make` made, after `call` on it ran out of memory at its first, second, ... request."""
    for number in range(1000):
        made = make()
        try:
            with NoMemory(number):
                call(made)
        except torch.OutOfMemoryError:
            yield made
        else:
            assert number > 5, "the calls that fail are not those that allocate"
            return


def test_no_memory_at_construction(backend):
    """The error comes from the constructor, and the parameters are as they were."""

    def build(params: list[nn.Parameter]) -> None:
        IncrementalMaskedAdamW(params, budget=20, total_steps=10, backend=backend, unmask_steps=1.0)

    original = param_of(700)
    for params in failing_at_each_allocation(lambda: [param_of(700)], build):
        assert torch.equal(params[0], original)
        assert params[0].grad is None
        assert not params[0]._backward_hooks


CHANGES: dict[str, Callable[[MaskedAdamW], object]] = {
    "extend": lambda optimizer: optimizer.extend(budget=300, total_steps=50),
    "add_param_group": lambda optimizer: optimizer.add_param_group(
        {"params": [("third", param_of(40))]}
    ),
}


@pytest.mark.parametrize("change", ["extend", "add_param_group"])
def test_no_memory_for_a_change_leaves_the_optimizer_as_it_was(backend, change):
    twin = trained(backend)
    step(twin)
    for optimizer in failing_at_each_allocation(lambda: trained(backend), CHANGES[change]):
        step(optimizer)
        assert_same(optimizer, twin)


def test_no_memory_while_a_checkpoint_is_loaded(backend):
    state = trained(backend, budget=300).state_dict()
    twin = trained(backend)
    step(twin)
    load = lambda optimizer: optimizer.load_state_dict(copy.deepcopy(state))  # noqa: E731
    for optimizer in failing_at_each_allocation(lambda: trained(backend), load):
        step(optimizer)
        assert_same(optimizer, twin)


# Steps without gradients


@pytest.fixture
def group_of_one() -> Iterator[None]:
    """A process group of this process alone."""
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.mark.parametrize("fuse", [False, True])
def test_an_optimizer_built_before_fully_shard_says_that_nothing_is_trained(group_of_one, fuse):
    """fully_shard puts DTensors in the parameters' place; torch.optim then does nothing, too."""
    net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2))
    options = {"budget": 5, "total_steps": 3, "max_grad_norm": 1.0, "fuse_backward": fuse}
    optimizer = IncrementalMaskedAdamW(net.named_parameters(), **options, unmask_steps=1.0)
    mesh = distributed.device_mesh.init_device_mesh("cpu", (1,))
    distributed.fsdp.fully_shard(net, mesh=mesh)
    told = []
    for _ in range(2 * STEPS_WITHOUT_GRADIENTS):
        net(torch.ones(3, 8)).sum().backward()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            optimizer.step()
        told.append([str(each.message) for each in caught])
    (message,) = told[STEPS_WITHOUT_GRADIENTS - 1]
    assert "nothing is trained" in message
    assert "fully_shard" in message
    assert sum(map(len, told)) == 1
    assert optimizer.metrics()["step"] == 0


def test_steps_without_gradients_after_some_with_are_the_users_affair(backend):
    optimizer = trained(backend)
    optimizer.zero_grad()
    for _ in range(3 * STEPS_WITHOUT_GRADIENTS):  # warnings are errors
        optimizer.step()
    late = IncrementalMaskedAdamW(
        [param_of(9)], budget=2, total_steps=2, backend=backend, unmask_steps=1.0
    )
    for _ in range(STEPS_WITHOUT_GRADIENTS - 1):
        late.step()
    step(late)
    assert late.metrics()["step"] == 1


@pytest.mark.parametrize("fuse_backward", [False, True])
def test_buffers_are_freed_after_their_stream_is_done(monkeypatch, fuse_backward: bool) -> None:
    """Whatever replaces the engine waits first: torch could hand the old one's memory out again."""
    optimizer = trained("reference", fuse_backward=fuse_backward, max_grad_norm=1.0)
    waited: list[Engine] = []
    monkeypatch.setattr(Engine, "drain", lambda engine: waited.append(engine))
    for replace_engine in (
        lambda: optimizer.extend(budget=30),
        lambda: optimizer.add_param_group({"params": [("third", param_of(5))]}),
        lambda: optimizer.load_state_dict(optimizer.state_dict()),
    ):
        before = optimizer.engine
        waited.clear()
        replace_engine()
        assert optimizer.engine is not before
        assert waited == [before]


def test_a_wait_is_for_the_current_stream_of_the_pools_device(monkeypatch) -> None:
    waits: list[torch.device] = []

    class Stream:
        def __init__(self, device: torch.device) -> None:
            self.device = device

        def synchronize(self) -> None:
            waits.append(self.device)

    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    engine = trained("reference").engine
    engine.drain()
    assert not waits
    device = torch.device("cuda", 1)
    monkeypatch.setattr(engine, "pool", replace(engine.pool, device=device))
    engine.drain()
    assert waits == [device]

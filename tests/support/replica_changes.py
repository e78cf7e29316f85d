"""Changes of replicas in mid-run, and what is an error in all processes."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from replica_runs import (
    RANK,
    STEPS,
    Net,
    alone,
    assert_equal_everywhere,
    assert_replicas,
    assert_same_run,
    batch,
    increment,
    loss_of,
    mine,
    random_set,
    run_alone,
    train,
    weights_of,
    wrapped,
)
from torch import nn
from torch.distributed.algorithms.join import Join
from torch.nn.parallel import DistributedDataParallel

from sparse_optim import D3, Increment, MaskedAdamW


def message_of(action: Callable[[], object], kind: type[Exception] = RuntimeError) -> str:
    try:
        action()
    except kind as error:
        return str(error)
    raise AssertionError("no error")


# Changes after which the wrapper still leaves the weights to us.


def extends(model: Any, optimizer: MaskedAdamW) -> None:
    optimizer.extend(budget=60, total_steps=12)


def loads(model: Any, optimizer: MaskedAdamW) -> None:
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))


def joins(model: Any, optimizer: MaskedAdamW) -> None:
    net = getattr(model, "module", model)
    optimizer.add_param_group({"params": [("scale", net.scale)], "unmask": "all"})


def switches_off(model: Any, optimizer: MaskedAdamW) -> None:
    optimizer.sampled_backward = False


def hides_a_layer(model: Any, optimizer: MaskedAdamW) -> None:
    """From the next attachment on it does not sample."""
    layer = getattr(model, "module", model).second
    layer.forward = lambda inputs: nn.functional.linear(inputs, layer.weight, layer.bias)
    optimizer.extend(budget=60)


def changed() -> None:
    """Averages go on, also where all layers run again in the backward pass."""
    for change in (extends, loads, joins, switches_off, hides_a_layer):
        want = run_alone(increment, change)
        for recomputes in (False, True):
            model, optimizer = wrapped(increment, Net(recomputes))
            train(model, optimizer, mine, range(4))
            change(model, optimizer)
            train(model, optimizer, mine, range(4, STEPS))
            what = f"{change.__name__}, {recomputes}"
            assert_replicas(model, optimizer, what)
            assert_same_run((model, optimizer), want, what)


def changed_before_the_first_pass() -> None:
    """The wrapper has read what to leave out, and has not run."""
    model, optimizer = wrapped(increment)
    optimizer.sampled_backward = False
    train(model, optimizer, mine, range(STEPS))
    assert_replicas(model, optimizer, "switched off before")
    assert_same_run((model, optimizer), run_alone(increment), "switched off before")


def layer_replaced() -> None:
    """Its weight is the pool's, but no layer's any more; switching off meets the new layer."""
    model, optimizer = wrapped(increment, find_unused_parameters=True)
    train(model, optimizer, mine, range(4))
    torch.manual_seed(1)
    model.module.second = nn.Linear(16, 16).requires_grad_(False)
    train(model, optimizer, mine, range(4, 6))
    optimizer.extend(budget=60)
    train(model, optimizer, mine, range(6, 8))
    optimizer.sampled_backward = False
    train(model, optimizer, mine, range(8, STEPS))
    assert_replicas(model, optimizer, "layer replaced")
    del optimizer
    gc.collect()


def set_is_taken_outside_of_dense_gradients() -> None:
    model, optimizer = wrapped(random_set)
    with optimizer.dense_gradients():
        torch.autograd.grad(loss_of(model, mine(batch(0))), model.module.first.weight)
        assert optimizer.metrics()["active"] == 0
    with torch.no_grad():
        model(batch(0))
    assert optimizer.metrics()["active"] == 0
    loss_of(model, mine(batch(0)))
    assert optimizer.metrics()["active"] > 0


def zero_grad_of_the_wrapper() -> None:
    """It discards what layers gave: a run in which it does so is the same as one without."""
    runs = []
    for discards in (True, False):
        model, optimizer = wrapped(increment)
        train(model, optimizer, mine, range(4))
        if discards:
            loss_of(model, mine(batch(50))).backward()
            model.zero_grad()
        train(model, optimizer, mine, range(4, STEPS))
        runs.append(weights_of(model))
    assert torch.equal(*runs)


# Errors.


def not_averaged() -> None:
    """Where no wrapper averages, or none that leaves the weights out."""
    net = Net()
    optimizer = increment(net)
    assert "the model has not run in Distributed" in message_of(lambda: loss_of(net, batch(0)))
    with optimizer.dense_gradients():
        loss_of(net, batch(0)).backward()
    assert "the model has not run in Distributed" in message_of(optimizer.step)
    assert "fuse_backward=True does not work" in message_of(
        lambda: setattr(optimizer, "fuse_backward", True)
    )
    outer, optimizer = wrapped(lambda net: increment(net[0]), nn.Sequential(Net()))  # type: ignore
    assert "not of one that holds it" in message_of(lambda: loss_of(outer, batch(0)))

    net = Net()
    with alone():
        optimizer = increment(net)
    model = DistributedDataParallel(net)
    assert "init_process_group(); the optimizer" in message_of(lambda: loss_of(model, batch(0)))


def wrapped_too_early() -> None:
    """What the messages say to do works: build in order, or switch sampling off."""
    net = Net()
    model = DistributedDataParallel(net)
    optimizer = increment(net)
    assert "DistributedDataParallel averages weights" in message_of(
        lambda: loss_of(model, batch(0))
    )
    optimizer.sampled_backward = False
    train(model, optimizer, mine, range(2))
    optimizer.sampled_backward = True
    model = DistributedDataParallel(net)
    train(model, optimizer, mine, range(2, STEPS))
    assert_replicas(model, optimizer, "wrapped again")


def other_lists() -> None:
    """A change that needs another list leaves the optimizer as it was."""
    net = Net()
    net.extra = nn.Linear(16, 16, bias=False)
    optimizer = MaskedAdamW(
        [net.first.weight], importance=D3(), selection=Increment(9, 9, every=3), max_grad_norm=1.0,
        model=net, sampled_backward=True,
    )  # fmt: skip
    model = DistributedDataParallel(net, find_unused_parameters=True)

    def add() -> None:
        optimizer.add_param_group({"params": [net.second.weight]})

    assert "second.weight would sample" in message_of(add, ValueError)
    train(model, optimizer, mine, range(2))
    assert "second.weight would sample" in message_of(add, ValueError)
    train(model, optimizer, mine, range(2, 4))
    del model
    add()
    model = DistributedDataParallel(net, find_unused_parameters=True)
    train(model, optimizer, mine, range(4, 6))
    assert_equal_everywhere(weights_of(net), "a group that joined")


def optimizer_is_gone() -> None:
    """Nobody averages then; wrapping again helps."""
    model, optimizer = wrapped(increment)
    train(model, optimizer, mine, range(4))
    del optimizer
    other: Any = torch.optim.AdamW(model.parameters(), lr=0.05)
    assert "which is gone, and leaves weights out" in message_of(
        lambda: train(model, other, mine, range(1))
    )
    model = DistributedDataParallel(model.module)
    train(model, other, mine, range(4))
    assert_equal_everywhere(weights_of(model), "wrapped again")


def another_optimizer_trains() -> None:
    """While the one that would average is alive, and takes no steps."""
    model, optimizer = wrapped(increment)
    train(model, optimizer, mine, range(3))
    other: Any = torch.optim.AdamW(model.parameters(), lr=0.05)
    assert "If another optimizer trains them" in message_of(
        lambda: train(model, other, mine, range(4))
    )
    optimizer.sampled_backward = False
    model = DistributedDataParallel(model.module)
    other = torch.optim.AdamW(model.parameters(), lr=0.05)
    train(model, other, mine, range(4))
    assert_equal_everywhere(weights_of(model), "wrapped again")


def in_join() -> None:
    model, optimizer = wrapped(increment)
    train(model, optimizer, mine, range(2))
    with Join([model]):
        assert "DDP's join()" in message_of(lambda: loss_of(model, mine(batch(0))))


def compiled_inside() -> None:
    """A wrapper of a compiled model knows weights by other names."""
    net = Net()
    optimizer = increment(net)
    model = DistributedDataParallel(torch.compile(net, backend="eager"))  # type: ignore
    assert "compiled from it" in message_of(lambda: train(model, optimizer, mine, range(4)))


def different_processes() -> None:
    """All of them raise, and nothing has moved; alike again, they train."""
    model, optimizer = wrapped(increment)
    with torch.no_grad():
        model(batch(0))  # evaluation is no business of ours
        model.module.second.weight[0, 0] += RANK
    differ(model, optimizer, "differ in second.weight")

    def advanced(steps: int, first: int = 0) -> tuple[dict[str, Any], dict[str, Any]]:
        net = Net()
        with alone():
            other = increment(net)
            train(net, other, lambda whole: whole, range(first, first + steps))
        return net.state_dict(), other.state_dict()

    for late in (False, True):  # before the first step, or in mid-run
        model, optimizer = wrapped(increment)
        if late:
            train(model, optimizer, mine, range(3))
        weights, state = advanced(3 + (RANK == 1))
        model.module.load_state_dict(weights)
        optimizer.load_state_dict(state)
        differ(model, optimizer, "differ in the steps that were taken")
        optimizer.zero_grad()
        weights, state = advanced(4)
        model.module.load_state_dict(weights)
        optimizer.load_state_dict(state)
        train(model, optimizer, mine, range(4, STEPS))
        assert_replicas(model, optimizer, "alike again")

    model, optimizer = wrapped(increment)
    model.module.load_state_dict(advanced(4)[0])
    optimizer.load_state_dict(advanced(4, first=RANK)[1])
    differ(model, optimizer, "differ in position of the active entries of first.weight")

    model, optimizer = wrapped(increment)
    train(model, optimizer, mine, range(4))
    optimizer.engine.active.exp_avg[0] += RANK
    loads(model, optimizer)
    differ(model, optimizer, "differ in exp_avg of the active entries of first.weight")

    model, optimizer = wrapped(increment)
    train(model, optimizer, mine, range(4))
    loss_of(model, mine(batch(4))).backward()
    with torch.no_grad():
        model.module.second.weight[0, 0] += RANK
    differ(model, optimizer, "differ in second.weight")

    model, optimizer = wrapped(increment)
    if RANK:
        optimizer.extend(budget=60)
    differ(model, optimizer, "differ in the budget")


def differ(model: Any, optimizer: MaskedAdamW, message: str) -> None:
    before = weights_of(model)
    loss_of(model, mine(batch(0))).backward()
    found = message_of(optimizer.step)
    assert message in found, found
    assert torch.equal(weights_of(model), before)
    dist.barrier()

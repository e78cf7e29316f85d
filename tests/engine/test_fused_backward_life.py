"""fuse_backward=True in odd places: each works as without it, or is refused in words."""

from __future__ import annotations

import copy
import gc
import pickle

import pytest
import torch
from backward_nets import (
    assert_pool_is_free,
    assert_same_state,
    backward,
    build,
    loss_of,
    new_net,
)
from op_cases import assert_same_bits
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sparse_optim import (
    IncrementalMaskedAdamW,
)


def assert_goes_on_as(*runs: tuple[nn.Module, IncrementalMaskedAdamW]) -> None:
    """Two models and their optimizers take the same next step."""
    for net, optimizer in runs:
        backward(net, seed=1)
        optimizer.step()
    assert_same_state(*(optimizer for _, optimizer in runs))


def test_a_second_gradient_is_refused_until_zero_grad():
    net, twin = new_net(), new_net()
    optimizer, ordinary = build(net, fuse=True), build(twin, fuse=False)
    backward(net)
    with pytest.raises(RuntimeError, match=r"second gradient before step\(\) or zero_grad\(\)"):
        backward(net)
    with pytest.raises(RuntimeError, match="cannot be accumulated"):
        optimizer.step()
    assert optimizer.metrics()["step"] == 0
    optimizer.zero_grad()
    assert_goes_on_as((net, optimizer), (twin, ordinary))


def test_retain_graph_is_refused_as_accumulation_unless_a_step_lies_between():
    net = new_net()
    optimizer = build(net, fuse=True)
    loss = loss_of(net, torch.Generator().manual_seed(0))
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="second gradient"):
        loss.backward(retain_graph=True)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    assert optimizer.metrics()["step"] == 1


def test_create_graph_works(recwarn):
    """torch warns of reference cycles between parameters and gradients; here none stay."""
    net = new_net()
    optimizer = build(net, fuse=True)
    loss_of(net, torch.Generator().manual_seed(0)).backward(create_graph=True)
    assert_pool_is_free(optimizer)
    optimizer.step()
    assert optimizer.metrics()["active"] > 0


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(reentrant):
    """Each parameter lies in one checkpoint; the result is that without."""
    runs = []
    for fuse in (True, False):
        net = new_net()
        optimizer = build(net, fuse)
        for layer in net.layers:
            inner = layer.forward
            layer.forward = lambda x, inner=inner: checkpoint(inner, x, use_reentrant=reentrant)
        for step in range(3):
            backward(net, seed=step)
            optimizer.step()
            optimizer.zero_grad()
        runs.append(optimizer)
    assert_same_state(*runs)


def test_reentrant_checkpoints_that_share_a_parameter_are_refused():
    layer = nn.Linear(4, 4)
    optimizer = IncrementalMaskedAdamW(
        layer.parameters(),
        budget=2,
        total_steps=1,
        max_grad_norm=1.0,
        fuse_backward=True,
        unmask_steps=1.0,
    )
    x = torch.ones(2, 4, requires_grad=True)
    for _ in range(2):
        x = checkpoint(layer, x, use_reentrant=True)
    with pytest.raises(RuntimeError, match="second gradient"):
        x.sum().backward()
    optimizer.zero_grad()
    assert optimizer.step() is None


def test_an_error_in_backward_leaves_what_zero_grad_discards():
    net, twin = new_net(), new_net()
    optimizer, ordinary = build(net, fuse=True), build(twin, fuse=False)

    def fail(_: Tensor) -> None:
        raise KeyError("planted")

    handle = net.layers[0].weight.register_hook(fail)
    with pytest.raises(KeyError, match="planted"):
        backward(net)
    handle.remove()
    assert optimizer.holds_gradients
    optimizer.zero_grad()
    assert not optimizer.holds_gradients
    assert_goes_on_as((net, optimizer), (twin, ordinary))


def test_zero_grad_between_backward_and_step_discards():
    net = new_net()
    optimizer = build(net, fuse=True)
    backward(net)
    optimizer.zero_grad(set_to_none=False)
    net.head.zero_grad()
    assert optimizer.step() is None
    assert optimizer.metrics()["step"] == 0
    backward(net)
    optimizer.step()
    optimizer.zero_grad()
    optimizer.step()  # nothing came since
    assert optimizer.metrics()["step"] == 1


def test_zero_grad_in_the_middle_of_backward():
    """What came before is forgotten, what comes after counts: as in the ordinary mode."""
    runs = []
    for fuse in (True, False):
        net = new_net()
        optimizer = build(net, fuse)
        handle = net.layers[1].weight.register_hook(lambda _, one=optimizer: one.zero_grad())
        for step in range(3):
            backward(net, seed=step)
            optimizer.step()
            optimizer.zero_grad()
            optimizer.zero_grad()
        handle.remove()
        runs.append(optimizer)
    assert_same_state(*runs)
    assert runs[0].metrics()["active"] > 0
    assert runs[0].metrics()["active/layers.2.weight"] == 0


def test_zero_grad_is_not_needed_after_a_step():
    """Dense gradients are used up, too; alone they would accumulate."""
    runs = []
    for zeroes in (True, False):
        net = new_net()
        optimizer = build(net, fuse=True)
        for step in range(3):
            backward(net, seed=step)
            optimizer.step()
            assert net.head.weight.grad is None
            if zeroes:
                optimizer.zero_grad()
        runs.append(optimizer)
    assert_same_state(*runs)


def test_a_second_step_without_gradients_is_refused():
    """The ordinary mode would take the step again; here its gradients are gone."""
    net = new_net()
    optimizer = build(net, fuse=True)
    assert optimizer.step() is None  # nothing came, nothing is lost
    backward(net)
    optimizer.step()
    before = [param.detach().clone() for param in net.parameters()]
    with pytest.raises(RuntimeError, match="no gradient has come since the last step"):
        optimizer.step()
    assert optimizer.metrics()["step"] == 1
    for param, value in zip(net.parameters(), before, strict=True):
        assert_same_bits(param.detach(), value)
    backward(net, seed=1)
    optimizer.step()
    net.head(torch.ones(1, 60)).sum().backward()  # the dense group alone
    optimizer.step()
    assert optimizer.metrics()["step"] == 3


def test_the_models_zero_grad_does_not_discard():
    net = new_net()
    build_keeps = build(net, fuse=True)
    backward(net)
    net.zero_grad()
    with pytest.raises(RuntimeError, match=r"zero_grad\(\) discards"):
        backward(net)
    assert build_keeps.fuse_backward


def test_gradients_set_by_hand_are_taken_at_the_step(backend):
    """As are those of parameters that were unfrozen after the construction."""
    runs = []
    for fuse in (True, False):
        net = new_net()
        net.layers[1].requires_grad_(False)
        optimizer = build(net, fuse, backend=backend)
        net.layers[1].requires_grad_(True)
        for step in range(3):
            backward(net, seed=step, rare=False)
            net.rare.grad = torch.full((24,), 0.5)
            optimizer.step()
            optimizer.zero_grad()
        runs.append(optimizer)
    assert_same_state(*runs)
    assert len(runs[0]._fused_backward._handles) == len(runs[0].engine.pool.params)


def test_frozen_parameters_get_no_hook_and_stay():
    net = new_net()
    net.layers[1].requires_grad_(False)
    before = net.layers[1].weight.detach().clone()
    optimizer = build(net, fuse=True)
    backward(net)
    optimizer.step()
    assert_same_bits(net.layers[1].weight.detach(), before)
    assert net.layers[1].weight._post_accumulate_grad_hooks is None


def test_a_gradient_that_comes_back_after_it_was_taken_is_refused():
    net = new_net()
    optimizer = build(net, fuse=True)
    backward(net)
    net.norm.bias.grad = torch.ones(24)
    with pytest.raises(RuntimeError, match=r"norm\.bias got a second gradient"):
        optimizer.step()


def test_switched_off_and_on_between_steps():
    net, twin = new_net(), new_net()
    optimizer, ordinary = build(net, fuse=True), build(twin, fuse=False)
    for step in range(6):
        optimizer.fuse_backward = step % 2 == 0
        for model, one in ((net, optimizer), (twin, ordinary)):
            backward(model, seed=step)
            assert (model.rare.grad is None) == one.fuse_backward
            one.step()
            one.zero_grad()
    assert_same_state(optimizer, ordinary)


@pytest.mark.parametrize(
    "change",
    [
        lambda optimizer: setattr(optimizer, "fuse_backward", False),
        lambda optimizer: optimizer.extend(budget=400),
        lambda optimizer: optimizer.load_state_dict(optimizer.state_dict()),
        lambda optimizer: optimizer.add_param_group(
            {"params": [("new", nn.Parameter(torch.ones(3)))]}
        ),
        copy.deepcopy,
    ],
)
def test_nothing_changes_between_backward_and_step(change):
    net = new_net()
    optimizer = build(net, fuse=True)
    backward(net)
    with pytest.raises(RuntimeError, match="between backward"):
        change(optimizer)
    optimizer.step()
    optimizer.zero_grad()
    assert optimizer.metrics()["step"] == 1
    change(optimizer)
    backward(net)


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_a_copy_has_hooks_of_its_own(how):
    net = new_net()
    optimizer = build(net, fuse=True)
    backward(net)
    optimizer.step()
    optimizer.zero_grad()
    both = net, optimizer
    twin, other = copy.deepcopy(both) if how == "deepcopy" else pickle.loads(pickle.dumps(both))
    assert other.fuse_backward
    for model, one in ((net, optimizer), (twin, other)):
        backward(model, seed=1)
        assert_pool_is_free(one)
        one.step()
        one.zero_grad()
    assert_same_state(other, optimizer)


def test_resume_and_extend_keep_the_hooks():
    net, twin = new_net(), new_net()
    optimizer, other = build(net, fuse=True), build(twin, fuse=True)
    for step in range(2):
        backward(net, seed=step)
        optimizer.step()
        optimizer.zero_grad()
    twin.load_state_dict(net.state_dict())
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for model, one in ((net, optimizer), (twin, other)):
        one.extend(budget=500, total_steps=60)
        backward(model, seed=2)
        assert_pool_is_free(one)
        one.step()
    assert_same_state(other, optimizer)


def test_an_optimizer_that_is_gone_takes_nothing():
    net = new_net()
    optimizer = build(net, fuse=True)
    with pytest.raises(ValueError, match="another optimizer"):
        build(net, fuse=True)
    del optimizer
    gc.collect()
    backward(net)
    assert all(param.grad is not None for param in net.parameters())
    second = build(net, fuse=True)
    second.step()
    assert second.metrics()["active"] > 0


def test_a_failed_construction_leaves_no_hooks():
    """The second of two parameters is another optimizer's."""
    first, second = nn.Parameter(torch.ones(5)), nn.Parameter(torch.ones(5))
    options = {"budget": 2, "total_steps": 1, "max_grad_norm": 1.0, "fuse_backward": True}
    owner = IncrementalMaskedAdamW([second], **options, unmask_steps=1.0)
    with pytest.raises(ValueError, match="another optimizer"):
        IncrementalMaskedAdamW([first, second], **options, unmask_steps=1.0)
    (first * 2 + second).sum().backward()
    assert first.grad is not None
    assert owner.holds_gradients


def test_compiled_as_a_whole():
    """Gradients come together then: nothing is saved, nothing changes."""
    runs = []
    for fuse in (True, False):
        net = new_net()
        optimizer = build(net, fuse)
        compiled = torch.compile(net, backend="aot_eager")
        for step in range(3):
            backward(compiled, seed=step)
            optimizer.step()
            optimizer.zero_grad()
        runs.append(optimizer)
    assert_same_state(*runs)

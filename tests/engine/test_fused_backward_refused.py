"""What fuse_backward=True cannot do is refused in words: methods, several processes, scalers."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from backward_nets import backward, build, loss_of, new_net
from torch import distributed, nn

from sparse_optim import (
    D3,
    IncrementalMaskedAdamW,
    MaskedAdamW,
    Repeat,
    Snip,
    Stochastic,
)
from sparse_optim.optim.grad_scaler import GradScaler


@pytest.fixture
def group_of_one() -> Iterator[None]:
    """A process group of this process alone."""
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def test_several_processes_are_refused(monkeypatch):
    net = new_net()
    optimizer = build(net, fuse=True)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    with pytest.raises(RuntimeError, match="DistributedDataParallel"):
        backward(net)
    with pytest.raises(RuntimeError, match="DistributedDataParallel"):
        build(new_net(), fuse=True)
    monkeypatch.undo()
    optimizer.zero_grad()
    backward(net)
    optimizer.step()


def test_ddp_of_one_process_is_refused_at_the_step(group_of_one):
    """Its reducer writes gradients back after ours were taken."""
    net = new_net()
    optimizer = build(net, fuse=True)
    wrapped = nn.parallel.DistributedDataParallel(net)
    before = [param.detach().clone() for param in net.parameters()]
    backward(wrapped)
    with pytest.raises(RuntimeError, match="averaged by DistributedDataParallel"):
        optimizer.step()
    assert optimizer.metrics()["step"] == 0
    assert all(map(torch.equal, before, net.parameters()))


def test_fully_sharded_parameters_are_refused(group_of_one):
    """FSDP2 makes DTensors of all parameters; the model still trains afterwards."""
    net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2))
    mesh = distributed.device_mesh.init_device_mesh("cpu", (1,))
    for module in (*net, net):
        distributed.fsdp.fully_shard(module, mesh=mesh)
    options = {"budget": 5, "total_steps": 3, "max_grad_norm": 1.0, "fuse_backward": True}
    with pytest.raises(ValueError, match="fuse_backward=True does not work with sharded"):
        IncrementalMaskedAdamW(net.named_parameters(), **options, unmask_steps=1.0)
    net(torch.ones(3, 8)).sum().backward()
    assert all(param.grad is not None for param in net.parameters())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"importance": D3(), "selection": Repeat(3)}, "only grows"),
        ({"importance": Snip(), "selection": Stochastic(3)}, "only grows"),
    ],
)
def test_sets_that_are_drawn_anew_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        MaskedAdamW(nn.Linear(3, 3).parameters(), max_grad_norm=1.0, fuse_backward=True, **options)


def test_says_that_nothing_clips():
    with pytest.warns(UserWarning, match="clip_grad_norm_ finds none and returns 0"):
        optimizer = build(new_net(), fuse=True, max_grad_norm=None)
    assert optimizer.fuse_backward


def test_sparse_gradients_are_refused_in_backward():
    layer = nn.Embedding(9, 4, sparse=True)
    optimizer = IncrementalMaskedAdamW(
        layer.parameters(),
        budget=2,
        total_steps=1,
        max_grad_norm=1.0,
        fuse_backward=True,
        unmask_steps=1.0,
    )
    with pytest.raises(TypeError, match="sparse=False"):
        layer(torch.tensor([1])).sum().backward()
    assert not optimizer._fused_backward.holds_any


def test_torchs_scaler_is_refused():
    net = new_net()
    optimizer = build(net, fuse=True)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(loss_of(net, torch.Generator())).backward()
    with pytest.raises(RuntimeError, match=r"sparse_optim\.amp\.GradScaler"):
        scaler.step(optimizer)
    assert optimizer.metrics()["step"] == 0


def test_unscaling_from_outside_is_refused():
    net = new_net()
    optimizer = build(net, fuse=True)
    scaler = GradScaler("cpu")
    scaler.scale(loss_of(net, torch.Generator())).backward()
    with pytest.raises(RuntimeError, match="unscale_ does not find the gradients"):
        scaler.unscale_(optimizer)
    scaler.step(optimizer)
    scaler.update()
    assert optimizer.metrics()["step"] == 1

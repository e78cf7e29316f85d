"""Train replicas with sampled gradients, and compare them.

    python sampled_replicas.py RANK WORLD FOLDER

Run by tests/optim/test_replicas.py, a process for each rank. Every rank gets its part of the global
batch; a single process that trains on the whole of it is the reference.
"""

from __future__ import annotations

import copy
import io
import sys
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.join import Join
from torch.nn.parallel import DistributedDataParallel

from sparse_optim import (
    D3,
    Increment,
    IncrementalMaskedAdamW,
    Magnitude,
    MaskedAdamW,
    Random,
    Static,
)

RANK, WORLD = int(sys.argv[1]), int(sys.argv[2])
EACH, WIDTH, STEPS, BUDGET = 4, 8, 9, 40  # examples of a rank, inputs


class Net(nn.Module):
    """Two layers that sample, one of them used twice, and a head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(WIDTH, 16), nn.Linear(16, 16)
        self.head = nn.Linear(16, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = torch.tanh(self.first(inputs))
        output: Tensor = self.head(torch.tanh(self.second(torch.tanh(self.second(hidden)))))
        return output


def groups_of(net: Net, head: bool = True) -> list[dict[str, Any]]:
    """Weights and biases compete; the head, if there is one, is trained densely."""
    named = list(net.named_parameters())
    if not head:
        net.head.requires_grad_(False)
    ranked = [(name, param) for name, param in named if "head" not in name]
    dense = [(name, param) for name, param in named if "head" in name and head]
    return [{"params": ranked}] + ([{"params": dense, "unmask": "all"}] if dense else [])


def increment(net: Net, **options: Any) -> MaskedAdamW:
    """ID3 that unmasks in steps 0, 3 and 6."""
    settings = {"importance": D3(), "selection": Increment(BUDGET, 9, every=3), "lr": 0.05}
    settings |= {"max_grad_norm": 1.0, "model": net, "sampled_backward": True, **options}
    head = settings.pop("head", True)
    return MaskedAdamW(groups_of(net, head), **settings)


def weights_alone(net: Net) -> MaskedAdamW:
    """A pool of sampling weights: without biases and a head nothing is left for DDP."""
    for name, param in net.named_parameters():
        param.requires_grad_(name in ("first.weight", "second.weight"))
    params = [net.first.weight, net.second.weight]
    settings = {"importance": D3(), "selection": Increment(BUDGET, 9, every=3), "lr": 0.05}
    return MaskedAdamW(params, max_grad_norm=1.0, model=net, sampled_backward=True, **settings)


def incremental(net: Net) -> MaskedAdamW:
    """The one-line form."""
    return IncrementalMaskedAdamW(
        groups_of(net), lr=0.05, budget=BUDGET, total_steps=STEPS, every=2, unmask_steps=1.0,
        max_grad_norm=1.0, model=net, sampled_backward=True,
    )  # fmt: skip


BUILDS: dict[str, Callable[[Net], MaskedAdamW]] = {
    "increment": increment,
    "one line": incremental,
    "random": lambda net: increment(net, importance=Random(seed=3), selection=Static(BUDGET)),
    "pafi": lambda net: increment(net, importance=Magnitude(), selection=Static(BUDGET)),
    "global": lambda net: increment(net, bias_correction="global"),
    "no head": lambda net: increment(net, head=False),
    "weights alone": weights_alone,
    "reference": lambda net: increment(net, backend="reference"),
}


def batch(step: int, micro: int = 0) -> Tensor:
    """The examples of all ranks."""
    generator = torch.Generator().manual_seed(100 * step + micro)
    return torch.randn(WORLD * EACH, WIDTH, generator=generator)


def mine(whole: Tensor) -> Tensor:
    """This rank's part."""
    return whole[RANK * EACH : (RANK + 1) * EACH]


def loss_of(model: nn.Module, inputs: Tensor) -> Tensor:
    """Each example counts the same, so that the mean over ranks is that of the whole batch."""
    return model(inputs).square().mean()


def weights_of(net: nn.Module) -> Tensor:
    return torch.cat([param.detach().reshape(-1) for param in net.parameters()])


def assert_equal_everywhere(values: Tensor, what: str) -> None:
    found = [torch.zeros_like(values) for _ in range(WORLD)]
    dist.all_gather(found, values)
    assert all(torch.equal(found[0], other) for other in found), f"{what}: replicas differ"


def train(
    model: nn.Module, optimizer: MaskedAdamW, part: Callable[[Tensor], Tensor], steps: range,
    micro: int = 1, poison: int | None = None,
) -> None:  # fmt: skip
    """Steps; `poison` is one in which the first rank has an infinite gradient."""
    for step in steps:
        for each in range(micro):
            waits = each < micro - 1 and isinstance(model, DistributedDataParallel)
            with model.no_sync() if waits else nullcontext():  # type: ignore[operator]
                loss = loss_of(model, part(batch(step, each))) / micro
                if step == poison and (RANK == 0 or part is not mine):
                    loss = loss * torch.inf
                loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def wrapped(build: Callable[[Net], MaskedAdamW], **options: Any) -> tuple[Any, MaskedAdamW]:
    net = Net()
    optimizer = build(net)
    return DistributedDataParallel(net, **options), optimizer


def compare(name: str, micro: int = 1, poison: int | None = None, **options: Any) -> None:
    """Replicas have equal bits, and those of one process up to the order of summation."""
    model, optimizer = wrapped(BUILDS[name], **options)
    train(model, optimizer, mine, range(STEPS), micro, poison)
    what = f"{name}, micro={micro}, poison={poison}, {options}"
    assert_equal_everywhere(weights_of(model), what)
    active = optimizer.active_entries()
    assert_equal_everywhere(torch.cat([active[key] for key in sorted(active)]), what)
    assert optimizer.metrics()["skipped_steps"] == (poison is not None), what
    assert sum(map(len, active.values())) > BUDGET // 2, what

    alone = Net()
    with patch.object(dist, "is_initialized", lambda: False):
        single = BUILDS[name](alone)
        train(alone, single, lambda whole: whole, range(STEPS), micro, poison)
    for key, positions in single.active_entries().items():
        assert torch.equal(active[key], positions), f"{what}: {key}"
    torch.testing.assert_close(weights_of(model), weights_of(alone), rtol=2e-4, atol=2e-5)


def bytes_on_the_wire() -> None:
    """Quiet steps reduce active entries and a flag for each weight, loud ones whole weights."""
    model, optimizer = wrapped(BUILDS["increment"])
    sent: list[int] = []
    real = dist.all_reduce

    def counted(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        sent.append(tensor.numel() * tensor.element_size())
        return real(tensor, *args, **kwargs)

    dist.all_reduce = counted
    try:
        for step in range(STEPS):
            active = optimizer.active_entries() if step else {}
            train(model, optimizer, mine, range(step, step + 1))
            weights = 4 * (WIDTH * 16 + 16 * 16)
            ranked = sum(len(part) for name, part in active.items() if "head" not in name)
            assert sent == [2, 4 * ranked if step % 3 else weights], (step, sent)
            sent.clear()
    finally:
        dist.all_reduce = real


def resumed(name: str) -> None:
    """A run that is saved and loaded between two of its unmaskings goes on bit for bit."""
    model, optimizer = wrapped(BUILDS[name])
    train(model, optimizer, mine, range(STEPS))
    before, saving = wrapped(BUILDS[name])
    train(before, saving, mine, range(4))
    file = io.BytesIO()
    torch.save([before.module.state_dict(), saving.state_dict()], file)
    after, loading = wrapped(BUILDS[name])
    file.seek(0)
    weights, state = torch.load(file, weights_only=True)
    after.module.load_state_dict(weights)
    loading.load_state_dict(state)
    train(after, loading, mine, range(4, STEPS))
    assert torch.equal(weights_of(after), weights_of(model))


def message_of(action: Callable[[], object]) -> str:
    try:
        action()
    except RuntimeError as error:
        return str(error)
    raise AssertionError("no error")


def refused() -> None:
    """What would average nothing, or wait for ever, is an error in all processes."""
    wrapped_too_early()
    unwrapped()
    different_weights()
    model, _ = wrapped(BUILDS["increment"])
    with Join([model]):
        assert "DDP's join()" in message_of(lambda: loss_of(model, mine(batch(0))))


def wrapped_too_early() -> None:
    net = Net()
    model = DistributedDataParallel(net)
    optimizer = increment(net)
    assert optimizer.sampled_backward
    assert "then build the optimizer" in message_of(lambda: loss_of(model, mine(batch(0))))


def unwrapped() -> None:
    net = Net()
    optimizer = increment(net)
    assert "not that of DistributedDataParallel" in message_of(lambda: loss_of(net, batch(0)))
    assert "fuse_backward=True does not work" in message_of(
        lambda: setattr(optimizer, "fuse_backward", True)
    )


def different_weights() -> None:
    model, optimizer = wrapped(BUILDS["increment"])
    with torch.no_grad():
        model(batch(0))  # evaluation is no business of ours
        model.module.second.weight[0, 0] += RANK
    before = copy.deepcopy(model.state_dict())
    loss_of(model, mine(batch(0))).backward()
    assert "second.weight differs between the processes" in message_of(optimizer.step)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    optimizer.zero_grad()
    assert "cannot be switched off in several" in message_of(
        lambda: setattr(optimizer, "sampled_backward", False)
    )


def left_alone_afterwards() -> None:
    """A wrapper that is built after the optimizer is gone averages all weights."""
    net = Net()
    optimizer = increment(net)
    assert "first.weight" in DistributedDataParallel(net).parameters_to_ignore
    optimizer.sampled_backward = False
    assert not DistributedDataParallel(net).parameters_to_ignore
    del optimizer
    plain = MaskedAdamW(net.parameters(), importance=D3(), selection=Increment(BUDGET, 9))
    model = DistributedDataParallel(net)
    train(model, plain, mine, range(3))
    assert_equal_everywhere(weights_of(net), "without sampling")


def main() -> None:
    address = f"file://{sys.argv[3]}/group"
    dist.init_process_group("gloo", init_method=address, rank=RANK, world_size=WORLD)
    for name in BUILDS:
        compare(name)
    compare("increment", micro=3)
    compare("increment", poison=4)
    compare("increment", poison=3)
    compare("increment", gradient_as_bucket_view=True)
    compare("increment", static_graph=True)
    compare("increment", find_unused_parameters=True)
    bytes_on_the_wire()
    resumed("weights alone")
    if WORLD == 2:  # of three, DDP's own sums depend on its buckets, which differ after its start
        resumed("increment")
    left_alone_afterwards()
    refused()
    dist.destroy_process_group()
    sys.stdout.write("equal\n")


if __name__ == "__main__":
    main()

"""Runs of replicas with sampled gradients, and what they must be equal to.

Every rank gets its part of the global batch; a single process that trains on the whole of it is the
reference, or replicas with ordinary gradients where the ranks do not do the same.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from sparse_optim import (
    D3,
    Increment,
    IncrementalMaskedAdamW,
    Magnitude,
    MaskedAdamW,
    Random,
    Static,
)

RANK, WORLD = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
EACH, WIDTH, STEPS, BUDGET = 4, 8, 9, 40  # examples of a rank, inputs


class Net(nn.Module):
    """Two layers that sample, one of them used twice, a head, and a scale that may join later.

    Args:
        recomputes: the layers run again in the backward pass.
        skips: says in each forward pass whether it uses the head alone.
    """

    def __init__(self, recomputes: bool = False, skips: Callable[[], bool] | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(WIDTH, 16), nn.Linear(16, 16)
        self.head, self.scale = nn.Linear(16, 3), nn.Parameter(torch.ones(3))
        self.recomputes, self.skips = recomputes, skips

    def body(self, inputs: Tensor) -> Tensor:
        hidden = torch.tanh(self.first(inputs))
        return torch.tanh(self.second(torch.tanh(self.second(hidden))))

    def forward(self, inputs: Tensor) -> Tensor:
        if self.skips is not None and self.skips():
            hidden = inputs.repeat(1, 2)
        elif self.recomputes:
            hidden = checkpoint(self.body, inputs.requires_grad_(), use_reentrant=True)
        else:
            hidden = self.body(inputs)
        output: Tensor = self.head(hidden) * self.scale
        return output


def groups_of(net: Net, head: bool = True) -> list[dict[str, Any]]:
    """Weights and biases compete; the head, if there is one, is trained densely."""
    named = [item for item in net.named_parameters() if item[0] != "scale"]
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
    return MaskedAdamW(groups_of(net, head), norm="active", **settings)


def weights_alone(net: Net) -> MaskedAdamW:
    """A pool of sampling weights: without biases and a head nothing is left for DDP."""
    for name, param in net.named_parameters():
        param.requires_grad_(name in ("first.weight", "second.weight"))
    params = [net.first.weight, net.second.weight]
    settings = {"importance": D3(), "selection": Increment(BUDGET, 9, every=3), "lr": 0.05}
    return MaskedAdamW(params, max_grad_norm=1.0, model=net, sampled_backward=True, **settings)


def incremental(net: Net, **options: Any) -> MaskedAdamW:
    """The one-line form."""
    settings = {"every": 4, "unmask_steps": 1.0, "sampled_backward": True, **options}
    return IncrementalMaskedAdamW(
        groups_of(net), lr=0.05, budget=BUDGET, total_steps=STEPS, max_grad_norm=1.0, model=net,
        norm="active", **settings,
    )  # fmt: skip


def random_set(net: Net, **options: Any) -> MaskedAdamW:
    """A set that is taken before the first step."""
    return increment(net, importance=Random(seed=3), selection=Static(BUDGET), **options)


BUILDS: dict[str, Callable[..., MaskedAdamW]] = {
    "every 3": increment,
    "every 1": lambda net: incremental(net, every=1, unmask_steps=0.6),
    "every 4": incremental,
    "random": random_set,
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


def assert_replicas(model: nn.Module, optimizer: MaskedAdamW, what: str) -> None:
    """Equal weights and positions, bit for bit, of a run that has unmasked much of its budget."""
    assert_equal_everywhere(weights_of(model), what)
    active = optimizer.active_entries()
    assert_equal_everywhere(torch.cat([active[key] for key in sorted(active)]), what)
    assert sum(map(len, active.values())) > BUDGET // 2, what


def assert_same_run(
    got: tuple[nn.Module, MaskedAdamW], want: tuple[nn.Module, MaskedAdamW], what: str
) -> None:
    """The same positions, and weights up to the order of summation."""
    active = got[1].active_entries()
    for key, positions in want[1].active_entries().items():
        assert torch.equal(active[key], positions), f"{what}: {key}"
    torch.testing.assert_close(weights_of(got[0]), weights_of(want[0]), rtol=2e-4, atol=2e-5)


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


def wrapped(
    build: Callable[[Net], MaskedAdamW], net: Net | None = None, **options: Any
) -> tuple[Any, MaskedAdamW]:
    net = Net() if net is None else net
    optimizer = build(net)
    return DistributedDataParallel(net, **options), optimizer


@contextmanager
def alone() -> Iterator[None]:
    """Within the block this process knows of no others."""
    with patch.object(dist, "is_initialized", lambda: False):
        yield


def run_alone(
    build: Callable[[Net], MaskedAdamW], change: Callable[[Any, MaskedAdamW], None] | None = None,
    **options: Any,
) -> tuple[Net, MaskedAdamW]:  # fmt: skip
    """One process that trains on the global batches, changed before step 4."""
    net = Net()
    with alone():
        optimizer = build(net)
        train(net, optimizer, lambda whole: whole, range(4), **options)
        if change is not None:
            change(net, optimizer)
        train(net, optimizer, lambda whole: whole, range(4, STEPS), **options)
    return net, optimizer


def compare(name: str, micro: int = 1, poison: int | None = None, **options: Any) -> None:
    """Replicas have equal bits, and those of one process up to the order of summation."""
    model, optimizer = wrapped(BUILDS[name], **options)
    train(model, optimizer, mine, range(STEPS), micro, poison)
    what = f"{name}, micro={micro}, poison={poison}, {options}"
    assert_replicas(model, optimizer, what)
    assert optimizer.metrics()["skipped_steps"] == (poison is not None), what
    want = run_alone(BUILDS[name], micro=micro, poison=poison)
    assert_same_run((model, optimizer), want, what)


def compare_with_ordinary(
    build: Callable[..., MaskedAdamW], net: Callable[[], Net], part: Callable[[Tensor], Tensor]
) -> None:
    """Where the ranks differ in what they do: as DDP averages ordinary gradients."""
    runs = []
    for sampled in (True, False):
        model, optimizer = wrapped(
            lambda net, sampled=sampled: build(net, sampled_backward=sampled), net(),
            find_unused_parameters=True,
        )  # fmt: skip
        train(model, optimizer, part, range(STEPS))
        assert_replicas(model, optimizer, "ranks that differ")
        runs.append((model, optimizer))
    assert_same_run(*runs, "ranks that differ")


def unequal_batches() -> None:
    """The first rank has fewer examples in each step."""
    compare_with_ordinary(increment, Net, lambda whole: mine(whole)[: 1 if RANK == 0 else EACH])


def ranks_that_run_no_layer() -> None:
    """One of them none before step 5, and all none in steps 6 and 7; sets taken before step 0."""
    for build in (increment, random_set):
        passes: list[int] = []

        def skips(passes: list[int] = passes) -> bool:
            passes.append(0)
            step = (len(passes) - 1) % STEPS
            return step in (6, 7) or (RANK == 1 and step < 5)

        compare_with_ordinary(build, lambda skips=skips: Net(skips=skips), mine)


@contextmanager
def bytes_sent() -> Iterator[list[int]]:
    """Bytes of each of our all-reduces."""
    sent: list[int] = []
    real = dist.all_reduce

    def counted(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        sent.append(tensor.nbytes)
        return real(tensor, *args, **kwargs)

    with patch.object(dist, "all_reduce", counted):
        yield sent


def bytes_on_the_wire() -> None:
    """A quiet step reduces active entries and a flag for each weight, a loud one whole weights."""
    model, optimizer = wrapped(increment)
    with bytes_sent() as sent:
        for step in range(STEPS):
            active = optimizer.active_entries()
            train(model, optimizer, mine, range(step, step + 1))
            ranked = sum(len(active[f"{name}.weight"]) for name in ("first", "second"))
            whole = 4 * (WIDTH * 16 + 16 * 16)
            assert sent == [1 + 2, 4 * ranked if step % 3 else whole], (step, sent)
            sent.clear()


def resumed(name: str, **options: Any) -> None:
    """A run that is saved and loaded between two of its unmaskings goes on bit for bit."""
    model, optimizer = wrapped(BUILDS[name], **options)
    train(model, optimizer, mine, range(STEPS))
    before, saving = wrapped(BUILDS[name], **options)
    train(before, saving, mine, range(4))
    file = io.BytesIO()
    torch.save([before.module.state_dict(), saving.state_dict()], file)
    after, loading = wrapped(BUILDS[name], **options)
    file.seek(0)
    weights, state = torch.load(file, weights_only=True)
    after.module.load_state_dict(weights)
    loading.load_state_dict(state)
    train(after, loading, mine, range(4, STEPS))
    assert torch.equal(weights_of(after), weights_of(model))


def compiled() -> None:
    """torch.compile of the wrapper, of the model in its place, and of a layer."""
    plain = run_alone(increment)
    for what in ("wrapper", "layer"):
        torch._dynamo.reset()
        model, optimizer = wrapped(increment)
        target = {"wrapper": model, "model": model.module, "layer": model.module.second}[what]
        target.compile(backend="eager")
        with bytes_sent() as sent:
            train(model, optimizer, mine, range(STEPS))
        assert sent.count(4 * (WIDTH * 16 + 16 * 16)) == 3, sent
        assert_replicas(model, optimizer, what)
        assert_same_run((model, optimizer), plain, what)

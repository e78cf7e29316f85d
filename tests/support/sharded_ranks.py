"""Processes that share one model; each follows a whole copy of it, fed with the same gradients.

python sharded_ranks.py RANK FOLDER
"""

from __future__ import annotations

import copy
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate.utils.fsdp_utils import fsdp2_switch_optimizer_parameters
from processes import leave_group
from torch import Tensor, nn
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from sparse_optim import D3, Increment, MaskedAdamW, Repeat, Static, amp, save_delta
from sparse_optim.delta import Delta, DeltaError
from sparse_optim.engine import kth_largest, pool
from sparse_optim.policy.importance import Magnitude, Random, Snip, Traits
from sparse_optim.publish import WeightPublisher, WeightReceiver

WORLD = 4
STEPS = 6

METHODS: dict[str, dict[str, Any]] = {
    "d3": {},
    "d3, exp 2, clipped": {"importance": D3(2.0), "max_grad_norm": 0.05},
    "d3, exp -1, bfloat16": {"importance": D3(-1.0), "dtype": torch.bfloat16},
    "d3, exp 0.7": {"importance": D3(0.7)},
    "d3, exp 0.7, reference": {"importance": D3(0.7), "backend": "reference"},
    "every third step, norm active": {
        "selection": Increment(40, STEPS, every=3), "norm": "active", "max_grad_norm": 0.05,
    },
    "snip": {"importance": Snip()},
    "pafi": {"importance": Magnitude(), "selection": Static(40)},
    "random mask": {"importance": Random(3), "selection": Static(40)},
    "random order, reference": {"importance": Random(3), "backend": "reference"},
    "dense head": {"dense": "last", "bias_correction": "global"},
    "clipped, with a dense head": {"dense": "last", "max_grad_norm": 0.05},
}  # fmt: skip


class Net(nn.Module):
    """Odd sizes, so that shards are uneven and, of `last` over four processes, empty."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.last = nn.Linear(7, 10), nn.Linear(10, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.second(self.first(x).tanh()).tanh())


def optimizer_of(net: nn.Module, dense: str = "", **options: Any) -> MaskedAdamW:
    named = list(net.named_parameters())
    groups: list[dict[str, Any]] = [
        {"params": [(n, p) for n, p in named if not (dense and n.startswith(dense))]}
    ]
    if dense:
        head = [(n, p) for n, p in named if n.startswith(dense)]
        groups.append({"params": head, "unmask": "all"})
    given = {"importance": D3(0.0), "selection": Increment(40, STEPS, unmask_steps=4)}
    return MaskedAdamW(groups, lr=0.05, **{**given, **options})


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def train(net: nn.Module, step: int, rank: int) -> None:
    dtype = next(net.parameters()).dtype
    data = torch.randn(4, 7, generator=torch.Generator().manual_seed(10 * step + rank)).to(dtype)
    net(data).square().mean().backward()


def train_twice(net: Any, step: int, rank: int) -> None:
    net.set_requires_gradient_sync(False)
    train(net, step, rank)
    net.set_requires_gradient_sync(True)
    train(net, step + 100, rank)


def make_up(net: nn.Module, step: int, rank: int = 0) -> None:
    """Gradients by numbers; in step 2 an infinite one, in one process, skips the step."""
    for number, param in enumerate(net.parameters()):
        seed = torch.Generator().manual_seed(99 * step + number)
        grad = torch.randn(param.shape, generator=seed).to(param.dtype)
        if step == 2 and number == 0:
            grad.view(-1)[-1] = torch.inf
        if isinstance(param, DTensor):
            mesh = param.device_mesh
            grad = distribute_tensor(grad, mesh, param.placements, src_data_rank=None)
        param.grad = grad


def follow(
    name: str, shard: Callable[[nn.Module], None], group: Any = None, **options: Any
) -> tuple[nn.Module, MaskedAdamW, MaskedAdamW]:
    """Train shards and a whole copy; compare everything after each step.

    Clipped runs and those with dense groups: bit for bit with `shard_invariant`; of two processes
    without, too, up to rounding.
    """
    rounds = "max_grad_norm" in options or "dense" in options
    if rounds and dist.get_world_size(group) == 2:
        follow_once(name, shard, group, exact=False, **options)
    return follow_once(name, shard, group, shard_invariant=rounds, **options)


def follow_once(
    name: str, shard: Callable[[nn.Module], None], group: Any, *,
    gradients: Callable[[nn.Module, int, int], None] = make_up,
    dtype: torch.dtype = torch.float32, exact: bool = True, **options: Any,
) -> tuple[nn.Module, MaskedAdamW, MaskedAdamW]:  # fmt: skip
    net, single = Net().to(dtype), Net().to(dtype)
    shard(net)
    optimizer, oracle = optimizer_of(net, **options), optimizer_of(single, **options)
    for step in range(STEPS):
        gradients(net, step, dist.get_rank(group))
        step_both(name, net, single, optimizer, oracle, exact)
    return net, optimizer, oracle


def step_both(
    name: str, net: nn.Module, single: nn.Module, optimizer: MaskedAdamW, oracle: MaskedAdamW,
    exact: bool = True,
) -> None:  # fmt: skip
    for param, mine in zip(net.parameters(), single.parameters(), strict=True):
        mine.grad = None if param.grad is None else whole(param.grad).clone()
    optimizer.step()
    oracle.step()
    optimizer.zero_grad()
    for (which, got), want in zip(net.named_parameters(), single.parameters(), strict=True):
        close = torch.equal if exact else partial(torch.allclose, rtol=1e-5, atol=1e-7)
        assert close(whole(got), want), (name, which)
    ours, theirs = optimizer.metrics(), oracle.metrics()
    for key in ("step", "active", "budget_left", "skipped_steps", "threshold"):
        assert ours[key] == theirs[key], (name, key, ours[key], theirs[key])
    if not theirs["skipped_steps"]:
        norms = torch.tensor([ours["grad_norm"], theirs["grad_norm"]], dtype=torch.float64)
        rtol = 0.0 if optimizer.shard_invariant else 1e-6
        torch.testing.assert_close(norms[0], norms[1], rtol=rtol, atol=0.0)
    if exact:
        same_state(name, optimizer.state_dict()["state"], oracle.state_dict()["state"])


def same_state(name: str, ours: dict[int, Any], theirs: dict[int, Any]) -> None:
    """A checkpoint of many processes is that of one, bit for bit."""
    assert ours.keys() == theirs.keys()
    for key, state in theirs.items():
        assert ours[key].keys() == state.keys(), (name, key)
        for field, value in state.items():
            got = whole(ours[key][field])
            assert torch.equal(got, value), (name, key, field, got, value)


def same_delta(name: str, net: nn.Module, ours: MaskedAdamW, theirs: MaskedAdamW, to: Path) -> None:
    """The files are the same, byte for byte."""
    first, second = to / f"ours{dist.get_rank()}", to / f"theirs{dist.get_rank()}"
    save_delta(ours.delta(net), first)
    save_delta(theirs.delta(), second)
    assert first.read_bytes() == second.read_bytes(), name


def by_fsdp(mesh: DeviceMesh, **options: Any) -> Callable[[nn.Module], None]:
    def shard(net: Any) -> None:
        for module in (net.first, net.second, net):
            fully_shard(module, mesh=mesh, **options)

    return shard


def by_placements(
    mesh: DeviceMesh, matrix: list[Any], vector: list[Any]
) -> Callable[[nn.Module], None]:
    def shard(net: Any) -> None:
        for module in (net.first, net.second, net.last):
            for name, param in list(module.named_parameters(recurse=False)):
                placements = matrix if param.dim() == 2 else vector
                placed = distribute_tensor(param.detach(), mesh, placements, src_data_rank=None)
                module.register_parameter(name, nn.Parameter(placed))

    return shard


def by_tensor_parallelism(mesh: DeviceMesh) -> Callable[[nn.Module], None]:
    def shard(net: Any) -> None:
        plan = {"first": ColwiseParallel(), "second": RowwiseParallel()}
        parallelize_module(net, mesh["tp"], plan)
        for module in (net.first, net.second, net):
            fully_shard(module, mesh=mesh["dp"])

    return shard


class NotFinite:
    """An importance that fails in one of the processes."""

    traits = Traits(elementwise=True)

    def __call__(self, name: str, param: Tensor, grad: Tensor) -> Tensor:
        return grad.abs() + (torch.nan if dist.get_rank() == 1 else 0.0)


def expect(kind: Any, message: str, call: Callable[[], Any]) -> None:
    with pytest.raises(kind, match=message):
        call()


def methods(folder: Path) -> None:
    """`fully_shard` over one to four processes: selections, weights, states and files."""
    for size in (1, 2, 3, 4):
        mesh = DeviceMesh("cpu", list(range(size)))
        if dist.get_rank() >= size:
            continue
        shard, group = by_fsdp(mesh), mesh.get_group()
        for name, options in METHODS.items():
            if size in (2, 4) or name in ("d3", "clipped, with a dense head"):
                net, ours, theirs = follow(
                    f"{name} of {size}", shard, group, gradients=train, **options
                )
                same_delta(name, net, ours, theirs, folder)
        follow("a skipped step", shard)


def layouts(folder: Path) -> None:
    """Blocks of all forms, on a mesh of two dimensions, too."""
    line = DeviceMesh("cpu", list(range(WORLD)))
    plane = DeviceMesh("cpu", [[0, 1], [2, 3]], mesh_dim_names=("dp", "tp"))
    cases = {
        "columns": (line, [Shard(1)], [Shard(0)]),
        "replicas": (line, [Replicate()], [Replicate()]),
        "replicas of shards": (plane, [Replicate(), Shard(0)], [Replicate(), Shard(0)]),
        "blocks": (plane, [Shard(0), Shard(1)], [Replicate(), Shard(0)]),
    }
    random = {"importance": Random(3), "selection": Static(40)}
    clipped = {"norm": "active", "max_grad_norm": 0.05, "dense": "last"}
    for name, (mesh, matrix, vector) in cases.items():
        shard = by_placements(mesh, matrix, vector)
        follow(f"{name}, clipped", shard, **clipped)
        for options in ({}, random):
            net, ours, theirs = follow(name, shard, **options)
            same_delta(name, net, ours, theirs, folder)
    net, ours, theirs = follow("tensor parallelism", by_tensor_parallelism(plane), gradients=train)
    same_delta("tensor parallelism", net, ours, theirs, folder)


def training() -> None:
    """What `fully_shard` offers."""
    mesh = DeviceMesh("cpu", [0, 1])
    if dist.get_rank() > 1:
        return
    half = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for name, options in {
        "mixed precision": {"mp_policy": half},
        "not resharded after forward": {"reshard_after_forward": False},
        "offloaded": {"offload_policy": CPUOffloadPolicy(pin_memory=False)},
    }.items():
        follow(name, by_fsdp(mesh, **options), mesh.get_group(), gradients=train)
    follow("accumulated", by_fsdp(mesh), mesh.get_group(), gradients=train_twice)
    results = [scaled(mesh, kind) for kind in (None, torch.amp.GradScaler, amp.GradScaler)]
    for weights, metrics in results[1:]:
        assert metrics["skipped_steps"] == 1
        for got, want in zip(weights, results[0][0], strict=True):
            torch.testing.assert_close(got, want)


def scaled(mesh: DeviceMesh, kind: Any) -> tuple[list[Tensor], dict[str, Any]]:
    """Weights after a run with a scaler, in which one process finds an infinite gradient."""
    net = Net()
    by_fsdp(mesh)(net)
    optimizer = optimizer_of(net, dense="last", max_grad_norm=0.05)
    scaler = kind and kind("cpu", init_scale=1024.0)
    for step in range(STEPS):
        data = torch.randn(4, 7, generator=torch.Generator().manual_seed(step))
        loss = net(data).square().mean()
        if step == 2 and dist.get_rank() == 1:
            loss = loss * torch.inf
        (loss if scaler is None else scaler.scale(loss)).backward()
        if scaler is None:
            optimizer.step()
        else:
            scaler.step(optimizer)
            scaler.update()
        optimizer.zero_grad()
    return [whole(param).detach() for param in net.parameters()], optimizer.metrics()


def resume(folder: Path) -> None:
    """torch.distributed.checkpoint: saved by three, loaded by one, two and four."""
    straight = None
    for size, first, last in ((3, 0, 3), (3, 3, 6), (1, 3, 6), (2, 3, 6), (4, 3, 6)):
        mesh = DeviceMesh("cpu", list(range(size)))
        if dist.get_rank() < size:
            group, net = mesh.get_group(), Net()
            by_fsdp(mesh)(net)
            optimizer = optimizer_of(
                net, dense="last", importance=D3(2.0), max_grad_norm=0.05, shard_invariant=True
            )
            model, state = get_state_dict(net, optimizer)
            saved = {"model": model, "optimizer": state}
            place = {"checkpoint_id": folder / "saved", "process_group": group}
            if first:
                dcp.load(saved, **place)
                set_state_dict(net, optimizer, model_state_dict=model, optim_state_dict=state)
            for step in range(first, last):
                make_up(net, step)
                optimizer.step()
                optimizer.zero_grad()
            delta = optimizer.delta(net, finished=False)
            if not first:
                model, state = get_state_dict(net, optimizer)
                dcp.async_save({"model": model, "optimizer": state}, **place).result()
            elif straight is None:
                straight = delta
            else:
                assert delta.fingerprints == straight.fingerprints
                assert delta.sparse.keys() == straight.sparse.keys()
                for name, values in delta.sparse.items():
                    for field in ("position", "value", "unmask_step"):
                        got, want = (getattr(d, field) for d in (values, straight.sparse[name]))
                        assert torch.equal(got, want), (size, name, field)
                for name, value in delta.dense.items():
                    assert torch.equal(value, straight.dense[name]), (size, name)
        dist.barrier()


def add_layer(optimizer: MaskedAdamW, net: Any, mesh: DeviceMesh | None) -> None:
    torch.manual_seed(1)
    net.further = nn.Linear(3, 5)
    if mesh is not None:
        fully_shard(net.further, mesh=mesh)
    named = list(net.further.named_parameters(prefix="further"))
    optimizer.add_param_group({"params": named})


def changes() -> None:
    """What users do in the middle of a run, or before its first step."""
    mesh = DeviceMesh("cpu", list(range(WORLD)))
    single = Net()
    oracle = optimizer_of(single)
    for step in range(2):
        make_up(single, step)
        oracle.step()
    # The checkpoint of one process goes on in four, with another budget; a layer is added.
    net = Net()
    by_fsdp(mesh)(net)
    for param, mine in zip(net.parameters(), single.parameters(), strict=True):
        placed = distribute_tensor(mine.detach(), mesh, param.placements, src_data_rank=None)
        param.detach().copy_(placed)
    optimizer = optimizer_of(net)
    optimizer.load_state_dict(oracle.state_dict())
    for each, model in ((optimizer, net), (oracle, single)):
        each.extend(budget=60, total_steps=9)
        add_layer(each, model, mesh if each is optimizer else None)
    for step in range(3, 7):
        make_up(net, step)
        step_both("changes", net, single, optimizer, oracle)
    # As accelerate does it: the optimizer is built first, and gets the sharded parameters then.
    net, single = Net(), Net()
    optimizer, oracle = optimizer_of(net), optimizer_of(single)
    held, mapping = optimizer.param_groups[0]["params"], {}
    addresses = [param.data_ptr() for param in held]
    for number, address in enumerate(addresses):
        held[number] = torch.empty(1)
        held[number].data_ptr = address
    by_fsdp(mesh)(net)
    mapping = dict(zip(addresses, net.parameters(), strict=True))
    fsdp2_switch_optimizer_parameters(optimizer, mapping)
    for each, model in ((optimizer, net), (oracle, single)):
        add_layer(each, model, mesh if each is optimizer else None)
    for step in range(3):
        make_up(net, step)
        step_both("taken over", net, single, optimizer, oracle)
    optimizer.param_groups[0]["params"] = list(Net().parameters())
    expect(RuntimeError, "other parameters", optimizer.step)
    optimizer.param_groups[0]["params"] = list(net.parameters())
    assert optimizer.delta(net, finished=False).num_entries == 20
    with torch.no_grad():
        net.first.weight.add_(1.0)
    expect(RuntimeError, "other code has written", optimizer.delta)


def room() -> None:
    """Entries that crowd into one shard: its buffers grow, in the middle of the run."""
    mesh = DeviceMesh("cpu", list(range(WORLD)))
    net, single = Net(), Net()
    by_fsdp(mesh)(net)
    pool.SPARE_ENTRIES = 2
    optimizer, oracle = optimizer_of(net), optimizer_of(single)
    held = sum(param.to_local().numel() for param in net.parameters())
    assert optimizer.engine.active.position.numel() == min(22, held)
    for step in range(STEPS):
        make_up(net, step)
        for param in net.parameters():
            local = param.grad.to_local()
            local.mul_(1.0 if dist.get_rank() == 1 else 1e-3)
        step_both("room", net, single, optimizer, oracle)
    found = optimizer.engine.active.position.numel()
    assert found == min(22, held) if dist.get_rank() != 1 else 22 < found <= 40, found
    pool.SPARE_ENTRIES = 256


def nothing_here() -> None:
    """Processes whose shards are all empty take part in everything."""
    mesh = DeviceMesh("cpu", list(range(WORLD)))
    grown = {"importance": D3(1.0), "selection": Increment(8, STEPS)}
    for options in (grown, {"importance": Magnitude(), "selection": Static(8)}):
        torch.manual_seed(0)
        net = nn.Linear(5, 2)
        single = copy.deepcopy(net)
        fully_shard(net, mesh=mesh)
        optimizer, oracle = optimizer_of(net, **options), optimizer_of(single, **options)
        for step in range(STEPS):
            make_up(net, step)
            step_both("nothing here", net, single, optimizer, oracle)
        assert optimizer.delta(net).fingerprints == oracle.delta().fingerprints


def written() -> None:
    """Writes into the memory of shards, in all processes or one, are those of others."""
    mesh = DeviceMesh("cpu", list(range(WORLD)))
    for late in (False, True):
        net, single = Net(), Net()
        by_fsdp(mesh)(net)
        optimizer, oracle = optimizer_of(net), optimizer_of(single)
        if late:
            make_up(net, 0)
            step_both("written", net, single, optimizer, oracle)
        if not late or dist.get_rank() == 1:
            with torch.no_grad():  # as torch.distributed.checkpoint loads into a model
                net.first.weight.to_local().add_(1.0)
        if late:
            expect(RuntimeError, "other code has written", optimizer.delta)
            continue
        single.first.weight.detach().add_(1.0)
        make_up(net, 0)
        step_both("written", net, single, optimizer, oracle)
        ours, theirs = (each.delta(finished=False) for each in (optimizer, oracle))
        assert ours.fingerprints == theirs.fingerprints


def errors() -> None:
    """What does not work says so, in all processes, before anything moves."""
    mesh = DeviceMesh("cpu", list(range(WORLD)))
    net = Net()
    by_fsdp(mesh)(net)
    build = partial(partial, optimizer_of, net)
    expect(ValueError, "only grows", build(selection=Repeat(5)))
    expect(ValueError, "may need whole tensors", build(importance=lambda name, p, g: g.abs()))
    option = {"max_grad_norm": 1.0, "fuse_backward": True}
    expect(ValueError, "fuse_backward=True does not work with sharded", build(**option))
    option = {"max_grad_norm": 1.0, "sampled_backward": True, "model": net}
    expect(ValueError, "sampled_backward=True does not work with sharded", build(**option))
    rank = dist.get_rank()
    expect(RuntimeError, "schedule differ", build(selection=Increment(40 + rank, STEPS)))
    expect(RuntimeError, "parameters of the optimizer differ", build(dense="last" * (rank == 1)))
    expect(TypeError, "copied or pickled", partial(copy.deepcopy, optimizer_of(net)))
    choices = "importance, selection, .* differ"
    expect(RuntimeError, choices, build(importance=Random(rank)))
    expect(RuntimeError, choices, build(norm=("all", "active")[rank % 2]))
    expect(RuntimeError, choices, build(shard_invariant=rank == 0))
    optimizer = optimizer_of(net, importance=NotFinite())
    make_up(net, 0)
    message = "negative or not finite|1 of 4 processes raised"
    expect((ValueError, RuntimeError), message, optimizer.step)
    optimizer = optimizer_of(net)
    optimizer.param_groups[0]["lr"] = 0.1 * rank
    expect(RuntimeError, "lr, betas.* differ", optimizer.step)
    expect(RuntimeError, "max_grad_norm differ", optimizer_of(net, max_grad_norm=1.0 + rank).step)
    uneven = torch.ones(4 if rank == 0 else 2, 3)
    placed = DTensor.from_local(uneven, mesh, [Shard(0)], shape=(10, 3), stride=(3, 1))
    layer = partial(MaskedAdamW, [("it", nn.Parameter(placed))], importance=D3())
    message = "such a layout is not supported|processes raised"
    expect((RuntimeError, TypeError), message, partial(layer, selection=Static(3)))
    delta = partial(Delta.from_models, net, net)
    expect(DeltaError, "is a DTensor: give whole tensors", delta)
    net.plain = nn.Linear(2, 2)
    expect(TypeError, "plain.weight is whole in each process", build())


def published() -> None:
    """All processes get the patches of one process, byte for byte."""
    mesh = dist.init_device_mesh("cpu", (WORLD,))
    for dense in ("", "last"):
        net, single, served = Net(), Net(), Net()
        by_fsdp(mesh)(net)
        options = {"dense": dense, "shard_invariant": bool(dense)}
        optimizer, oracle = optimizer_of(net, **options), optimizer_of(single, **options)
        ours, theirs = (
            WeightPublisher(each, model, run="one")
            for each, model in ((optimizer, net), (oracle, single))
        )
        receiver = WeightReceiver(served)
        for step in range(STEPS):
            make_up(net, step)
            step_both("published", net, single, optimizer, oracle)
            patch, expected = ours.patch(), theirs.patch()
            assert patch.to_bytes() == expected.to_bytes(), step
            receiver.receive(patch)
            for name, param in net.named_parameters():
                assert torch.equal(whole(param), served.get_parameter(name)), (step, name)


@contextmanager
def traffic() -> Iterator[dict[str, int]]:
    """Bytes that our calls of torch.distributed hand over, by name."""
    sent: dict[str, int] = {}
    names = ("all_reduce", "all_gather", "broadcast", "gather")
    gathers = ("all_gather_single", "all_gather_into_tensor")
    names += tuple(name for name in gathers if hasattr(dist, name))
    before = {name: getattr(dist, name) for name in names}

    def counting(name: str) -> Callable[..., Any]:
        def call(first: Tensor, *args: Any, **kwargs: Any) -> Any:
            sent[name] = sent.get(name, 0) + first.nbytes
            return before[name](first, *args, **kwargs)

        return call

    for name in names:
        setattr(dist, name, counting(name))
    try:
        yield sent
    finally:
        for name, function in before.items():
            setattr(dist, name, function)


def bytes_on_the_wire() -> None:
    """A step sends winners or counts, and norms; a delta active entries: nothing grows with N."""
    for few in (True, False):
        kth_largest.GATHERED_BYTES = few << 20
        count_bytes(few)


def count_bytes(few: bool) -> None:
    mesh = DeviceMesh("cpu", list(range(WORLD)))
    net = nn.Linear(1000, 400)
    fully_shard(net, mesh=mesh)
    options = {"importance": D3(2.0), "selection": Increment(400, STEPS), "max_grad_norm": 1.0}
    optimizer = optimizer_of(net, **options)
    for step in range(STEPS):
        make_up(net, step)
        with traffic() as sent:
            optimizer.step()
        # The winners of all processes, or six digits of 2,048 counts; norms and the flag.
        gathered, digits, norms = WORLD * 8 * (2 * -(-400 // STEPS)), 6 * 2048 * 8, 3 * 8
        allowed = {True: (gathered, norms), False: (0, digits + norms)}[few]
        assert step == 0 or (sent.get("all_gather_single", 0), sent["all_reduce"]) == allowed, sent
    with traffic() as sent:
        optimizer.delta(net, finished=False)
    assert sum(sent.values()) <= 40 * 400, sent


def main() -> None:
    rank, folder = int(sys.argv[1]), Path(sys.argv[2])
    warnings.filterwarnings("ignore")
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/group", rank=rank, world_size=WORLD
    )
    for part in PARTS:
        kth_largest.GATHERED_BYTES = 0 if part in (layouts, changes) else 1 << 20
        part(*[folder] * (part in (methods, layouts, resume)))
        dist.barrier()
        sys.stdout.write(f"{part.__name__}\n")
    leave_group()


PARTS = (
    methods, layouts, training, resume, changes, room, nothing_here, written, errors,
    published, bytes_on_the_wire,
)  # fmt: skip

if __name__ == "__main__":
    main()

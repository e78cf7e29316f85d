"""Train replicas for hundreds of steps: they must stay equal bit for bit.

    python -m bench.replicas --steps 300 --write   # also records bench/results/replicas-<date>.json

Two and three processes (gloo) train a small network with DistributedDataParallel, by every kind of
selection and importance, with ordinary and with sampled gradients: after every step all processes
must hold the same bits of weights and active entries. Each gets another number of examples in every
seventh step, gradients of two micro-batches are accumulated in every fifth, one process finds an
infinite gradient in every fiftieth, and in the middle everything is resumed from a checkpoint.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import tempfile
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from datetime import date
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.multiprocessing.spawn import spawn
from torch.nn.parallel import DistributedDataParallel

from bench import console
from bench.environment import RESULTS, describe
from sparse_optim import (
    D3,
    Increment,
    Magnitude,
    MaskedAdamW,
    Random,
    Repeat,
    Snip,
    Static,
    Stochastic,
)

BUDGET = 600
KINDS: dict[str, Callable[[int], dict[str, Any]]] = {
    "D3": lambda steps: {"importance": D3(2.0), "selection": Increment(BUDGET, steps)},
    "D3, every 4, sampled": lambda steps: {
        "importance": D3(), "selection": Increment(BUDGET, steps, every=4), "sampled": True
    },
    "Snip": lambda steps: {"importance": Snip(), "selection": Increment(BUDGET, steps)},
    "Magnitude, sampled": lambda _: {
        "importance": Magnitude(), "selection": Static(BUDGET), "sampled": True
    },
    "Random, sampled": lambda _: {
        "importance": Random(1), "selection": Static(BUDGET), "sampled": True
    },
    "D3, repeated": lambda _: {"importance": D3(), "selection": Repeat(BUDGET)},
    "Snip, stochastic": lambda _: {"importance": Snip(), "selection": Stochastic(BUDGET, seed=2)},
}  # fmt: skip


def build(options: dict[str, Any]) -> tuple[Any, MaskedAdamW]:
    """A network in its wrapper, the same in all processes, and its optimizer."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 8)
    )
    groups = [
        {"params": list(net[:4].named_parameters())},
        {"params": list(net[4].named_parameters(prefix="4")), "unmask": "all"},
    ]
    given = {name: value for name, value in options.items() if name != "sampled"}
    sampled = options.get("sampled", False)
    optimizer = MaskedAdamW(
        groups, lr=0.01, max_grad_norm=1.0, model=net, sampled_backward=sampled, **given
    )
    # Sums of three numbers depend on their order, which DDP otherwise changes after a resume.
    return DistributedDataParallel(net, find_unused_parameters=True), optimizer


def digest_of(net: nn.Module, optimizer: MaskedAdamW) -> int:
    """Of the bits of all weights and active entries."""
    found = hashlib.blake2b(digest_size=7)
    for param in net.parameters():
        found.update(param.detach().numpy().tobytes())
    for position in optimizer.active_entries().values():
        found.update(position.numpy().tobytes())
    return int.from_bytes(found.digest(), "little")


def train(kind: str, steps: int) -> dict[str, int]:
    """Train one kind in this process; raise where the processes differ."""
    rank, processes = dist.get_rank(), dist.get_world_size()
    net, optimizer = build(KINDS[kind](steps))
    for step in range(steps):
        for micro in range(2 if step % 5 == 4 else 1):
            generator = torch.Generator().manual_seed(1000 * step + 10 * micro + rank)
            examples = 4 + rank * (step % 7 == 6)
            inputs = torch.randn(examples, 32, generator=generator)
            infinite = step % 50 == 49 and rank == processes - 1
            last = micro == (1 if step % 5 == 4 else 0)
            with nullcontext() if last else net.no_sync():
                loss = net(inputs).square().mean() * (torch.inf if infinite else 1.0)
                loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        mine = torch.tensor(digest_of(net, optimizer))
        everyone = [torch.zeros_like(mine) for _ in range(processes)]
        dist.all_gather(everyone, mine)
        if len({int(each) for each in everyone}) > 1:
            raise RuntimeError(f"{kind}: the processes differ after step {step}")
        if step == steps // 2:
            kept = io.BytesIO()
            torch.save((net.module.state_dict(), optimizer.state_dict()), kept)
            kept.seek(0)
            weights, state = torch.load(kept, weights_only=True)
            net, optimizer = build(KINDS[kind](steps))
            net.module.load_state_dict(weights)
            optimizer.load_state_dict(state)
    found = optimizer.metrics()
    return {name: int(found[name]) for name in ("step", "skipped_steps", "active")}


def worker(rank: int, processes: int, steps: int, folder: str) -> None:
    """Train all kinds in one of the processes; the first writes what it found."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    address = f"file://{folder}/group"
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=processes)
    found = {kind: train(kind, steps) for kind in KINDS}
    if rank == 0:
        Path(folder, "found.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


def compare(processes: int, steps: int) -> dict[str, dict[str, int]]:
    """Steps, skipped steps and active entries of each kind.

    Raises:
        torch.multiprocessing.ProcessRaisedException: processes differ.
    """
    os.environ["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory() as folder:
        spawn(worker, (processes, steps, folder), nprocs=processes)
        found: dict[str, dict[str, int]] = json.loads(Path(folder, "found.json").read_text())
    return found


def main() -> None:
    """Train, compare and print."""
    parser = console.parser("replicas", __doc__)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--write", action="store_true", help="record under bench/results")
    options = parser.parse_args()
    found = {str(processes): compare(processes, options.steps) for processes in (2, 3)}
    print(json.dumps(found, indent=1))
    if options.write:
        path = RESULTS / f"replicas-{date.today().isoformat()}.json"
        record = describe() | {"steps": options.steps, "processes": found}
        path.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()

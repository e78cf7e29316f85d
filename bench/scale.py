"""What several processes send each other in a step: measured with two to four, modelled beyond.

    python -m bench.scale             # prints; a minute
    python -m bench.scale --write     # also records bench/results/scale-<date>.json

Processes on this machine talk by gloo over loopback. Each message of a step is timed by itself:
sums of gradients (DDP), of the gradients of active entries, of norms; and the selection over
shards in both ways of `sparse_optim.engine.kth_largest`, by counting digits and by gathering
winners. From the sums follow a latency and a time per byte, and from these the times with more
processes:

    sum of n bytes over R processes = 2 log2(R) latency + 2 (R - 1) / R n time_per_byte

docs/scale.md shows bytes and times up to 4,096 processes; `bench.report` writes its tables.
"""

from __future__ import annotations

import json
import math
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import spawn

from bench import console
from bench.environment import RESULTS, describe
from bench.results import newest
from bench.tables import table
from sparse_optim.engine.kth_largest import DIGITS, SHIFTS, by_counting, by_gathering

PICTURE = RESULTS / "scale.png"
MEASURED = (2, 3, 4)
MODELLED = (2, 8, 64, 512, 4096)
WINNERS = (320, 3_200, 32_000)
SIZES = {"8 B": 8, "16 KB": 1 << 14, "1.3 MB": 1_280_000, "64 MB": 1 << 26}  # of sums


@dataclass(frozen=True)
class Run:
    """A model, and how it is trained: what a step's bytes depend on.

    Attributes:
        entries, tensors: of the model.
        bytes_per_entry: of its gradients.
        active: entries in the end.
        winners: entries that a step unmasks, where it unmasks any.
    """

    name: str
    entries: int
    tensors: int
    bytes_per_entry: int
    active: int
    winners: int


RUNS = (
    Run("7B, bfloat16, 0.5%", 6_738_000_000, 291, 2, 33_690_000, 2_700_000),
    Run("MiniLM, float32, 1%", 22_700_000, 103, 4, 106_000, 28_000),
)


@dataclass(frozen=True)
class Message:
    """Bytes that a process sends in a step, and how many collectives follow one another."""

    bytes: float
    collectives: int


def messages(run: Run, processes: int) -> dict[str, Message]:
    """What a process sends in a step of each kind. A sum sends each byte 2 (R - 1) / R times."""
    twice = 2 * (processes - 1) / processes
    whole = run.entries * run.bytes_per_entry
    norms, digits = 8 * (run.tensors + 1), 8 * DIGITS * len(SHIFTS)
    return {
        "DDP: gradients, any optimizer": Message(twice * whole, 1),
        "DDP, sampled, quiet step": Message(twice * (4 * run.active + run.tensors), 2),
        "FSDP2 itself: weights twice, gradients": Message(1.5 * twice * whole, 3),
        "FSDP2, ours, quiet step": Message(twice * norms, 1),
        "FSDP2, ours, loud step": Message(twice * (norms + digits), 1 + len(SHIFTS)),
        "the same with gathered winners": Message(
            twice * norms + 2 * 8 * run.winners * (processes - 1), 2
        ),
    }


def predicted_ms(message: Message, processes: int, latency: float, per_byte: float) -> float:
    """Milliseconds of the collectives of a message, by the model of this module.

    Args:
        latency: seconds of a step of a tree.
        per_byte: seconds per byte that a process sends.
    """
    steps = 2 * math.log2(processes) * message.collectives
    return 1e3 * (steps * latency + message.bytes * per_byte)


class Group:
    """The interface of `Shards` that a selection asks for."""

    def add(self, numbers: torch.Tensor) -> None:
        """Sum over the processes."""
        dist.all_reduce(numbers)

    def gather(self, mine: torch.Tensor) -> torch.Tensor:
        """Of all processes."""
        everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
        dist.all_gather(everyone, mine)
        return torch.stack(everyone)


def timed(run: Callable[[], Any], rounds: int = 15) -> float:
    """Median milliseconds; all processes begin together."""
    times = []
    for _ in range(rounds):
        dist.barrier()
        begin = time.perf_counter()
        run()
        times.append(1e3 * (time.perf_counter() - begin))
    return statistics.median(times[2:])


def worker(rank: int, processes: int, folder: str) -> None:
    """Measure in one of the processes; the first writes what it found."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/group", rank=rank, world_size=processes
    )
    found: dict[str, float] = {}
    for name, size in SIZES.items():
        buffer = torch.zeros(size // 8, dtype=torch.int64)
        found[f"sum of {name}"] = timed(partial(dist.all_reduce, buffer))
    for winners in WINNERS:
        generator = torch.Generator().manual_seed(rank)
        words = torch.randint(-(2**62), 2**62, (winners,), generator=generator)
        alive, wanted = torch.ones(winners, dtype=torch.bool), torch.tensor(winners)
        given: Any = (words, alive, wanted, winners, Group())
        for name, select in (("counting", by_counting), ("gathering", by_gathering)):
            found[f"{name}, {winners:,} winners"] = timed(partial(select, *given))
    if rank == 0:
        Path(folder, "found.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def measure(processes: int) -> dict[str, float]:
    """Milliseconds of each message between as many processes."""
    os.environ["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory() as folder:
        spawn(worker, (processes, folder), nprocs=processes)
        found: dict[str, float] = json.loads(Path(folder, "found.json").read_text())
    return found


def constants(measured: Mapping[str, Mapping[str, float]]) -> tuple[float, float]:
    """Latency and time per byte, in seconds, of the sums that were measured: medians."""
    small, large = "8 B", "64 MB"
    latencies, per_byte = [], []
    for count, found in measured.items():
        processes = int(count)
        latency = found[f"sum of {small}"] / 1e3
        latencies.append(latency / (2 * math.log2(processes)))
        sent = 2 * (processes - 1) / processes * SIZES[large]
        per_byte.append((found[f"sum of {large}"] / 1e3 - latency) / sent)
    return statistics.median(latencies), statistics.median(per_byte)


def recorded() -> dict[str, Any]:
    """The newest results.

    Raises:
        FileNotFoundError: there are none.
    """
    found = newest("scale-*.json")
    if found is None:
        raise FileNotFoundError("no results: python -m bench.scale --write")
    return found


def of_bytes(size: float) -> str:
    """'4.7 KB', of a number of bytes."""
    for unit in ("B", "KB", "MB"):
        if size < 999.5:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} GB"


def section() -> str:
    """Tables and picture, for docs/scale.md."""
    results = recorded()
    measured = results["milliseconds"]
    latency, per_byte = constants(measured)
    lines = [
        [name, *(f"{measured[str(count)][name]:.2f}" for count in MEASURED)]
        for name in measured[str(MEASURED[0])]
    ]
    heads = ["milliseconds, gloo on one machine", *(f"{count} processes" for count in MEASURED)]
    parts = [f"![Bytes of a step](../bench/results/{PICTURE.name})", table(heads, lines)]
    for run in RUNS:
        named = {count: messages(run, count) for count in MODELLED}
        lines = [
            [name, *(of_bytes(named[count][name].bytes) for count in MODELLED)]
            for name in named[MODELLED[0]]
        ]
        heads = [f"bytes a process sends: {run.name}", *(f"R = {count:,}" for count in MODELLED)]
        parts.append(table(heads, lines))
    run = RUNS[0]
    lines = [
        [
            name,
            *(
                f"{predicted_ms(messages(run, count)[name], count, latency, per_byte):,.3g}"
                for count in MODELLED
            ),
        ]
        for name in messages(run, 2)
        if "ours" in name or "gathered" in name
    ]
    heads = [f"predicted milliseconds: {run.name}", *(f"R = {count:,}" for count in MODELLED)]
    fitted = f"a latency of {1e6 * latency:.0f} us and {1e-9 / per_byte:.2g} GB/s"
    parts.append(f"With what was measured here, {fitted}:\n\n{table(heads, lines)}")
    return "\n\n".join(parts)


def draw(path: Path = PICTURE) -> None:
    """Draw bytes of a step against processes."""
    from bench.pictures import draw_bytes

    counts = [2**power for power in range(1, 13)]
    draw_bytes(
        {
            run.name: {
                name: [messages(run, count)[name].bytes for count in counts]
                for name in messages(run, 2)
            }
            for run in RUNS
        },
        counts,
        path,
    )


def main() -> None:
    """Measure, and print."""
    parser = console.parser("scale", __doc__)
    parser.add_argument("--write", action="store_true", help="record the results")
    options = parser.parse_args()
    results = describe() | {
        "milliseconds": {str(processes): measure(processes) for processes in MEASURED}
    }
    print(json.dumps(results["milliseconds"], indent=1))
    if options.write:
        path = RESULTS / f"scale-{date.today().isoformat()}.json"
        path.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()

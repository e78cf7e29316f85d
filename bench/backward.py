"""Measure whole training steps with and without a gradient buffer: python -m bench.backward

Times forward, backward and optimizer step of ID3 with and without `fuse_backward`, of fused AdamW,
and of fused AdamW on LoRA (peft, r = 16, all Linear modules except a language model's head). All
kinds take turns in one process, on models with random weights and tokens. Memory is measured one
kind after the other, by an allocation trace:

    gradients   maximum bytes of parameter gradients alive at once, checked when each one arrives
    live        maximum bytes that torch holds at once in addition to those before the step
    held        bytes of weights and optimizer state, counted from tensors

For tied weights, autograd adds up several gradients before it delivers their sum: the ones that
wait count as live, not as gradients.

Writes bench/results/cpu-backward-<date>.json.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from bench import allocations, console, environment, tables
from bench.gpu_subjects import EIGHT_BIT, adamw_kinds
from bench.models import MODELS
from bench.results import clean_share, clean_times, median_us, newest
from bench.subjects import LR, complete, midway
from bench.timing import Subject, interleave
from sparse_optim.finetune.readings import state_bytes

BUDGET, QUOTA = 320_000, 320
KINDS = ("ordinary", "fused", "AdamW", "LoRA")
LORA_RANK = 16


MEASURED = ("MiniLM", "BERT-base", "Llama-small")
MEMORY_ALONE = ("Llama-1B",)  # not timed: the machine cannot hold four copies of it


@dataclass
class Training:
    """A model with one kind of optimizer; `step` runs a whole training step."""

    kind: str
    model: torch.nn.Module
    optimizer: Any
    inputs: dict[str, Tensor]

    @property
    def trained(self) -> list[Tensor]:
        """Return the parameters that get gradients."""
        return [param for param in self.model.parameters() if param.requires_grad]

    @property
    def held_bytes(self) -> int:
        """Return the bytes of weights and optimizer state."""
        return sum(param.nbytes for param in self.model.parameters()) + self.state_bytes

    @property
    def state_bytes(self) -> int:
        """Return the bytes of the optimizer state."""
        return state_bytes(self.optimizer)

    def step(self) -> None:
        """Run forward, backward, clipping and update."""
        self.model(**self.inputs).loss.backward()
        if self.kind not in ("ordinary", "fused", "sampled"):
            torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()


def trainings(name: str, budget: int = BUDGET, quota: int = QUOTA) -> Iterator[Training]:
    """Yield each kind, with its own copy of the model; ours has half of the budget active."""
    first = MODELS[name].build()
    for kind in KINDS:
        yield training(name, kind, copy.deepcopy(first), budget, quota)


def training(
    name: str, kind: str, model: torch.nn.Module, budget: int = BUDGET, quota: int = QUOTA
) -> Training:
    """Build the optimizer of a kind for `model`, one of those in `bench.models`."""
    if kind == "LoRA":
        import peft

        model = peft.get_peft_model(
            model, peft.LoraConfig(r=LORA_RANK, target_modules="all-linear", lora_dropout=0.0)
        )
    params = [param for param in model.parameters() if param.requires_grad]
    inputs = {key: value.to(params[0].device) for key, value in MODELS[name].inputs().items()}
    if kind in EIGHT_BIT:
        return Training(kind, model, adamw_kinds(params)[kind](), inputs)
    if kind in ("AdamW", "LoRA"):
        return Training(kind, model, torch.optim.AdamW(params, lr=LR, fused=True), inputs)
    if kind == "sampled":
        return Training(kind, model, complete(params, budget, model), inputs)
    optimizer = midway(params, budget, quota, exp=0.0)
    optimizer.fuse_backward = kind == "fused"
    return Training(kind, model, optimizer, inputs)


def gradient_bytes(training: Training) -> int:
    """Return the maximum bytes of parameter gradients alive at once in a step."""
    alive: list[tuple[StorageWeakRef, int]] = []
    most = 0

    def note(grad: Tensor | None) -> None:
        nonlocal most
        if grad is None:  # of a layer that samples
            return
        alive[:] = [entry for entry in alive if not entry[0].expired()]
        alive.append((StorageWeakRef(grad.untyped_storage()), grad.nbytes))
        most = max(most, sum(size for _, size in alive))

    handles = [param.register_hook(note) for param in training.trained]
    training.step()
    for handle in handles:
        handle.remove()
    return most


def memory(made: Iterable[Training]) -> dict[str, Any]:
    """Count the bytes of a step of each kind in turn, and of the two largest gradients."""
    rows: dict[str, Any] = {}
    for training in made:
        training.step()  # allocates dense AdamW's state
        gradients: list[int] = []

        def step(one: Training = training, found: list[int] = gradients) -> None:
            found.append(gradient_bytes(one))

        live = allocations.of_call(step, torch.device("cpu"))
        rows[training.kind] = {
            "gradient_bytes": gradients[0],
            "live_bytes": live.peak,
            "held_bytes": training.held_bytes,
        }
        if training.kind == KINDS[0]:
            sizes = sorted((param.nbytes for param in training.trained), reverse=True)
            rows |= {"all_gradients": sum(sizes), "two_largest": sum(sizes[:2])}
        del training, step  # before the next one is made
    return rows


def measure(name: str, rounds: int, warmup: int) -> dict[str, Any]:
    """Measure the memory of one model and, unless it is in MEMORY_ALONE, the raw times."""
    watch = environment.Conditions.begin()
    run: dict[str, Any] = {"model": name, "memory": memory(trainings(name)), "subjects": []}
    if name not in MEMORY_ALONE:
        made = list(trainings(name))
        subjects = [Subject({"name": training.kind}, training.step) for training in made]
        run["subjects"] = interleave(subjects, rounds, warmup)
    return {**run, "conditions": watch.end()}


def times(run: dict[str, Any]) -> dict[str, float]:
    """Return the median microseconds of each kind that was timed."""
    return {record["name"]: median_us(record) for record in run["subjects"]}


def summary(run: dict[str, Any]) -> str:
    """Summarise a finished run in a few lines."""
    lines = [f"{run['model']}, MB:", table(run["memory"])]
    spent = times(run)
    if spent:
        clean = sum(len(clean_times(record)) for record in run["subjects"])
        calls = sum(len(record["us"]) for record in run["subjects"])
        lines.append(
            ", ".join(f"{kind} {us / 1e3:.1f} ms" for kind, us in spent.items())
            + f"; fused / ordinary {spent['fused'] / spent['ordinary']:.3f} "
            f"(medians of clean calls; {clean} of {calls} were)"
        )
    return "\n".join(lines)


def table(counted: dict[str, Any]) -> str:
    """Show in megabytes what `memory` counted, as Markdown."""
    everything, two = counted["all_gradients"] / 1e6, counted["two_largest"] / 1e6
    columns = ("held_bytes", "gradient_bytes", "live_bytes")
    rows = [[kind, *(f"{counted[kind][name] / 1e6:.1f}" for name in columns)] for kind in KINDS]
    header = ["", "weights and state", "gradients alive", "live in a step"]
    return (
        f"all gradients {everything:.1f}, the two largest {two:.1f}\n\n{tables.table(header, rows)}"
    )


def section(folder: Path) -> list[str]:
    """Show the newest recorded figures as Markdown; return [] if there are none."""
    data = newest("cpu-backward-*.json", folder)
    return [] if data is None else [report(data)]


def headline(folder: Path) -> list[str]:
    """Summarise the recorded times for README.md, and the memory of the model that saves most."""
    data = newest("cpu-backward-*.json", folder)
    if data is None:
        return []
    spent = [times(run) for run in data["runs"] if run["subjects"]]
    ratios = sorted(each["fused"] / each["ordinary"] for each in spent)

    def live(run: dict[str, Any], kind: str) -> float:
        return float(run["memory"][kind]["live_bytes"]) / 1e6

    best = min(data["runs"], key=lambda run: live(run, "fused") / live(run, "ordinary"))
    return [
        f"With `fuse_backward=True` a training step takes {ratios[0]:.3f} to {ratios[-1]:.3f} "
        f"times as long; in addition to weights and optimizer state, {best['model']} needs "
        f"{live(best, 'fused'):,.0f} MB instead of {live(best, 'ordinary'):,.0f}."
    ]


def report(data: dict[str, Any]) -> str:
    """Show the time of a training step, if it was measured, and the memory of every model."""
    timed, held = [], []
    for run in data["runs"]:
        spent, counted = times(run), run["memory"]
        if spent:
            ratio = f"{spent['fused'] / spent['ordinary']:.3f}"
            timed.append([run["model"], *(f"{spent[kind] / 1e3:.0f}" for kind in KINDS), ratio])
        alive = [counted[kind]["gradient_bytes"] for kind in KINDS[:2]]
        sizes = [*alive, counted["two_largest"], *(counted[kind]["live_bytes"] for kind in KINDS)]
        held.append([run["model"], *(f"{size / 1e6:.0f}" for size in sizes)])
    records = [record for run in data["runs"] for record in run["subjects"]]
    return "\n\n".join(
        [
            "Whole training steps of ID3 (B = 320K) with a gradient buffer and with "
            "`fuse_backward=True` (fused), of clipped fused AdamW on all parameters, and on LoRA "
            f"(r = {LORA_RANK}, all Linear modules except a language model's head):",
            tables.table(["ms", *KINDS, "fused / ordinary"], timed),
            tables.table(
                ["MB", "gradients at once, ordinary", "fused", "two largest",
                 *(f"step, {kind}" for kind in KINDS)], held,
            ),
            "Step: the maximum memory of a step in addition to weights and optimizer state "
            f"(gradients, activations, temporaries). {data['machine']['threads']} threads, commit "
            f"{data['commit'][:8]}; {clean_share(records):.0%} of the calls were clean.",
        ]
    )  # fmt: skip


def recorded(path: Path, data: dict[str, Any], models: Sequence[str]) -> list[dict[str, Any]]:
    """Return the file's runs of other models, if commit and settings are the same."""
    if not path.exists():
        return []
    held = json.loads(path.read_text())
    if any(held[key] != data[key] for key in ("commit", "settings", "dirty")):
        return []
    return [run for run in held["runs"] if run["model"] not in models]


def main() -> None:
    """Measure every model, print the figures and write the results file."""
    parser = console.parser("backward", __doc__)
    parser.add_argument(
        "--models", nargs="+", choices=list(MODELS), default=[*MEASURED, *MEMORY_ALONE],
        help=f"models to measure (default: {' '.join([*MEASURED, *MEMORY_ALONE])})",
    )  # fmt: skip
    parser.add_argument("--rounds", type=int, default=15, help="timed steps of each kind")
    parser.add_argument("--warmup", type=int, default=2, help="untimed steps before them")
    name = f"cpu-backward-{date.today().isoformat()}.json"
    parser.add_argument("--out", type=Path, default=environment.RESULTS / name,
                        help="default: bench/results/cpu-backward-<date>.json")  # fmt: skip
    arguments = parser.parse_args()
    settings = {
        "rounds": arguments.rounds, "warmup": arguments.warmup, "budget": BUDGET, "quota": QUOTA
    }  # fmt: skip
    data: dict[str, Any] = {
        "schema": 1, "kind": "cpu-backward", **environment.describe(), "settings": settings
    }  # fmt: skip
    data["runs"] = recorded(arguments.out, data, arguments.models)
    for model in arguments.models:
        data["runs"].append(measure(model, arguments.rounds, arguments.warmup))
        arguments.out.write_text(json.dumps(data, separators=(",", ":")) + "\n")
        print(summary(data["runs"][-1]), flush=True)


if __name__ == "__main__":
    main()

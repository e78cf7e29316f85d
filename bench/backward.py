"""Whole training steps with and without a gradient buffer: python -m bench.backward

Forward, backward and optimizer step of ID3 with and without `fuse_backward`, and of fused AdamW, in
turns within one process, on models of random weights and tokens. Memory by allocation trace:

    gradients   greatest bytes of parameter gradients alive at once, looked at whenever one arrives
    live        greatest bytes that torch holds at once on top of what it held before the step

Written to bench/results/cpu-backward-<date>.json.
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from bench import allocations, environment
from bench.results import clean_times, median_us
from bench.subjects import LR, midway
from bench.timing import Subject, interleave

RESULTS = environment.ROOT / "bench" / "results"
BUDGET, QUOTA = 320_000, 320
KINDS = ("ordinary", "fused", "AdamW")


@dataclass(frozen=True)
class Model:
    """A configuration of transformers with random weights, and its batch.

    Attributes:
        kind: "bert" or "llama".
        sizes: arguments of the configuration.
        batch, length: sequences, tokens in each.
    """

    kind: str
    sizes: dict[str, Any]
    batch: int
    length: int

    def build(self) -> torch.nn.Module:
        """The model in training mode, without dropout: kinds must do the same arithmetic."""
        import transformers

        torch.manual_seed(0)
        if self.kind == "llama":
            return transformers.LlamaForCausalLM(transformers.LlamaConfig(**self.sizes)).train()
        config = transformers.BertConfig(
            **self.sizes, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
        )
        return transformers.BertForSequenceClassification(config).train()

    def inputs(self) -> dict[str, Tensor]:
        """Random tokens; labels are the tokens, or random classes."""
        generator = torch.Generator().manual_seed(1)
        size = (self.batch, self.length)
        tokens = torch.randint(self.sizes["vocab_size"], size, generator=generator)
        classes = torch.randint(2, (self.batch,), generator=generator)
        return {"input_ids": tokens, "labels": tokens if self.kind == "llama" else classes}


def _bert(hidden: int, layers: int, intermediate: int) -> dict[str, Any]:
    return {
        "vocab_size": 30522, "hidden_size": hidden, "num_hidden_layers": layers,
        "num_attention_heads": 12, "intermediate_size": intermediate,
    }  # fmt: skip


MODELS = {
    "tiny": Model("bert", {**_bert(24, 2, 48), "vocab_size": 1000}, 2, 8),  # for tests
    "MiniLM": Model("bert", _bert(384, 6, 1536), 16, 48),
    "BERT-base": Model("bert", _bert(768, 12, 3072), 8, 64),
    "Llama-small": Model(
        "llama",
        {"vocab_size": 32000, "hidden_size": 512, "num_hidden_layers": 8, "intermediate_size": 1408,
         "num_attention_heads": 8, "num_key_value_heads": 4},
        4, 128,
    ),
}  # fmt: skip


MEASURED = ("MiniLM", "BERT-base", "Llama-small")


@dataclass
class Training:
    """A model under one optimizer; `step` is a whole training step."""

    kind: str
    model: torch.nn.Module
    optimizer: Any
    inputs: dict[str, Tensor]

    def step(self) -> None:
        """Forward, backward, clipping, update."""
        self.model(**self.inputs).loss.backward()
        if self.kind == "AdamW":
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()


def trainings(name: str, budget: int = BUDGET, quota: int = QUOTA) -> list[Training]:
    """One of each kind, each with a copy of the model; ours in the middle of the unmasking."""
    first = MODELS[name].build()
    return [training(name, kind, copy.deepcopy(first), budget, quota) for kind in KINDS]


def training(
    name: str, kind: str, model: torch.nn.Module, budget: int = BUDGET, quota: int = QUOTA
) -> Training:
    """A model, of those named, under one kind of optimizer."""
    params = list(model.parameters())
    inputs = {key: value.to(params[0].device) for key, value in MODELS[name].inputs().items()}
    if kind == "AdamW":
        return Training(kind, model, torch.optim.AdamW(params, lr=LR, fused=True), inputs)
    optimizer = midway(params, budget, quota, exp=0.0)
    optimizer.fuse_backward = kind == "fused"
    return Training(kind, model, optimizer, inputs)


def gradient_bytes(training: Training) -> int:
    """Greatest bytes of parameter gradients alive at once in a step."""
    alive: list[tuple[StorageWeakRef, int]] = []
    most = 0

    def note(grad: Tensor) -> None:
        nonlocal most
        alive[:] = [entry for entry in alive if not entry[0].expired()]
        alive.append((StorageWeakRef(grad.untyped_storage()), grad.nbytes))
        most = max(most, sum(size for _, size in alive))

    handles = [param.register_hook(note) for param in training.model.parameters()]
    training.step()
    for handle in handles:
        handle.remove()
    return most


def memory(made: Sequence[Training]) -> dict[str, Any]:
    """Bytes of a step of each kind, and of the two largest gradients."""
    sizes = sorted((param.nbytes for param in made[0].model.parameters()), reverse=True)
    rows = {}
    for training in made:
        training.step()
        rows[training.kind] = {
            "gradient_bytes": gradient_bytes(training),
            "live_bytes": allocations.of_call(training.step, torch.device("cpu")).peak,
        }
    return {"all_gradients": sum(sizes), "two_largest": sum(sizes[:2]), **rows}


def measure(name: str, rounds: int, warmup: int) -> dict[str, Any]:
    """Memory and raw times of one model."""
    made = trainings(name)
    watch = environment.Conditions.begin()
    counted = memory(made)
    subjects = [Subject({"name": training.kind}, training.step) for training in made]
    records = interleave(subjects, rounds, warmup)
    return {"model": name, "memory": counted, "subjects": records, "conditions": watch.end()}


def summary(run: dict[str, Any]) -> str:
    """A few lines on a finished run."""
    times = {record["name"]: median_us(record) for record in run["subjects"]}
    clean = sum(len(clean_times(record)) for record in run["subjects"])
    calls = sum(len(record["us"]) for record in run["subjects"])
    spent = ", ".join(f"{kind} {us / 1e3:.1f} ms" for kind, us in times.items())
    return (
        f"{run['model']}: {spent}; fused / ordinary {times['fused'] / times['ordinary']:.3f} "
        f"(medians of clean calls; {clean} of {calls} were)\n{table(run['memory'])}"
    )


def table(counted: dict[str, Any]) -> str:
    """Megabytes of what `memory` counted."""
    everything, two = counted["all_gradients"] / 1e6, counted["two_largest"] / 1e6
    lines = [
        f"  all gradients {everything:.1f} MB, the two largest {two:.1f} MB",
        "            gradients alive     all that is live, at most",
    ]
    for kind in KINDS:
        row = counted[kind]
        lines.append(
            f"    {kind:9} {row['gradient_bytes'] / 1e6:7.1f} MB {row['live_bytes'] / 1e6:16.1f} MB"
        )
    return "\n".join(lines)


def main() -> None:
    """Measure every model, print the figures and write the results file."""
    parser = argparse.ArgumentParser(prog="python -m bench.backward", description=__doc__)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=MEASURED)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--warmup", type=int, default=2)
    name = f"cpu-backward-{date.today().isoformat()}.json"
    parser.add_argument("--out", type=Path, default=RESULTS / name)
    arguments = parser.parse_args()
    data: dict[str, Any] = {
        "schema": 1,
        "kind": "cpu-backward",
        **environment.describe(),
        "settings": {"rounds": arguments.rounds, "warmup": arguments.warmup, "budget": BUDGET,
                     "quota": QUOTA},
        "runs": [],
    }  # fmt: skip
    for model in arguments.models:
        data["runs"].append(measure(model, arguments.rounds, arguments.warmup))
        arguments.out.write_text(json.dumps(data, separators=(",", ":")) + "\n")
        print(summary(data["runs"][-1]), flush=True)


if __name__ == "__main__":
    main()

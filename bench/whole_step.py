"""Time whole training steps beside AdamW and LoRA: python -m bench.whole_step

Forward, backward, clipping and optimizer step of models with random weights, all kinds in turn in
one process, each with a copy of the model:

    quiet     ours on a step that unmasks nothing, with sampled weight gradients
    loud      ours on a step that unmasks 16 steps' entries, with dense gradients
    dense     the same set as quiet, with dense gradients
    AdamW     fused, after clip_grad_norm_, on all parameters
    LoRA      peft, r = 16, all Linear modules except a language model's head; fused AdamW
    floor     fused AdamW on vectors alone (biases, norms): no weight gradient at all

The active entries are at random positions, in every row and column: the most expensive case for
sampling. A run with every=16 costs (loud + 15 quiet) / 16 on average.

Memory is that of a loud step of a model of a billion parameters in bfloat16, in its backward pass,
and of a step with LoRA: the most that torch holds at once besides weights and optimizer state.

Writes bench/results/cpu-whole-step-<date>.json.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bench import allocations, backward, console, environment, tables
from bench.models import MODELS, Model
from bench.results import clean_share, median_us, newest
from bench.subjects import LR, complete, midway
from bench.timing import Subject, interleave

EVERY = 16
STEPS = 1600  # of the run that is imitated: a loud step unmasks B / 100 entries
SHARES = (0.003, 0.01)  # budgets
KINDS = ("quiet", "loud", "dense", "AdamW", "LoRA", "floor")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# 1,024 tokens each (MiniLM 768).
MEASURED: dict[str, Model] = {
    "MiniLM": MODELS["MiniLM"],
    "BERT-base": replace(MODELS["BERT-base"], batch=16),
    "SmolLM2-135M": replace(MODELS["SmolLM2-135M"], batch=16),
}
MEMORY = {"Llama-1B": replace(MODELS["Llama-1B"], length=512)}
MEMORY_KINDS = ("loud", "quiet", "LoRA")
SMALL = {"tiny": MODELS["tiny"]}  # for tests


def subject(kind: str, share: float, model: nn.Module, inputs: dict[str, Tensor]) -> Subject:
    """Build a whole training step of a kind; it leaves model and active set as they are."""
    if kind in ("AdamW", "LoRA", "floor"):
        return Subject({"name": kind}, _peer(kind, model, inputs))
    params = [param for param in model.parameters() if param.requires_grad]
    budget = int(share * sum(param.numel() for param in params))
    if kind == "loud":
        quota = max(budget * EVERY // STEPS, 1)
        optimizer = midway(params, 2 * budget, quota, exp=0.0, norm="active", model=model)
        optimizer.fuse_backward = True
        optimizer.sampled_backward = True
    else:
        optimizer = complete(params, budget, model, sampled=kind == "quiet")
    active = int(optimizer.engine.active.progress[1])

    def step() -> None:
        model(**inputs).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return Subject({"name": kind, "share": share, "active": active}, step)


def _peer(kind: str, model: nn.Module, inputs: dict[str, Tensor]) -> Any:
    if kind == "LoRA":
        import peft

        config = peft.LoraConfig(
            r=backward.LORA_RANK, target_modules="all-linear", lora_dropout=0.0
        )
        model = peft.get_peft_model(model, config)
    if kind == "floor":
        for param in model.parameters():
            param.requires_grad_(param.dim() < 2)
    params = [param for param in model.parameters() if param.requires_grad]
    optimizer = torch.optim.AdamW(params, lr=LR, fused=True)

    def step() -> None:
        model(**inputs).loss.backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def measure(name: str, dtype: str, rounds: int, warmup: int) -> dict[str, Any]:
    """Measure one model in one dtype; return the raw times of all kinds."""
    described = {**MEASURED, **SMALL}[name]
    first = replace(described, dtype=DTYPES[dtype]).build()
    inputs = described.inputs()
    watch = environment.Conditions.begin()
    subjects = [
        subject(kind, share, copy.deepcopy(first), inputs)
        for share in SHARES
        for kind in KINDS
        if share == SHARES[0] or kind in ("quiet", "loud", "dense")
    ]
    found = interleave(subjects, rounds, warmup)
    tokens = described.batch * described.length
    return {
        "model": name, "dtype": dtype, "tokens": tokens, "subjects": found,
        "conditions": watch.end(),
    }  # fmt: skip


def memory(model: Model, dtype: torch.dtype | None = None) -> dict[str, int]:
    """Count the most bytes that a step of each kind holds besides what is held between steps."""
    found = {}
    for kind in MEMORY_KINDS:
        built = replace(model, dtype=dtype or model.dtype).build()
        step = subject(kind, SHARES[0], built, model.inputs())
        step.run()  # allocates the state of AdamW
        found[kind] = allocations.of_call(step.run, torch.device("cpu")).peak
        del built, step
    return found


def milliseconds(run: dict[str, Any], share: float) -> dict[str, float]:
    """Return the median of each kind, and the mean over a run with every=16."""
    spent = {
        record["name"]: median_us(record) / 1e3
        for record in run["subjects"]
        if record.get("share", share) == share
    }
    spent["every=16"] = (spent["loud"] + (EVERY - 1) * spent["quiet"]) / EVERY
    return spent


RATIOS = (("quiet", "floor"), ("quiet", "LoRA"), ("quiet", "AdamW"), ("every=16", "LoRA"))


def table(runs: Sequence[dict[str, Any]]) -> str:
    """Show milliseconds and ratios as Markdown."""
    columns = ("quiet", "loud", "every=16", "dense", "AdamW", "LoRA", "floor")
    rows = []
    for run in runs:
        for share in SHARES:
            spent = milliseconds(run, share)
            rows.append(
                [run["model"], run["dtype"], f"{share:.1%}"]
                + [f"{spent[name]:.0f}" for name in columns]
                + [f"{spent[one] / spent[other]:.2f}" for one, other in RATIOS]
            )
    ratios = [f"{one} / {other}" for one, other in RATIOS]
    return tables.table(["model", "ms", "B", *columns, *ratios], rows)


def section(folder: Path) -> list[str]:
    """Show the newest recorded figures as Markdown; return [] if there are none."""
    data = newest("cpu-whole-step-*.json", folder)
    return [] if data is None else [report(data)]


def memory_line(data: dict[str, Any]) -> str:
    """Show the memory of a step in MB, if it was measured."""
    return " ".join(
        f"A step of {name} with {model.length} tokens holds at most "
        f"{counted['loud'] / 1e6:,.0f} MB besides weights and state on a loud step with "
        f"`fuse_backward=True`, {counted['quiet'] / 1e6:,.0f} on a quiet one, "
        f"{counted['LoRA'] / 1e6:,.0f} with LoRA."
        for name, model in MEMORY.items()
        if (counted := data.get("memory", {}).get(name))
    )


SHOWN = {  # kind -> name of its bar in README.md
    "AdamW": "clip + fused AdamW",
    "LoRA": f"LoRA, r = {backward.LORA_RANK}",
    "every=16": "sparse_optim, every = 16",
    "floor": "no weight gradients",
}


def shown(folder: Path) -> dict[str, dict[str, float]]:
    """Milliseconds for the picture in README.md: case -> bar; {} if there are no figures."""
    data = newest("cpu-whole-step-*.json", folder) or {"runs": []}
    found = {}
    for run in data["runs"]:
        spent = milliseconds(run, SHARES[0])
        found[f"{run['model']}, {run['dtype']}"] = {SHOWN[kind]: spent[kind] for kind in SHOWN}
    return found


def headline(folder: Path) -> list[str]:
    """Show whole training steps for README.md; return [] if there are no figures."""
    cases = shown(folder).values()
    if not cases:
        return []
    adamw, lora, ours, _ = SHOWN.values()
    over = {
        name: f"{min(case[ours] / case[name] for case in cases):.2f} to "
        f"{max(case[ours] / case[name] for case in cases):.2f}"
        for name in (adamw, lora)
    }
    return [
        "![Milliseconds of a whole training step](bench/results/whole-step.png)",
        "A whole training step (forward, backward, clipping, optimizer) on 2 CPU threads, with "
        f"{SHARES[0]:.1%} of the entries: {over[adamw]} of the time of clipped fused AdamW, "
        f"{over[lora]} of LoRA's. The last bar computes no weight gradient: a step that trains "
        "weights cannot be shorter.",
    ]


def report(data: dict[str, Any]) -> str:
    """Describe a results file."""
    records = [record for run in data["runs"] for record in run["subjects"]]
    return "\n\n".join(
        [
            "Whole training steps of 1,024 tokens (MiniLM 768), clipping included, with "
            "`sampled_backward=True`: a quiet step, a loud one, the mean of a run with `every=16`; "
            "beside them the same set with dense gradients, clipped fused AdamW on all parameters, "
            f"LoRA (r = {backward.LORA_RANK}, all Linear modules), and the floor: vectors alone "
            "are trained, so that no weight gradient is computed.",
            table(data["runs"]),
            memory_line(data),
            f"{data['machine']['threads']} threads, commit {data['commit'][:8]}; "
            f"{clean_share(records):.0%} of the calls were clean.",
        ]
    )


def main() -> None:
    """Measure every model, print the figures and write the results file."""
    parser = console.parser("whole_step", __doc__)
    parser.add_argument("--models", nargs="+", choices=[*MEASURED, *SMALL], default=[*MEASURED],
                        help="models to measure")  # fmt: skip
    parser.add_argument("--dtypes", nargs="+", choices=list(DTYPES), default=list(DTYPES),
                        help="dtypes of the weights")  # fmt: skip
    parser.add_argument("--rounds", type=int, default=9, help="timed steps of each kind")
    parser.add_argument("--warmup", type=int, default=1, help="untimed steps before them")
    name = f"cpu-whole-step-{date.today().isoformat()}.json"
    parser.add_argument("--out", type=Path, default=environment.RESULTS / name,
                        help="default: bench/results/cpu-whole-step-<date>.json")  # fmt: skip
    parser.add_argument("--memory", action="store_true", help="measure memory, too")
    arguments = parser.parse_args()
    settings = {"rounds": arguments.rounds, "warmup": arguments.warmup, "shares": SHARES}
    data: dict[str, Any] = {
        "schema": 1, "kind": "cpu-whole-step", **environment.describe(), "settings": settings,
        "runs": [],
    }  # fmt: skip
    for model in arguments.models:
        for dtype in arguments.dtypes:
            data["runs"].append(measure(model, dtype, arguments.rounds, arguments.warmup))
            arguments.out.write_text(json.dumps(data, separators=(",", ":")) + "\n")
            print(table(data["runs"][-1:]), flush=True)
    for name, model in MEMORY.items() if arguments.memory else ():
        data.setdefault("memory", {})[name] = memory(model)
        arguments.out.write_text(json.dumps(data, separators=(",", ":")) + "\n")
        print(memory_line(data), flush=True)


if __name__ == "__main__":
    main()

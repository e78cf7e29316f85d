"""Time switches between deltas over one model: python -m bench.switching

On a model with random weights, two deltas of random entries of its Linear weights (1% each). All
take turns in one process:

    switch          DeltaSwitcher: out with one delta, in with the other
    bare scatter    the same entries written by torch alone, tensor by tensor: the limit
    apply, revert   apply_delta and revert, which check everything each time
    dense copy      another task's weights copied over all of the model
    LoRA            peft, r = 16, two adapters: `set_adapter`, which changes no weight and makes
                    each forward pass slower; loading one from a file; and merging one into the
                    weights, and out again

`--write` records bench/results/switching-<date>.json.
"""

from __future__ import annotations

import copy
import json
import statistics
import tempfile
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bench import console
from bench.environment import RESULTS, Conditions, describe
from bench.models import MODELS
from bench.tables import table
from bench.timing import Subject, interleave
from sparse_optim.delta import Delta, DeltaSwitcher, apply_delta
from sparse_optim.delta._tensors import bits
from sparse_optim.optim.param_groups import linear_weights

SHARE = 0.01
LIMIT = "bare scatter of the same entries"


def changed(model: nn.Module, seed: int) -> nn.Module:
    """A copy with other values in a share of the entries of Linear weights."""
    tuned, generator = copy.deepcopy(model), torch.Generator().manual_seed(seed)
    chosen = linear_weights(tuned)
    with torch.no_grad():
        for param in tuned.parameters():
            if id(param) in chosen:
                moved = torch.rand(param.numel(), generator=generator) < SHARE
                flat = param.view(-1)
                flat[moved] += 0.01
    return tuned


def subjects_of(model: nn.Module, adapters: Any, folder: Path) -> list[Subject]:
    """What is compared; each leaves the model with one of the deltas, or none.

    Args:
        folder: with the second adapter.
    """
    tuned = [changed(model, seed) for seed in (1, 2)]
    deltas = [Delta.from_models(model, each) for each in tuned]
    tasks = DeltaSwitcher(model, {str(number): delta for number, delta in enumerate(deltas)})
    named = dict(model.named_parameters())
    flat = {name: bits(param).view(-1) for name, param in named.items()}
    first, second = (delta.sparse.items() for delta in deltas)
    writes: list[tuple[Tensor, Tensor, Tensor]] = [
        *((flat[name], each.position, flat[name][each.position]) for name, each in first),
        *((flat[name], each.position, bits(each.value)) for name, each in second),
    ]
    whole = [(named[name].detach(), each.detach()) for name, each in tuned[0].named_parameters()]

    def switch() -> None:
        tasks.use("1" if tasks.active == "0" else "0")

    def scatter() -> None:
        for target, position, value in writes:
            target.scatter_(0, position, value)

    def apply() -> None:
        apply_delta(model, deltas[0]).revert()

    def copy_all() -> None:
        for target, value in whole:
            target.copy_(value)

    def fresh() -> None:
        tasks.use(None)
        with torch.no_grad():
            for name, param in named.items():
                param.copy_(kept[name])

    def in_use() -> None:
        if tasks.active is None:
            fresh()
            tasks.use("0")

    def unload() -> None:
        if "loaded" in adapters.peft_config:
            adapters.delete_adapter("loaded")

    def load() -> None:
        adapters.load_adapter(folder / "second", "loaded")

    def merge() -> None:
        adapters.base_model.merge_adapter(["second"])
        adapters.base_model.unmerge_adapter()

    kept = {name: param.detach().clone() for name, param in named.items()}
    name_of = {"name": "switch"}
    return [
        Subject(name_of, switch, prepare=in_use),
        Subject({"name": LIMIT}, scatter, prepare=fresh),
        Subject({"name": "apply_delta and revert"}, apply, prepare=fresh),
        Subject({"name": "dense copy of all weights"}, copy_all, prepare=fresh),
        Subject({"name": "LoRA: set_adapter"}, lambda: adapters.set_adapter("second")),
        Subject({"name": "LoRA: load_adapter"}, load, prepare=unload),
        Subject({"name": "LoRA: merge and unmerge"}, merge, prepare=unload),
    ]


def measure(dtype: torch.dtype, rounds: int) -> list[dict[str, Any]]:
    """Time all subjects on BERT-base."""
    import peft

    model = MODELS["BERT-base"].build().to(dtype)
    config = peft.LoraConfig(r=16, target_modules="all-linear", lora_dropout=0.0)
    adapters = peft.get_peft_model(copy.deepcopy(model), config)
    adapters.add_adapter("second", config)
    with tempfile.TemporaryDirectory() as name:
        adapters.save_pretrained(name, selected_adapters=["second"])
        return interleave(subjects_of(model, adapters, Path(name)), rounds, warmup=2)


def main() -> None:
    """Measure, and print."""
    parser = console.parser("switching", __doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--write", action="store_true", help="record under bench/results")
    options = parser.parse_args()
    conditions, found = Conditions.begin(), {}
    for dtype in (torch.bfloat16, torch.float32):
        records = measure(dtype, options.rounds)
        times = {each["name"]: statistics.median(each["us"]) / 1e3 for each in records}
        found[str(dtype).removeprefix("torch.")] = times
        lines = [
            [name, f"{spent:.2f}", f"{spent / times[LIMIT]:.2f}"] for name, spent in times.items()
        ]
        print(table([str(dtype), "ms", "/ bare scatter"], lines), flush=True)
    if options.write:
        record = describe() | {"conditions": conditions.end(), "milliseconds": found}
        path = RESULTS / f"switching-{date.today().isoformat()}.json"
        path.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()

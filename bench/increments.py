"""Time increments and nested budgets beside the hashing of a delta: python -m bench.increments

Two deltas of random entries (1 in 1,000) over the shapes of a model in bfloat16: of the second,
a part of the entries moved on, others are new, and some of the first are gone. A delta's content
is hashed once by `increment` and by `compose`: that is the limit.

    hashing      content_fingerprint of the first delta
    increment    the second over the first; `nested`: over a prefix of itself, half of its entries
    compose      the first and the increment; `nested`: the same
    prefix       half of the second delta

`--write` records bench/results/increments-<date>.json.
"""

from __future__ import annotations

import json
import statistics
from datetime import date
from typing import Any

import torch
from torch import Tensor

from bench import console
from bench.environment import RESULTS, Conditions, describe
from bench.models import MODELS
from bench.tables import table
from bench.timing import Subject, interleave
from sparse_optim.delta import (
    Delta,
    SparseValues,
    compose,
    content_fingerprint,
    increment,
)

SHARE = 1e-3
MOVED = 0.5  # share of the first delta's entries that have another value in the second
GONE = 0.1  # and share of those that the second lacks
LIMIT = "hashing"
GOAL = 2.0  # times the hashing


def two_deltas(model: str, seed: int = 0) -> tuple[Delta, Delta]:
    """Deltas of one run, an earlier and a later one, over a base with these shapes."""
    generator = torch.Generator().manual_seed(seed)
    with torch.device("meta"):
        shapes = {
            name: param.shape for name, param in MODELS[model].build("meta").named_parameters()
        }
    first, second = {}, {}
    for name, shape in shapes.items():
        numel = shape.numel()
        drawn = torch.rand(numel, generator=generator)
        early, late = drawn < SHARE, (drawn < SHARE * (1 - GONE)) | (drawn > 1 - SHARE * GONE)
        value = torch.randn(numel, generator=generator).bfloat16()
        moved = torch.rand(numel, generator=generator) < MOVED
        first[name] = _values(shape, early, value)
        second[name] = _values(shape, late, torch.where(moved, value + 1, value))
    prints = dict.fromkeys(first, "0" * 32)
    return Delta(first, fingerprints=prints), Delta(second, fingerprints=prints)


def _values(shape: torch.Size, chosen: Tensor, value: Tensor) -> SparseValues:
    position = chosen.nonzero().view(-1)
    step = (position % 100).to(torch.int32)
    return SparseValues(tuple(shape), value.dtype, position, value[position], unmask_step=step)


def subjects_of(parent: Delta, delta: Delta) -> list[Subject]:
    """What is compared."""
    half = delta.prefix(delta.num_entries // 2)
    step, nested = increment(delta, parent), increment(delta, half)
    return [
        Subject({"name": LIMIT}, lambda: content_fingerprint(parent)),
        Subject({"name": "increment"}, lambda: increment(delta, parent)),
        Subject({"name": "increment, nested"}, lambda: increment(delta, half)),
        Subject({"name": "compose"}, lambda: compose(parent, step)),
        Subject({"name": "compose, nested"}, lambda: compose(half, nested)),
        Subject({"name": "prefix"}, lambda: delta.prefix(delta.num_entries // 2)),
    ]


def measure(model: str, rounds: int) -> dict[str, Any]:
    """Time all subjects, interleaved; medians in milliseconds."""
    parent, delta = two_deltas(model)
    conditions = Conditions.begin()
    records = interleave(subjects_of(parent, delta), rounds, warmup=2)
    return {
        **describe(),
        "conditions": conditions.end(),
        "model": model,
        "parameters": len(delta.sparse),
        "numel": sum(values.numel for values in delta.sparse.values()),
        "entries": delta.num_entries,
        "goal": f"below {GOAL} times the hashing",
        "ms": {each["name"]: statistics.median(each["us"]) / 1e3 for each in records},
        "records": records,
    }


def main() -> None:
    """Measure, print the table, and record it if asked to."""
    parser = console.parser("increments", __doc__)
    parser.add_argument("--model", default="SmolLM2-135M", choices=list(MODELS))
    parser.add_argument("--rounds", type=int, default=15, help="timed calls of each subject")
    parser.add_argument("--write", action="store_true", help="record under bench/results")
    options = parser.parse_args()
    found = measure(options.model, options.rounds)
    rows = [
        [name, f"{ms:.2f}", f"{ms / found['ms'][LIMIT]:.2f}"] for name, ms in found["ms"].items()
    ]
    print(f"{found['entries']:,} of {found['numel']:,} entries, {found['parameters']} parameters\n")
    print(table(["", "ms", "/ hashing"], rows))
    if options.write:
        path = RESULTS / f"increments-{date.today().isoformat()}.json"
        path.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""Compare our sampling of entries without replacement with NumPy's and torch's.

    python -m bench.sampling              # BERT-base, the number of entries that BitFit trains
    python -m bench.sampling --write      # also records bench/results/cpu-sampling-<date>.json

Every subject draws a set of entries with probabilities proportional to score^2, from the scores of
the whole model. Ours takes the list of tensors; the others get one array of all scores.
torch.multinomial is missing because it rejects more than 2^24 entries.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bench import console
from bench.environment import RESULTS, Conditions, describe
from bench.results import newest
from bench.shapes import MODELS, grads_of, make_params, num_entries
from bench.tables import table
from bench.timing import Subject, interleave
from sparse_optim import D3, MaskedAdamW, Stochastic
from sparse_optim.engine.pool import Gradients

SHARE = 0.0008  # of all entries; BitFit trains this share of RoBERTa (Akbar-Tajari and Pilehvar)
OURS = "ours: noise within the ranking pass"


def ours(params: Sequence[Tensor], scores: list[Tensor], draws: int) -> Subject:
    """Run `rank` and `cut` on the scores, passed as gradients (exp = 0 ranks by gradients)."""
    optimizer = MaskedAdamW(params, importance=D3(), selection=Stochastic(draws))
    engine = optimizer.engine
    bound = engine.ops.bind(scores, engine.pool.params, engine.work.table)
    grads = Gradients(bound, scores, [])

    def run() -> None:
        engine.active.progress[0] += 1  # another sample each time
        engine.cut(grads)

    def check() -> None:
        if int(engine.work.new.count) != draws:
            raise RuntimeError(f"drew {int(engine.work.new.count)} entries of {draws}")

    return Subject({"name": OURS}, run, check=check)


def numpy_choice(scores: np.ndarray, draws: int) -> Subject:
    """Normalise the scores, then call Generator.choice."""
    generator = np.random.default_rng(0)

    def run() -> None:
        weight = np.square(scores, dtype=np.float64)
        generator.choice(weight.size, draws, replace=False, p=weight / weight.sum(), shuffle=False)

    return Subject({"name": "numpy.random.Generator.choice"}, run)


def gumbel_topk(scores: Tensor, draws: int) -> Subject:
    """Draw a random number for every entry, then call torch.topk."""

    def run() -> None:
        noise = torch.empty_like(scores).exponential_()
        (scores / noise.sqrt_()).topk(draws, sorted=False)

    return Subject({"name": "torch: exponential_ and topk"}, run)


def measure(model: str, rounds: int) -> dict[str, Any]:
    """Time all subjects, interleaved; return medians in milliseconds and raw times."""
    params = make_params(MODELS[model], torch.float32)
    scores = [grad.abs() + 1e-12 for grad in grads_of(params)]  # every entry may be drawn
    draws = round(SHARE * num_entries(MODELS[model]))
    joined = torch.cat([score.view(-1) for score in scores])
    subjects = [
        ours(params, scores, draws),
        gumbel_topk(joined, draws),
        numpy_choice(joined.numpy(), draws),
    ]
    conditions = Conditions.begin()
    records = interleave(subjects, rounds, warmup=1)
    medians = {record["name"]: statistics.median(record["us"]) / 1000 for record in records}
    return {
        **describe(),
        "conditions": conditions.end(),
        "model": model,
        "entries": joined.numel(),
        "draws": draws,
        "ms": medians,
        "times_ours": {name: round(ms / medians[OURS], 1) for name, ms in medians.items()},
        "records": records,
    }


def section(folder: Path) -> list[str]:
    """Show the newest recorded figures as Markdown; return [] if there are none."""
    data = newest("cpu-sampling-*.json", folder)
    return [] if data is None else [report(data)]


def report(data: dict[str, Any]) -> str:
    """Show a result as Markdown."""
    rows = [
        [name, f"{ms:.0f}", f"{data['times_ours'][name]:.1f}"] for name, ms in data["ms"].items()
    ]
    return (
        f"Drawing {data['draws']:,} of {data['entries']:,} entries without replacement "
        f"({data['model']} shapes, {data['machine']['threads']} threads, commit "
        f"{data['commit'][:8]}):\n\n{table(['sampling', 'ms', 'times ours'], rows)}"
    )


def main() -> None:
    """Measure, print the table, and record it if asked to."""
    parser = console.parser("sampling", __doc__)
    parser.add_argument("--model", default="BERT-base", choices=list(MODELS), help="shapes to use")
    parser.add_argument("--rounds", type=int, default=5, help="timed calls of each subject")
    parser.add_argument("--write", action="store_true", help="record under bench/results")
    options = parser.parse_args()
    result = measure(options.model, options.rounds)
    print(report(result))
    if options.write:
        path = RESULTS / f"cpu-sampling-{date.today()}.json"
        path.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""Time optimizer steps against AdamW and the read bandwidth: python -m bench.steps

Each run of a model, dtype and kind of gradients is a separate process, in which all subjects share
one set of parameters and gradients and take turns: our step for each budget B, quota k and exp,
with clipping; its scan alone; AdamW fused and foreach, each without and with clip_grad_norm_; plain
reads of the gradients. Raw times go to a JSON file, from which bench.report makes tables and plots.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench import console, environment, goals, memory, real_grads
from bench.results import REAL, ROW_SCALED, SCHEMA, SYNTHETIC, Results
from bench.shapes import DTYPES, MEASURED, MODELS, grads_of, make_params, scale_rows
from bench.subjects import adamw, ours, reads, scan_alone
from bench.timing import interleave
from bench.verify import check_selection


@dataclass(frozen=True)
class Settings:
    """Select what to measure, and how often.

    Attributes:
        rounds: timed calls of each subject in a run, after `warmup` untimed ones.
        runs: processes per model and dtype.
        budgets, quotas, exps: settings of our steps.
        grads: kinds of gradients: "synthetic" (shapes.py), "row-scaled", and "trec50@20" for those
            of step 20 of a real run on TREC-50 (real_grads.py; MiniLM only).
        threads: number of torch threads; 0 keeps torch's default.
    """

    models: tuple[str, ...] = MEASURED
    dtypes: tuple[str, ...] = tuple(DTYPES)
    rounds: int = 15
    warmup: int = 2
    runs: int = 5
    budgets: tuple[int, ...] = (320_000, 3_500_000)
    quotas: tuple[int, ...] = (32, 320, 3200, 16000)
    exps: tuple[float, ...] = (0.0, 2.0)
    grads: tuple[str, ...] = (SYNTHETIC, ROW_SCALED, *REAL)
    threads: int = 0


QUICK = Settings(
    models=("MiniLM",), rounds=3, warmup=1, runs=1, budgets=(320_000,), grads=(SYNTHETIC,)
)


def params_of(model: str, dtype: str, grads: str) -> list[Tensor]:
    """Return parameters with gradients of a kind.

    Raises:
        ValueError: no such kind for this model.
    """
    if grads == SYNTHETIC:
        return make_params(MODELS[model], DTYPES[dtype])
    if grads == ROW_SCALED:
        return scale_rows(make_params(MODELS[model], DTYPES[dtype]))
    dataset, at, step = grads.partition("@")
    if model != real_grads.MODEL or not at or not step.isdigit():
        raise ValueError(
            f"gradients of {model}: expected {SYNTHETIC}, {ROW_SCALED} or, for "
            f"{real_grads.MODEL}, a data set and a step such as {REAL[0]}; got {grads}"
        )
    return real_grads.record(dataset, int(step), DTYPES[dtype])


def measure(model: str, dtype: str, grads: str, run: int, settings: Settings) -> dict[str, Any]:
    """Run one model, dtype and kind of gradients once; return the raw times of all subjects."""
    if settings.threads:
        torch.set_num_threads(settings.threads)
    params = params_of(model, dtype, grads)
    dense = grads_of(params)
    smallest = min(settings.budgets)
    subjects = [*reads(dense), *adamw(params), scan_alone(params, smallest, settings.quotas[0])]
    for exp in settings.exps:
        check_selection(params, smallest, settings.quotas[0], exp)
    for budget in settings.budgets:
        for quota in settings.quotas:
            subjects += [ours(params, budget, quota, exp) for exp in settings.exps]
    watch = environment.Conditions.begin()
    records = interleave(subjects, settings.rounds, settings.warmup)
    return {
        "model": model,
        "dtype": dtype,
        "grads": grads,
        "run": run,
        "entries": sum(param.numel() for param in params),
        "tensors": len(params),
        "grad_bytes": sum(grad.nbytes for grad in dense),
        "conditions": watch.end(),
        "subjects": records,
    }


def measure_all(settings: Settings, path: Path) -> Results:
    """Run all models and dtypes in turn, in fresh processes; write the file after each run."""
    data: dict[str, Any] = {
        "schema": SCHEMA,
        "kind": "cpu-steps",
        **environment.describe(),
        "settings": asdict(settings),
        "memory": memory.rows(settings.models, settings.dtypes, settings.budgets),
        "runs": [],
    }
    if settings.threads:
        data["machine"]["threads"] = settings.threads
    cases = [
        (model, dtype, grads, run)
        for run in range(settings.runs)
        for model in settings.models
        for dtype in settings.dtypes
        for grads in settings.grads
        if grads in (SYNTHETIC, ROW_SCALED) or model == real_grads.MODEL
    ]
    context = multiprocessing.get_context("spawn")
    for model, dtype, grads, run in cases:
        with ProcessPoolExecutor(max_workers=1, mp_context=context) as process:
            result = process.submit(measure, model, dtype, grads, run, settings).result()
        data["runs"].append(result)
        path.write_text(json.dumps(data, separators=(",", ":")) + "\n")
        print(_summary(Results(data).of(grads), model, dtype, grads, run), flush=True)
    return Results(data)


def _summary(results: Results, model: str, dtype: str, grads: str, run: int) -> str:
    """Summarise a finished run in one line."""
    conditions = results.runs(model, dtype)[-1]["conditions"]
    times = {name: results.time(model, dtype, name) / 1e3 for name in ("read", "fused", "ours")}
    return (
        f"{model} {dtype}, {grads} gradients, run {run + 1}: read {times['read']:.2f} ms, fused "
        f"AdamW {times['fused']:.2f} ms, fastest of our steps {times['ours']:.2f} ms; clean calls "
        f"{results.clean_share([(model, dtype)]):.0%}, others' share of the CPU "
        f"{conditions['others_share']:.0%}"
    )


def default_path() -> Path:
    """Return bench/results/cpu-steps-<date>.json."""
    return environment.RESULTS / f"cpu-steps-{date.today().isoformat()}.json"


def _arguments() -> argparse.Namespace:
    parser = console.parser("steps", __doc__)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), help="models to measure")
    parser.add_argument("--dtypes", nargs="+", choices=list(DTYPES), help="dtypes of parameters")
    parser.add_argument("--budgets", nargs="+", type=int, help="budgets of our step, in entries")
    parser.add_argument("--quotas", nargs="+", type=int, help="entries unmasked per step")
    parser.add_argument("--grads", nargs="+", help="kinds of gradients, for example trec50@20")
    parser.add_argument("--rounds", type=int, help="timed calls of each subject")
    parser.add_argument("--runs", type=int, help="processes per model and dtype")
    parser.add_argument("--threads", type=int, help="torch threads (default: torch's default)")
    parser.add_argument("--quick", action="store_true", help="MiniLM, one run of three rounds")
    parser.add_argument("--check", action="store_true", help="report which goals are reached")
    parser.add_argument("--no-run", action="store_true", help="with --check, use the newest file")
    parser.add_argument("--out", type=Path, help="default: bench/results/cpu-steps-<date>.json")
    return parser.parse_args()


def _settings(arguments: argparse.Namespace) -> Settings:
    given: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in vars(arguments).items()
        if name in Settings.__dataclass_fields__ and value is not None
    }
    return replace(QUICK if arguments.quick else Settings(), **given)


def main() -> None:
    """Measure, write the results file, and report the goals."""
    arguments = _arguments()
    if arguments.no_run:
        results = Results.load(arguments.out)
    else:
        path = arguments.out or default_path()
        results = measure_all(_settings(arguments), path)
        print(f"written: {path.name}")
    if arguments.check:
        print(goals.check(results))


if __name__ == "__main__":
    main()

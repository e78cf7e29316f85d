"""`sparse-optim experiment NAME`: list or run the cells, and write the table."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from sparse_optim.cli.console import one_line_errors, print_line, quiet_libraries
from sparse_optim.experiments.ablation import ABLATION
from sparse_optim.experiments.arithmetic import MATH
from sparse_optim.experiments.budgets import BUDGETS
from sparse_optim.experiments.every import EVERY
from sparse_optim.experiments.glue import ADAPTERS, GLUE, NER
from sparse_optim.experiments.overrides import Choice, choose, whole
from sparse_optim.experiments.presets import Experiment
from sparse_optim.experiments.quality import COSTS, QUALITY
from sparse_optim.experiments.stochastic import STOCHASTIC
from sparse_optim.experiments.summarization import SUMMARIZATION
from sparse_optim.experiments.sweeps import SWEEPS

EXPERIMENTS = (
    GLUE,
    NER,
    ADAPTERS,
    MATH,
    SUMMARIZATION,
    BUDGETS,
    SWEEPS,
    STOCHASTIC,
    QUALITY,
    COSTS,
    ABLATION,
    EVERY,
)

Output = Annotated[
    Path | None, typer.Option("--output", "-o", help="Output folder (default: runs/NAME).")
]
DataFolder = Annotated[
    Path | None,
    typer.Option(help="Read TASK/{train,validation}.jsonl from this folder, not from the hub."),
]
Model = Annotated[str | None, typer.Option("--model", "-m", help="Model (default: the preset's).")]
Tasks = Annotated[str | None, typer.Option(help="Run only these tasks, separated by commas.")]
Methods = Annotated[
    str | None, typer.Option(help="Run only these rows or other methods, separated by commas.")
]
Rates = Annotated[str | None, typer.Option(help="Learning rates for all methods: 1e-4,3e-4.")]
Budgets = Annotated[str | None, typer.Option(help="Budgets (default: the preset's): 320K,1%.")]
Seeds = Annotated[str | None, typer.Option(help="Seeds (default: the preset's): 0,1,2.")]
Targets = Annotated[
    str | None,
    typer.Option(help="Put LoRA on Linear modules with names that end in these (a,b)."),
]
Steps = Annotated[int | None, typer.Option(help="Optimizer steps of each cell.")]
BatchSize = Annotated[int | None, typer.Option(help="Batch size.")]
Limit = Annotated[int | None, typer.Option(help="Maximum number of examples of each split.")]
EvalLimit = Annotated[
    int | None, typer.Option(help="Maximum number of examples of an evaluation (default: --limit).")
]
EvalEvery = Annotated[
    int | None,
    typer.Option(
        help="Steps between evaluations. cells.jsonl has all, the table the last (default: the "
        "preset's; math: only at the end)."
    ),
]
Shifted = Annotated[
    bool,
    typer.Option("--shifted", help="quality: also test on other data than that of the training."),
]
Forgetting = Annotated[
    bool,
    typer.Option(
        "--forgetting",
        help="Also measure what runs lose: cosines of STS-B pairs, or LM loss on XSum.",
    ),
]
MaxMinutes = Annotated[
    float | None,
    typer.Option(help="Start no cell that would end later than this; resume by the same command."),
]
Only = Annotated[
    list[str] | None, typer.Option(help="Run only cells with this in their name. Repeatable.")
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="List the cells and the time they take.")]
Keep = Annotated[bool, typer.Option("--keep", help="Keep delta, metrics and curves of each run.")]
Record = Annotated[
    Path | None,
    typer.Option(help="Also write table and cells to NAME-DATE.json in this folder."),
]
Beams = Annotated[int, typer.Option(help="math, summarization: beams of the search for a text.")]
NewTokens = Annotated[int, typer.Option(help="math: maximum number of tokens of an answer.")]
Dtype = Annotated[
    str | None, typer.Option(help="dtype of the weights: float32 (default), bfloat16 or float16.")
]
Amp = Annotated[str | None, typer.Option(help="Autocast: none or bf16 (default: the preset's).")]
Cpu = Annotated[bool, typer.Option("--cpu", help="Use the CPU.")]
Threads = Annotated[int | None, typer.Option(help="Number of CPU threads.")]
Debug = Annotated[
    bool, typer.Option("--debug", help="Show tracebacks and the libraries' warnings.")
]


def register(app: typer.Typer) -> None:
    """Add `experiment`, with a command for each experiment, to `app`."""
    group = typer.Typer(
        help="Run an experiment of the papers, or the quality table. Resumable.",
        no_args_is_help=True,
        rich_markup_mode="rich",
    )
    for experiment in EXPERIMENTS:
        group.command(experiment.name, help=about(experiment))(command(experiment))
    app.add_typer(group, name="experiment")


def about(experiment: Experiment) -> str:
    """The help of one experiment."""
    tasks = ", ".join(task.name for task in experiment.tasks)
    rows = ", ".join(row.label for row in experiment.rows)
    shifts = [name for name in experiment.columns if name in experiment.shifted_columns]
    shifted = f" With --shifted: {', '.join(shifts)}." if shifts else ""
    files = ["cells.jsonl", "table.md", "table.json"]
    files += [f"{name}.png" for name in experiment.pictures]
    return (
        f"{experiment.about}\n\nSkips finished cells: to resume a stopped run, repeat the command. "
        "Several processes may share an output folder if each runs other tasks or methods. "
        f"Writes {', '.join(files)}.\n\nModel: {experiment.model}. "
        f"Tasks: {tasks}. Rows: {rows}.{shifted}"
    )


def command(experiment: Experiment) -> Callable[..., None]:
    """The function behind one command."""

    def run(
        output: Output = None,
        data_folder: DataFolder = None,
        model: Model = None,
        tasks: Tasks = None,
        methods: Methods = None,
        budgets: Budgets = None,
        lrs: Rates = None,
        seeds: Seeds = None,
        adapter_targets: Targets = None,
        steps: Steps = None,
        batch_size: BatchSize = None,
        limit: Limit = None,
        eval_limit: EvalLimit = None,
        eval_every: EvalEvery = None,
        shifted: Shifted = False,
        forgetting: Forgetting = False,
        max_minutes: MaxMinutes = None,
        only: Only = None,
        dry_run: DryRun = False,
        keep: Keep = False,
        record: Record = None,
        beams: Beams = 4,
        new_tokens: NewTokens = 256,
        dtype: Dtype = None,
        amp: Amp = None,
        cpu: Cpu = False,
        threads: Threads = None,
        debug: Debug = False,
    ) -> None:
        choice = Choice(
            *(model, tasks, methods, budgets, lrs, seeds, steps, batch_size, adapter_targets),
            eval_every=eval_every,
        )
        given = {name: value for name, value in (("dtype", dtype), ("amp", amp)) if value}
        arguments = {
            "output": output or Path("runs") / experiment.name,
            "data_folder": data_folder,
            "limit": limit,
            "eval_limit": eval_limit,
            "shifted": shifted,
            "forgetting": forgetting,
            "max_minutes": max_minutes,
            "only": tuple(only or ()),
            "keep": keep,
            "decoding": {"beams": beams, "new_tokens": new_tokens},
            "extra": {"cpu": cpu, "threads": threads} | given,
        }
        kept = "Finished cells are kept: repeat the command to resume."
        with one_line_errors(debug=debug, interrupted=kept):
            run_and_show(experiment, choice, arguments, dry_run, record, debug)

    return run


def run_and_show(
    experiment: Experiment,
    choice: Choice,
    arguments: dict[str, Any],
    dry_run: bool,
    record: Path | None,
    debug: bool,
) -> None:
    """List the cells, or run them and write the table of all finished cells."""
    if not debug:
        quiet_libraries()
    # transformers: not needed for --help
    from sparse_optim.experiments.launch import make_runner, show_plan
    from sparse_optim.experiments.pictures import write_pictures
    from sparse_optim.experiments.runner import Decoding, RunOptions
    from sparse_optim.experiments.table import markdown, write_table

    console = Console()
    chosen, left_out = choose(experiment, choice)
    if left_out:
        print_line(f"left out: {', '.join(left_out)}")
    arguments["decoding"] = Decoding(**arguments["decoding"])
    runner = make_runner(chosen, RunOptions(**arguments), console)
    if dry_run:
        return show_plan(runner, console)
    output = arguments["output"]
    every = whole(experiment, choice)
    for _ in runner.run():
        write_table(every, runner.finished(every), output)  # a killed run leaves its table
    outcomes = runner.finished(every)
    summaries = write_table(every, outcomes, output)
    console.print(markdown(every, summaries), markup=False, highlight=False, soft_wrap=True)
    ending = "Complete" if runner.is_finished() else "Out of time; repeat the command to resume"
    if record is not None:
        write_record(chosen.name, summaries, outcomes, record)
    written = [output / "table.md", *write_pictures(every, summaries, output)]
    print_line(f"{ending}: {', '.join(map(str, written))}")


def write_record(
    name: str, summaries: Sequence[Any], outcomes: Sequence[Any], folder: Path
) -> Path:
    """Write table and cells to one file, named after the experiment and the day."""
    from sparse_optim.experiments.cells import plain

    now = datetime.now(timezone.utc)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}-{now:%Y-%m-%d}.json"
    content = {
        "date": now.isoformat(timespec="seconds"),
        "table": plain(list(summaries)),
        "cells": list(outcomes),
    }
    path.write_text(json.dumps(content, indent=1) + "\n")
    return path

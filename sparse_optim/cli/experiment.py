"""`sparse-optim experiment NAME`: choose, list or run the cells, and write the table."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from sparse_optim.cli.finetune import quiet_libraries
from sparse_optim.experiments.ablation import ABLATION
from sparse_optim.experiments.arithmetic import MATH
from sparse_optim.experiments.glue import ADAPTERS, GLUE, NER
from sparse_optim.experiments.overrides import Choice, choose, whole
from sparse_optim.experiments.presets import Experiment
from sparse_optim.experiments.quality import QUALITY
from sparse_optim.experiments.stochastic import STOCHASTIC
from sparse_optim.finetune.errors import FinetuneError

EXPERIMENTS = (GLUE, NER, ADAPTERS, MATH, STOCHASTIC, QUALITY, ABLATION)

Output = Annotated[Path | None, typer.Option("--output", "-o", help="Folder (default: runs/NAME).")]
DataFolder = Annotated[
    Path | None,
    typer.Option(help="Read the data here, not from the hub: TASK/{train,validation}.jsonl."),
]
Model = Annotated[str | None, typer.Option("--model", "-m", help="In place of the preset's.")]
Names = Annotated[str | None, typer.Option(help="Of the preset's, separated by commas.")]
Rates = Annotated[str | None, typer.Option(help="Learning rates of all methods: 1e-4,3e-4.")]
Budgets = Annotated[str | None, typer.Option(help="In place of the preset's: 320K,1%.")]
Seeds = Annotated[str | None, typer.Option(help="In place of the preset's: 0,1,2.")]
Targets = Annotated[
    str | None,
    typer.Option(help="LoRA on Linear modules whose names end so, in place of the preset's."),
]
Steps = Annotated[int | None, typer.Option(help="Optimizer steps of a cell.")]
BatchSize = Annotated[int | None, typer.Option(help="Examples of a step.")]
Limit = Annotated[int | None, typer.Option(help="At most so many examples of each split.")]
MaxMinutes = Annotated[
    float | None, typer.Option(help="Begin no cell that would end later; go on another time.")
]
Only = Annotated[
    list[str] | None, typer.Option(help="Only cells whose name contains this. Repeatable.")
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="List the cells and their time.")]
Keep = Annotated[bool, typer.Option("--keep", help="Keep delta, metrics and curves of each run.")]
Record = Annotated[
    Path | None, typer.Option(help="Also write table and cells to NAME-DATE.json in this folder.")
]
Beams = Annotated[int, typer.Option(help="math: of the search for an answer.")]
NewTokens = Annotated[int, typer.Option(help="math: greatest length of an answer.")]
Dtype = Annotated[
    str | None, typer.Option(help="Of the weights: float32 (default), bfloat16 or float16.")
]
Amp = Annotated[str | None, typer.Option(help="Autocast: none or bf16 (default: the preset's).")]
Cpu = Annotated[bool, typer.Option("--cpu", help="Leave the GPU alone.")]
Threads = Annotated[int | None, typer.Option(help="CPU threads of torch.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show tracebacks and libraries' warnings.")]


def register(app: typer.Typer) -> None:
    """Add `experiment`, with a command for each experiment, to `app`."""
    group = typer.Typer(
        help="Run an experiment of the papers, or the quality table; resumable.",
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
    return (
        f"{experiment.about}\n\nFinished cells are skipped, so a stopped run goes on where it was. "
        "Several processes may share an output folder, each with tasks or methods of its own. "
        f"Writes cells/*.json, table.md and table.json.\n\nModel: {experiment.model}. "
        f"Tasks: {tasks}. Rows: {rows}."
    )


def command(experiment: Experiment) -> Callable[..., None]:
    """The function behind one command."""

    def run(
        output: Output = None,
        data_folder: DataFolder = None,
        model: Model = None,
        tasks: Names = None,
        methods: Names = None,
        budgets: Budgets = None,
        lrs: Rates = None,
        seeds: Seeds = None,
        adapter_targets: Targets = None,
        steps: Steps = None,
        batch_size: BatchSize = None,
        limit: Limit = None,
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
            model, tasks, methods, budgets, lrs, seeds, steps, batch_size, adapter_targets
        )
        given = {name: value for name, value in (("dtype", dtype), ("amp", amp)) if value}
        arguments = {
            "output": output or Path("runs") / experiment.name,
            "data_folder": data_folder,
            "limit": limit,
            "max_minutes": max_minutes,
            "only": tuple(only or ()),
            "keep": keep,
            "decoding": {"beams": beams, "new_tokens": new_tokens},
            "extra": {"cpu": cpu, "threads": threads} | given,
        }
        try:
            run_and_show(experiment, choice, arguments, dry_run, record, debug)
        except FinetuneError as error:
            if debug:
                raise
            Console(stderr=True).print(f"[bold red]Error:[/] {escape(str(error))}", soft_wrap=True)
            raise typer.Exit(1) from None
        except KeyboardInterrupt:
            Console(stderr=True).print("Interrupted: finished cells stay; run it again to go on.")
            raise typer.Exit(130) from None

    return run


def run_and_show(
    experiment: Experiment,
    choice: Choice,
    arguments: dict[str, Any],
    dry_run: bool,
    record: Path | None,
    debug: bool,
) -> None:
    """List the cells, or run them and write the table of all that are finished."""
    if not debug:
        quiet_libraries()
    # transformers: not needed for --help
    from sparse_optim.experiments.launch import make_runner, show_plan
    from sparse_optim.experiments.runner import Decoding, RunOptions
    from sparse_optim.experiments.table import markdown, write_table

    console = Console()
    chosen, left_out = choose(experiment, choice)
    if left_out:
        console.print(f"left out: {', '.join(left_out)}", highlight=False, soft_wrap=True)
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
    ending = "Complete" if runner.is_finished() else "Out of time; run it again to go on"
    console.print(f"{ending}: {output}/table.md", highlight=False, soft_wrap=True)
    if record is not None:
        write_record(chosen.name, summaries, outcomes, record)


def write_record(
    name: str, summaries: Sequence[Any], outcomes: Sequence[Any], folder: Path
) -> Path:
    """Table and cells in one file, named by the experiment and the day."""
    from sparse_optim.experiments.table import plain

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

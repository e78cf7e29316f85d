"""Make the runner of an experiment, and show its plan."""

from __future__ import annotations

from dataclasses import replace

from rich.console import Console

from sparse_optim.experiments.arithmetic import MATH
from sparse_optim.experiments.forgetting import STSB, score_name
from sparse_optim.experiments.generation import (
    locate_training,
    measure_exact_match,
    watch_exact_match,
)
from sparse_optim.experiments.presets import Experiment, ExperimentError
from sparse_optim.experiments.runner import Runner, RunOptions
from sparse_optim.experiments.summarization import SUMMARIZATION, measure_rouge


def make_runner(experiment: Experiment, options: RunOptions, console: Console) -> Runner:
    """The runner, with the experiment's functions that find data and measure.

    Raises:
        ExperimentError: shifted test sets or forgetting are asked for, and no task has them.
    """
    if options.shifted and not experiment.shifted_columns:
        tasks = ", ".join(task.name for task in experiment.tasks)
        raise ExperimentError(
            f"--shifted: none of the tasks has a shifted test set ({tasks}); see `quality --help`"
        )
    if options.forgetting:
        check_forgetting(experiment, options)
    if experiment.name == MATH.name:
        functions = (locate_training, measure_exact_match, watch_exact_match)
        return Runner(experiment, options, console, *functions)
    if experiment.name == SUMMARIZATION.name:
        settings = {**experiment.settings, "num_beams": options.decoding.beams}
        written = replace(experiment, settings=settings)
        return Runner(written, options, console, measure=measure_rouge)
    return Runner(experiment, options, console)


def check_forgetting(experiment: Experiment, options: RunOptions) -> None:
    """Raise ExperimentError if no task has a skill to lose, or if its data is missing."""
    measured = [task for task in experiment.tasks if score_name(task)]
    if not measured:
        names = ", ".join(task.name for task in experiment.tasks)
        raise ExperimentError(f"--forgetting: nothing is measured for {names}: drop it")
    pairs = options.data_folder / STSB if options.data_folder is not None else None
    encodes = any(task.task != "causal-lm" for task in measured)
    if encodes and pairs is not None and not pairs.is_dir():
        raise ExperimentError(
            f"--forgetting: {pairs} is missing; the sentence pairs of GLUE's STS-B tell what an "
            "encoder loses"
        )


def show_plan(runner: Runner, console: Console) -> None:
    """Print the number of cells and the remaining time, then a line for each cell."""
    left, unknown, finished = 0.0, 0, 0
    planned, estimates = list(runner.wanted()), runner.estimates()
    lines = []
    for position, cell in enumerate(planned, 1):
        done = runner.store.read(cell) is not None
        estimate = None if done else estimates[cell.task.name]
        if not done:
            runner.config(cell)  # checks data folder, budget and method
            left += estimate or 0.0
            unknown += estimate is None
        finished += done
        time = "time unknown" if estimate is None else f"about {estimate:.0f} s"
        lines.append(f"{position:4}  {cell.name}  {'done' if done else time}")
    rest = f"; {unknown} cells without an estimate (none of their task has run)" if unknown else ""
    is_known = left or not unknown
    time = f"about {left / 60:.0f} minutes left" if is_known else "time left: unknown"
    if runner.experiment.widen and any(cell.lr is None for cell in planned):
        rest += "; more cells follow where the best rate is at an end of those listed"
    summary = f"{len(planned)} cells, {finished} finished, {time}{rest}"
    for line in (summary, "Cells in order, with the estimated time of each:", *lines):
        console.print(line, highlight=False, soft_wrap=True)

"""The cells of an experiment, the most important first."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

from sparse_optim.experiments.cells import Cell, Outcome
from sparse_optim.experiments.presets import Block, Experiment, Row, TaskPreset

Lookup = Callable[[Cell], Outcome | None]


def cells(experiment: Experiment, finished: Lookup) -> Iterator[Cell]:
    """The cells in order: in each block, every task and method once before any for a second time.

    Args:
        experiment: what to run.
        finished: returns the outcome of a cell, or None. It is called as late as possible: a caller
            that runs each cell before taking the next one gets tuned learning rates.
    """
    for block in experiment.blocks:
        if experiment.protocol == "grid":
            yield from grid(block, experiment.seeds)
        else:
            yield from tuned(block, experiment.seeds, finished)


def grid(block: Block, seeds: Sequence[int]) -> Iterator[Cell]:
    """One cell for each learning rate; the i-th rate goes with the i-th seed."""
    for position in range(max((len(row.lrs) for row in block.rows), default=0)):
        for task in block.tasks:
            for row in block.rows:
                if position < len(row.lrs):
                    yield Cell(task, row, row.lrs[position], seeds[position % len(seeds)])


def tuned(block: Block, seeds: Sequence[int], finished: Lookup) -> Iterator[Cell]:
    """One tuning cell for each learning rate before a row's first run; one run for each seed."""
    for seed in seeds:
        for task in block.tasks:
            for row in block.rows:
                trials = tuning_cells(task, row, seeds[0])
                if seed == seeds[0]:
                    yield from trials
                yield Cell(task, row, best_lr(row, trials, finished), seed)


def tuning_cells(task: TaskPreset, row: Row, seed: int) -> list[Cell]:
    """The cells that choose the row's learning rate on a task; none if there is only one rate."""
    if len(row.lrs) == 1:
        return []
    return [Cell(task, row, lr, seed, "tune") for lr in row.lrs]


def best_lr(row: Row, trials: list[Cell], finished: Lookup) -> float | None:
    """The rate with the highest value (the first of equals), None while a trial is missing."""
    if not trials:
        return row.lrs[0]
    outcomes = [finished(trial) for trial in trials]
    if any(outcome is None for outcome in outcomes):
        return None
    values = [value_of(outcome, trials[0].task.name) for outcome in outcomes if outcome]
    return row.lrs[values.index(max(values))]


def value_of(outcome: Outcome, column: str) -> float:
    """The value in a column; a run that diverged is below all others."""
    value = outcome["values"].get(column)
    return -math.inf if value is None else float(value)

"""The cells of an experiment, the most important first."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence

from sparse_optim.experiments.cells import Cell, Outcome
from sparse_optim.experiments.presets import Block, Experiment, Row, TaskPreset

Lookup = Callable[[Cell], Outcome | None]

MOST_WIDENED = 8  # rates beyond those of a row


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
            yield from tuned(block, experiment.seeds, finished, experiment.widen)


def grid(block: Block, seeds: Sequence[int]) -> Iterator[Cell]:
    """One cell for each learning rate; the i-th rate goes with the i-th seed."""
    for position in range(max((len(row.lrs) for row in block.rows), default=0)):
        for task in block.tasks:
            for row in block.rows:
                lrs = rates_of(task, row)
                if position < len(lrs):
                    yield Cell(task, row, lrs[position], seeds[position % len(seeds)])


def tuned(block: Block, seeds: Sequence[int], finished: Lookup, widen: float) -> Iterator[Cell]:
    """The tuning cells of a row before its first run; one run for each seed."""
    for seed in seeds:
        for task in block.tasks:
            for row in block.rows:
                if seed == seeds[0]:
                    yield from tuning_cells(task, row, seed, finished, widen)
                yield Cell(task, row, best_lr(task, row, seeds[0], finished, widen), seed)


def tuning_cells(
    task: TaskPreset, row: Row, seed: int, finished: Lookup, widen: float
) -> Iterator[Cell]:
    """The cells that choose the row's learning rate on a task; none if there is only one rate.

    Args:
        widen: while the best rate is at an end of the grid, the rate beyond it by this factor
            follows (at most `MOST_WIDENED` times, and only until three or more values are all
            equal: nothing is learnt); 0: the grid stays as it is.
    """
    lrs = sorted(rates_of(task, row))
    if len(lrs) == 1:
        return
    for lr in lrs:
        yield Cell(task, row, lr, seed, "tune")
    for _ in range(MOST_WIDENED if widen else 0):
        best = best_of(task, row, lrs, seed, finished)
        if best is None or best not in (lrs[0], lrs[-1]):
            return
        if is_flat(task, row, lrs, seed, finished):
            return
        lr = significant(best / widen if best == lrs[0] else best * widen)
        lrs = sorted([*lrs, lr])
        yield Cell(task, row, lr, seed, "tune")


def rates_of(task: TaskPreset, row: Row) -> list[float]:
    """The row's learning rates, times the factor of the task."""
    return [significant(lr * task.lr_factor) for lr in row.lrs]


def best_lr(
    task: TaskPreset, row: Row, seed: int, finished: Lookup, widen: float = 0
) -> float | None:
    """The rate with the highest value (the lowest of equals), None while a trial is missing."""
    if len(row.lrs) == 1:
        return rates_of(task, row)[0]
    lrs = [cell.lr for cell in tuning_cells(task, row, seed, finished, widen) if cell.lr]
    return best_of(task, row, lrs, seed, finished)


def best_of(
    task: TaskPreset, row: Row, lrs: Iterable[float], seed: int, finished: Lookup
) -> float | None:
    """The best of these rates, None while the outcome of one is missing."""
    values: dict[float, float] = {}
    for lr in sorted(lrs):
        outcome = finished(Cell(task, row, lr, seed, "tune"))
        if outcome is None:
            return None
        values[lr] = value_of(outcome, task.name)
    return max(values, key=values.__getitem__)


def is_flat(task: TaskPreset, row: Row, lrs: Iterable[float], seed: int, finished: Lookup) -> bool:
    """Whether at least three rates were tried, and all have the same value."""
    outcomes = [finished(Cell(task, row, lr, seed, "tune")) for lr in lrs]
    values = [value_of(outcome, task.name) for outcome in outcomes if outcome]
    return len(values) > 2 and len(set(values)) == 1


def significant(value: float) -> float:
    """The value without the noise of its last bits: file names and lookups hold it.

    Example:
        >>> significant(0.1 * 3)
        0.3
    """
    return float(f"{value:.6g}")


def value_of(outcome: Outcome, column: str) -> float:
    """The value in a column; a run that diverged is below all others."""
    value = outcome["values"].get(column)
    return -math.inf if value is None else float(value)

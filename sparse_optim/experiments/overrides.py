"""Apply a user's options to an experiment: narrow it, or change its settings."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from sparse_optim.experiments.presets import Block, Experiment, ExperimentError, Row, TaskPreset
from sparse_optim.finetune.adapter_kinds import ADAPTERS
from sparse_optim.finetune.config import parse_budget
from sparse_optim.finetune.hub import did_you_mean
from sparse_optim.methods import METHODS

Value = TypeVar("Value")

# Their budget is a share of each Linear weight, which would be far too much for other methods.
SHARE_OF_LINEAR = ("dps", "dps-mix")


@dataclass(frozen=True)
class Choice:
    """Options as typed; None: not given. Lists are separated by commas."""

    model: str | None = None
    tasks: str | None = None
    methods: str | None = None
    budgets: str | None = None
    lrs: str | None = None
    seeds: str | None = None
    steps: int | None = None
    batch_size: int | None = None
    adapter_targets: str | None = None
    eval_every: int | None = None


def choose(experiment: Experiment, choice: Choice) -> tuple[Experiment, list[str]]:
    """The experiment with the options applied, and the names of rows that cannot run here.

    Such rows are left out of a preset; naming one of them is an error.

    Raises:
        ExperimentError: an unknown task or method (lists the known ones), or a malformed list.
    """
    budgets = split(choice.budgets)
    for budget in budgets:
        parse_budget(budget)
    names = split(choice.methods)
    rows = change_budgets(named_rows(experiment, names, budgets), budgets)
    lrs = tuple(numbers("--lrs", choice.lrs, float))
    rows = [replace(row, lrs=lrs or row.lrs) for row in rows]
    targets = tuple(split(choice.adapter_targets))
    if targets:
        rows = [with_targets(row, targets) for row in rows]
    left_out = [row.label for row in rows if not available(row)]
    if names and left_out:
        raise ExperimentError(
            f"--methods: {left_out[0]} cannot run here: its method or peft is missing"
        )
    tasks = change_tasks(experiment, choice)
    kept = {row.label: row for row in rows if available(row)}
    return (
        replace(
            with_model(experiment, choice.model or experiment.model),
            seeds=tuple(numbers("--seeds", choice.seeds, int)) or experiment.seeds,
            widen=0 if lrs else experiment.widen,
            blocks=new_blocks(experiment, tasks, kept, bool(names or budgets)),
        ),
        left_out,
    )


def with_model(experiment: Experiment, model: str) -> Experiment:
    """The experiment with a model, which its table names if it is not the preset's."""
    if model == experiment.model:
        return experiment
    note = experiment.paper_note
    if experiment.paper:
        note += f" Its figures are those of {experiment.model}."
    title = f"{experiment.title}; with {Path(model).name}"
    return replace(experiment, model=model, title=title, paper_note=note)


def whole(experiment: Experiment, choice: Choice) -> Experiment:
    """The whole experiment of which `choice` runs a part; its table covers all of it.

    One block with every task, the rows of the preset and the rows of the choice.
    """
    part, _ = choose(experiment, choice)
    every, _ = choose(experiment, replace(choice, tasks=None, methods=None, budgets=None))
    rows = {row.label: row for row in (*every.rows, *part.rows)}
    return replace(every, blocks=(Block(every.tasks, tuple(rows.values())),))


def new_blocks(
    experiment: Experiment,
    tasks: Mapping[str, TaskPreset],
    rows: Mapping[str, Row],
    flat: bool,
) -> tuple[Block, ...]:
    """The preset's blocks, narrowed; a single block if the user chose the rows."""
    if flat:
        return (Block(tuple(tasks.values()), tuple(rows.values())),)
    return tuple(
        Block(
            tuple(tasks[task.name] for task in block.tasks if task.name in tasks),
            tuple(rows[row.label] for row in block.rows if row.label in rows),
        )
        for block in experiment.blocks
    )


def change_tasks(experiment: Experiment, choice: Choice) -> dict[str, TaskPreset]:
    """The chosen tasks by name, with the user's settings in place of the preset's."""
    if choice.eval_every is not None and choice.eval_every < 1:
        raise ExperimentError(f"--eval-every must be at least 1 step, got {choice.eval_every}")
    known = {task.name: task for task in experiment.tasks}
    wanted = split(choice.tasks) or list(known)
    for name in wanted:
        if name not in known:
            hint = did_you_mean(name, known)
            raise ExperimentError(f"unknown task {name!r}{hint}; known: {', '.join(known)}")
    changed = {}
    for name in wanted:
        task = known[name]
        if choice.steps is not None:
            task = replace(task, steps=choice.steps, seconds=None)
        if choice.batch_size is not None:
            task = replace(task, batch_size=choice.batch_size, seconds=None)
        if choice.eval_every is not None:
            task = replace(task, eval_every=choice.eval_every, seconds=None)
        if choice.lrs is not None:
            task = replace(task, lr_factor=1.0)  # the rates are the user's
        changed[name] = task
    return changed


def named_rows(experiment: Experiment, names: Sequence[str], budgets: Sequence[str]) -> list[Row]:
    """The preset's rows with these names; for other methods new rows with the preset's rates."""
    if not names:
        return list(experiment.rows)
    pattern = next((row for row in experiment.rows if row.budget), experiment.rows[0])
    budgeted = [row for row in experiment.rows if row.budget and row.method not in SHARE_OF_LINEAR]
    preset_budgets = list(dict.fromkeys(row.budget for row in budgeted))
    found: list[Row] = []
    for name in names:
        mine = [row for row in experiment.rows if row.name == name]
        if not mine and name not in METHODS:
            known = list(dict.fromkeys([*(row.name for row in experiment.rows), *METHODS]))
            hint = did_you_mean(name, known)
            raise ExperimentError(f"unknown method {name!r}{hint}; known: {', '.join(known)}")
        if not mine:
            mine = [
                Row(name, pattern.lrs, budget)
                for budget in budgets_of(name, list(budgets) or preset_budgets)
            ]
        found += mine
    return found


def budgets_of(method: str, known: Sequence[str]) -> Sequence[str]:
    """The budgets for a method; "" if it has none, or if the number of biases sets it.

    Raises:
        ExperimentError: it needs a budget, and neither the preset nor the user gives one.
    """
    if not METHODS[method].has_budget:
        return [""]
    if not known and METHODS[method].budget == "given":
        raise ExperimentError(
            f"--methods: {method} needs a budget, which the preset does not have: add --budgets"
        )
    return known or [""]


def with_targets(row: Row, targets: tuple[str, ...]) -> Row:
    """The row with its LoRA on other modules."""
    if row.adapter not in ADAPTERS or not ADAPTERS[row.adapter].places:
        return row
    return replace(row, settings={**row.settings, "adapter_targets": targets})


def change_budgets(rows: Iterable[Row], budgets: Sequence[str]) -> list[Row]:
    """Rows of methods with a budget, once for each of `budgets`; the others unchanged.

    If two rows get the same label, the one that had this budget before is kept.
    """
    changed: dict[str, Row] = {}
    for row in rows:
        has_budget = row.method in METHODS and METHODS[row.method].has_budget
        for budget in budgets if budgets and has_budget else [row.budget]:
            new = replace(row, budget=budget)
            if new.label not in changed or row.budget == budget:
                changed[new.label] = new
    return list(changed.values())


def available(row: Row) -> bool:
    """Whether the row's method and adapter can run here."""
    if row.method not in METHODS:
        return False
    if row.adapter in (None, "pfeiffer"):  # our own
        return True
    return importlib.util.find_spec("peft") is not None


def split(text: str | None) -> list[str]:
    """'a, b' as a list; empty for None."""
    return [part.strip() for part in (text or "").split(",") if part.strip()]


def numbers(option: str, text: str | None, read: Callable[[str], Value]) -> list[Value]:
    """A list of numbers, or an ExperimentError that names the option."""
    try:
        return [read(part) for part in split(text)]
    except ValueError:
        raise ExperimentError(
            f"{option}: expected numbers separated by commas, got {text!r}"
        ) from None

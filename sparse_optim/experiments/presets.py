"""The parts of an experiment: tasks, methods, learning rates, seeds, the paper's figures."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from sparse_optim.finetune.errors import FinetuneError


class ExperimentError(FinetuneError):
    """Wrong input to an experiment: one line that says what is wrong and what to do."""


@dataclass(frozen=True)
class Shift:
    """A test set that differs from a task's training data.

    Args:
        dataset: another built-in set with the same labels; None: the task's test set.
        typos: whether some of its words get typing errors.
    """

    dataset: str | None = None
    typos: bool = False


@dataclass(frozen=True)
class TaskPreset:
    """One task of an experiment.

    Args:
        name: name of the task, of its folder in a data folder, and of its column in the table.
        dataset: hub id or built-in name, for runs without a data folder.
        task: a key of `sparse_optim.finetune.tasks.TASKS`.
        metric: reported metric, between 0 and 1, higher is better (printed in percent).
        max_length: maximum number of tokens of an example.
        config: configuration of the hub set.
        split: split that runs evaluate on; None holds out a part of train.
        further_splits: column of the table -> further split to evaluate on.
        shifts: column of the table -> shifted test set, for `--shifted`; never trained on, and not
            in the average.
        epochs: passes over the training examples. steps: optimizer steps instead.
        eval_every: steps between evaluations (None: only at the end, to use the split once).
        batch_size: examples in a step.
        lr_factor: multiplies the learning rates of all rows.
        columns: columns of the table, if they are not the task and its further splits.
        seconds: a first guess of the time of a cell, for `--dry-run`; None if there is none.
    """

    name: str
    dataset: str
    task: str
    metric: str
    max_length: int
    config: str | None = None
    split: str | None = "validation"
    further_splits: Mapping[str, str] = field(default_factory=dict)
    shifts: Mapping[str, Shift] = field(default_factory=dict)
    epochs: float = 3.0
    steps: int | None = None
    eval_every: int | None = None
    batch_size: int = 16
    lr_factor: float = 1.0
    columns: tuple[str, ...] = ()
    seconds: float | None = None

    @property
    def table_columns(self) -> tuple[str, ...]:
        """Columns of the table that this task fills."""
        return self.columns or (self.name, *self.further_splits, *self.shifts)


@dataclass(frozen=True)
class Row:
    """One way to fine-tune: a row of the table.

    Args:
        method: a key of `sparse_optim.methods.METHODS`.
        lrs: learning rates to try.
        budget: entries or a share, as `--budget` reads it; "" for methods without a budget.
        adapter, rank: additive modules to train instead of the model's own parameters.
        settings: further fields of `FinetuneConfig`.
        variant: a few characters that distinguish rows with the same method and budget.
    """

    method: str
    lrs: tuple[float, ...]
    budget: str = ""
    adapter: str | None = None
    rank: int | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    variant: str = ""

    @property
    def name(self) -> str:
        """The name for users: 'id3', 'id3@exp=2', 'lora-r8' (trained whole), 'id3+lora-r8'."""
        name = self.method
        if self.adapter is not None:
            adapter = f"{self.adapter}-r{self.rank}"
            name = adapter if name == "full" else f"{name}+{adapter}"
        return f"{name}@{self.variant}" if self.variant else name

    @property
    def label(self) -> str:
        """Name and budget."""
        return f"{self.name}-{self.budget}" if self.budget else self.name

    def changed(self, variant: str, **settings: Any) -> Row:
        """This row with other settings, under the name 'METHOD@VARIANT'."""
        return replace(self, settings={**self.settings, **settings}, variant=variant)


@dataclass(frozen=True)
class Block:
    """Tasks, and the rows to fill for all of them; a block is run before the next."""

    tasks: tuple[TaskPreset, ...]
    rows: tuple[Row, ...]


PaperTable = Mapping[str, Mapping[str, float]]  # label of a row -> column -> per cent


@dataclass(frozen=True)
class Experiment:
    """A table to fill.

    Args:
        name: name of the command. title: title of the table. about: description for the help.
        model: built-in name, folder or hub id.
        blocks: the parts of the table, the most important first.
        seeds: for "grid" one for each learning rate, for "tuned" one for each run.
        protocol: "grid": one run for each learning rate; the best `kept` are averaged. "tuned": one
            run for each learning rate on a part of train (the first seed) chooses the rate; then
            one run for each seed, all averaged.
        widen: for "tuned": factor from an end of a row's rates to the next one, tried while the
            best rate is at that end; 0: only the row's own rates.
        settings: further fields of `FinetuneConfig`, for all runs.
        paper: the paper's figures. paper_note: where the paper has them, or why there are none.
        averaged: columns of the average, where they have values; else all that have.
        pictures: keys of `sparse_optim.experiments.pictures.PICTURES`, drawn beside the table.
    """

    name: str
    title: str
    about: str
    model: str
    blocks: tuple[Block, ...]
    seeds: tuple[int, ...]
    protocol: str
    kept: int
    settings: Mapping[str, Any] = field(default_factory=dict)
    paper: PaperTable = field(default_factory=dict)
    paper_note: str = ""
    averaged: tuple[str, ...] = ()
    pictures: tuple[str, ...] = ("pareto",)
    widen: float = 0

    @property
    def tasks(self) -> tuple[TaskPreset, ...]:
        """The tasks of all blocks, each once."""
        return tuple({task.name: task for block in self.blocks for task in block.tasks}.values())

    @property
    def rows(self) -> tuple[Row, ...]:
        """The rows of all blocks, each once."""
        return tuple({row.label: row for block in self.blocks for row in block.rows}.values())

    @property
    def columns(self) -> tuple[str, ...]:
        """Columns of the table, in order."""
        return tuple(column for task in self.tasks for column in task.table_columns)

    @property
    def shifted_columns(self) -> frozenset[str]:
        """The columns of shifted test sets."""
        return frozenset(column for task in self.tasks for column in task.shifts)

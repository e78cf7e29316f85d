"""Run the cells of an experiment that are not finished yet."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from transformers import TrainerCallback

from sparse_optim.delta import save_delta
from sparse_optim.experiments.cells import (
    Cell,
    CellStore,
    Outcome,
    check_same,
    differing_settings,
)
from sparse_optim.experiments.forgetting import GLUE, STSB, score_name, score_of
from sparse_optim.experiments.machine import machine
from sparse_optim.experiments.model_cache import ModelCache
from sparse_optim.experiments.plan import cells
from sparse_optim.experiments.presets import Experiment, ExperimentError, Row, TaskPreset
from sparse_optim.experiments.shifts import measure_shifts
from sparse_optim.finetune.builtin_data import DATASETS
from sparse_optim.finetune.config import FinetuneConfig, parse_budget
from sparse_optim.finetune.errors import FinetuneError
from sparse_optim.finetune.inputs import Inputs, load_inputs
from sparse_optim.finetune.job import Trained, train_model, write_results
from sparse_optim.finetune.models import set_threads
from sparse_optim.finetune.output import DELTA_FILE
from sparse_optim.finetune.report import jsonable
from sparse_optim.version import __version__

# Share of train that tuning cells are evaluated on; the split of the runs stays unseen.
HELD_OUT = 0.1

AT_THE_END = 10**9  # steps between evaluations, more than any run has

# Fields of the configuration that decide what is loaded and tokenised.
DATA_FIELDS = (
    *("model", "dataset", "dataset_config", "task", "train_split", "eval_split", "eval_fraction"),
    *("max_train_examples", "max_eval_examples", "max_length", "packing", "chat"),
    *("max_target_length", "source_prefix", "num_beams"),
)


@dataclass(frozen=True)
class Decoding:
    """Settings for the answers of a language model: 4 beams (LLM-Adapters), length of Table 7b."""

    beams: int = 4
    new_tokens: int = 256


@dataclass(frozen=True)
class RunOptions:
    """A user's settings for a run of an experiment.

    Args:
        output: folder for cells and table.
        data_folder: folder with the tasks' data; None: the hub.
        limit: maximum number of examples of each split.
        eval_limit: maximum number of examples of each evaluation (default: limit).
        max_minutes: start no cell that would end later, judged by the cells so far.
        only: run only cells with one of these in their names.
        shifted: also test each run on the shifted sets of its task.
        forgetting: also measure what each run has lost: see `sparse_optim.experiments.forgetting`.
        keep: also write delta, metrics and curves of each run.
        decoding: settings for answers, for tasks that have them.
        extra: further fields of `FinetuneConfig`, which override the experiment's.
    """

    output: Path
    data_folder: Path | None = None
    limit: int | None = None
    eval_limit: int | None = None
    max_minutes: float | None = None
    only: tuple[str, ...] = ()
    shifted: bool = False
    forgetting: bool = False
    keep: bool = False
    decoding: Decoding = Decoding()
    extra: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        """Check the numbers of examples."""
        for option, most in (("--limit", self.limit), ("--eval-limit", self.eval_limit)):
            if most is not None and most < 1:
                raise ExperimentError(f"{option} must be at least 1 example, got {most}")


class Watcher(TrainerCallback):
    """Measures a model while it is trained.

    Attributes:
        rows: for each measurement its step, and the values by column.
    """

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []


Resolve = Callable[[TaskPreset, RunOptions], str]
Measure = Callable[[FinetuneConfig, Inputs, Trained, TaskPreset, RunOptions], dict[str, Any]]
Watch = Callable[[FinetuneConfig, Inputs, TaskPreset, RunOptions], Watcher]


def locate(task: TaskPreset, options: RunOptions) -> str:
    """The task's data set: its folder in the data folder, or the built-in name or hub id.

    Raises:
        ExperimentError: the folder of a set that is not built in is missing; lists the folders.
    """
    if options.data_folder is None:
        return task.dataset
    folder = options.data_folder / task.name
    if not folder.is_dir():
        if task.dataset in DATASETS:
            return task.dataset
        there = sorted(path.name for path in options.data_folder.glob("*") if path.is_dir())
        raise ExperimentError(
            f"--data-folder: {folder} is missing; a task's folder holds train.jsonl and "
            f"{task.split}.jsonl in the hub's columns (folders there: {', '.join(there) or 'none'})"
        )
    return str(folder)


def measure_splits(
    config: FinetuneConfig,
    inputs: Inputs,
    trained: Trained,
    task: TaskPreset,
    options: RunOptions,
) -> dict[str, Any]:
    """The task's metric on its split, its further splits and, if asked for, shifted test sets."""
    values = {task.name: trained.metrics["metric"]["value"]}
    for column, split in task.further_splits.items():
        other = {"eval_split": split, "max_train_examples": 1}  # train has been read already
        further = load_inputs(FinetuneConfig(**{**vars(config), **other}))
        scores = trained.trainer.evaluate(further.eval_set)
        values[column] = scores[f"eval_{task.metric}"]
    return values | (measure_shifts(config, inputs, trained, task) if options.shifted else {})


class Runner:
    """Runs an experiment in one process; tokenised data and base models are kept between cells.

    Args:
        experiment: what to run.
        options: the user's settings.
        console: shows progress.
        resolve: returns the place of a task's data.
        measure: returns the values of a finished run, by column.
        watch: makes what measures a run while it is trained; None: nothing but the trainer does.
    """

    def __init__(
        self,
        experiment: Experiment,
        options: RunOptions,
        console: Console,
        resolve: Resolve = locate,
        measure: Measure = measure_splits,
        watch: Watch | None = None,
    ) -> None:
        self.experiment = experiment
        self.options = options
        self.console = console
        self.resolve = resolve
        self.measure = measure
        self.watch = watch
        self.store = CellStore(options.output / "cells.jsonl")
        self.load = ModelCache()
        self.inputs: tuple[Any, Inputs] | None = None
        self.base_scores: dict[tuple[str, str], float] = {}

    def wanted(self) -> Iterator[Cell]:
        """The cells that `--only` selects, in order."""
        for cell in cells(self.experiment, self.store.read):
            if not self.options.only or any(text in cell.name for text in self.options.only):
                yield cell

    def outcomes(self) -> list[Outcome]:
        """The outcomes of the finished cells."""
        found = (self.store.read(cell) for cell in self.wanted())
        return [outcome for outcome in found if outcome is not None]

    def finished(self, experiment: Experiment) -> list[Outcome]:
        """Outcomes of the cells of `experiment` that any process ran with this one's settings."""
        found = ((cell, self.store.read(cell)) for cell in cells(experiment, self.store.read))
        return [outcome for cell, outcome in found if outcome and self.is_alike(cell, outcome)]

    def is_alike(self, cell: Cell, outcome: Outcome) -> bool:
        """Whether a finished cell would run with the same settings now."""
        try:
            wanted = self.settings(cell, self.config(cell))
        except ExperimentError:  # its data is not here
            return False
        return not differing_settings(outcome["config"], wanted)

    def run(self) -> Iterator[Outcome]:
        """Run the unfinished cells until none is left or time is up; yield each outcome.

        Raises:
            FinetuneError: a cell failed; the message has its name. Finished cells are kept.
        """
        set_threads((self.options.extra or {}).get("threads"))
        begin, planned = time.perf_counter(), len(list(self.wanted()))
        for position, cell in enumerate(self.wanted(), 1):
            if cell.lr is None:
                raise ExperimentError(f"--only leaves out the tuning of {cell.name}: add it")
            config = self.config(cell)
            stored = self.store.read(cell)
            if stored is not None:
                check_same(cell, stored["config"], self.settings(cell, config))
                continue
            minutes = (time.perf_counter() - begin + (self.estimates()[cell.task.name] or 0.0)) / 60
            if self.options.max_minutes is not None and minutes > self.options.max_minutes:
                return
            outcome = self.run_cell(cell, config)
            self.store.write(cell, outcome)
            self.show(cell, outcome, f"{position}/{max(position, planned)}")
            yield outcome

    def is_finished(self) -> bool:
        """Whether all cells are finished."""
        return all(self.store.read(cell) is not None for cell in self.wanted())

    def show(self, cell: Cell, outcome: Outcome, position: str) -> None:
        """Print one line for a finished cell."""
        values = ", ".join(f"{name} {percent(value)}" for name, value in outcome["values"].items())
        self.console.print(
            f"{position}  {cell.name}: {values}  ({outcome['seconds']:.0f} s)",
            highlight=False,
            soft_wrap=True,
        )

    def run_cell(self, cell: Cell, config: FinetuneConfig) -> Outcome:
        """Train and measure; return the outcome without writing it."""
        begin = time.perf_counter()
        try:
            inputs = self.inputs_of(config)
            further: dict[str, Any] = {}
            with tempfile.TemporaryDirectory() as scratch:
                config = FinetuneConfig(**{**vars(config), "output": Path(scratch) / "run"})
                watchers = self.watchers(cell, config, inputs)
                trained = train_model(config, inputs, None, self.load, callbacks=watchers)
                if cell.stage == "tune":
                    values = {cell.task.name: trained.metrics["metric"]["value"]}
                else:
                    values = self.measure(config, inputs, trained, cell.task, self.options)
                    further = self.further(config, inputs, trained, cell.task, Path(scratch))
            if self.options.keep and cell.stage == "run":
                folder = self.options.output / "runs" / cell.name
                kept = FinetuneConfig(**{**vars(config), "output": folder})
                write_results(kept, inputs, trained)
        except FinetuneError as error:
            raise ExperimentError(f"cell {cell.name}: {error}") from error
        seconds = time.perf_counter() - begin
        outcome = describe(cell, self.settings(cell, config), trained, values, seconds) | further
        for watcher in watchers:
            outcome["evaluations"] += [*watcher.rows, {"step": outcome["steps"], **values}]
        return outcome

    def further(
        self,
        config: FinetuneConfig,
        inputs: Inputs,
        trained: Trained,
        task: TaskPreset,
        scratch: Path,
    ) -> dict[str, Any]:
        """The size of the run's delta and, if asked for, what the model has lost."""
        save_delta(trained.trainer.delta(), scratch / DELTA_FILE)
        found: dict[str, Any] = {"delta_bytes": (scratch / DELTA_FILE).stat().st_size}
        name = score_name(task) if self.options.forgetting else None
        if name is not None:
            measure, key = score_of(task, self.stsb()), (config.model, name)
            if key not in self.base_scores:
                base = self.load(inputs.source, trained.spec, inputs.tokenizer)
                self.base_scores[key] = measure(base.model, inputs.tokenizer)
            after = measure(trained.loaded.model, inputs.tokenizer)
            before = self.base_scores[key]
            found["forgetting"] = {"score": name, "before": before, "after": after}
        return found

    def stsb(self) -> str:
        """Where STS-B is."""
        folder = self.options.data_folder
        return GLUE if folder is None else str(folder / STSB)

    def watchers(self, cell: Cell, config: FinetuneConfig, inputs: Inputs) -> list[Watcher]:
        """What measures the run of a cell while it is trained."""
        if self.watch is None or cell.stage == "tune" or cell.task.eval_every is None:
            return []
        return [self.watch(config, inputs, cell.task, self.options)]

    def settings(self, cell: Cell, config: FinetuneConfig) -> dict[str, Any]:
        """The settings that affect a cell's result: not those of the machine and the output."""
        places = ("output", "overwrite", "verify", "save_model", "report_to", "cpu", "threads")
        kept = {name: jsonable(value) for name, value in vars(config).items() if name not in places}
        if self.options.data_folder is not None:  # wherever that folder is
            kept["dataset"] = config.dataset.removeprefix(f"{self.options.data_folder}/")
        if self.options.shifted and cell.task.shifts and cell.stage == "run":
            kept["shifted"] = True  # not otherwise: a cell with more values will do
        if self.options.forgetting and score_name(cell.task) and cell.stage == "run":
            kept["forgetting"] = True
        return kept | vars(self.options.decoding)

    def inputs_of(self, config: FinetuneConfig) -> Inputs:
        """Tokenised data, kept while the cells use the same."""
        key = tuple(getattr(config, name) for name in DATA_FIELDS)
        if self.inputs is None or self.inputs[0] != key:
            self.inputs = (key, load_inputs(config))
        return self.inputs[1]

    def config(self, cell: Cell) -> FinetuneConfig:
        """The fine-tuning job of a cell."""
        task, row = cell.task, cell.row
        dataset = self.resolve(task, self.options)
        held_out = cell.stage == "tune" or task.split is None
        settings = {
            "model": self.experiment.model,
            "dataset": dataset,
            "dataset_config": task.config if dataset == task.dataset else None,
            "output": self.options.output / "runs" / cell.name,
            "method": row.method,
            "task": task.task,
            "metric": task.metric,
            "eval_split": None if held_out else task.split,
            "eval_fraction": HELD_OUT if held_out else None,
            "eval_every": task.eval_every or AT_THE_END,
            "max_train_examples": self.options.limit,
            "max_eval_examples": (
                self.options.limit if self.options.eval_limit is None else self.options.eval_limit
            ),
            "max_length": task.max_length,
            "steps": task.steps,
            "epochs": task.epochs,
            "batch_size": task.batch_size,
            "lr": cell.lr,
            "seed": cell.seed,
            "rank": "all",  # as the paper's ID3, like the next two
            "unmask_share": 1.0,
            "every": 1,
            **({"budget": parse_budget(row.budget)} if row.budget else {}),
            **adapter_settings(row),
            **self.experiment.settings,
            **row.settings,
            **(self.options.extra or {}),
        }
        return FinetuneConfig(**settings)

    def estimates(self) -> dict[str, float | None]:
        """Seconds of a cell by task: the median of the finished ones, else the preset's."""
        outcomes = self.outcomes()

        def seconds(task: TaskPreset) -> float | None:
            found = [one["seconds"] for one in outcomes if one["cell"]["task"] == task.name]
            return statistics.median(found) if found else task.seconds

        return {task.name: seconds(task) for task in self.experiment.tasks}


def adapter_settings(row: Row) -> dict[str, Any]:
    """Fields of `FinetuneConfig` that add an adapter."""
    return {"adapter": row.adapter, "adapter_rank": row.rank} if row.adapter else {}


def describe(
    cell: Cell,
    settings: Mapping[str, Any],
    trained: Trained,
    values: Mapping[str, Any],
    seconds: float,
) -> Outcome:
    """Build the record of a finished cell."""
    metrics = trained.metrics
    kept = ("steps", "active_entries", "state_bytes", "step_ms", "update_ms", "train_seconds")
    return {
        "cell": {
            "task": cell.task.name,
            "row": cell.row.label,
            "stage": cell.stage,
            "lr": cell.lr,
            "seed": cell.seed,
        },
        "values": dict(values),
        **{name: metrics[name] for name in kept},
        "fresh_entries": metrics["model"]["fresh_entries"],
        "parameters": metrics["model"]["parameters"],
        "seconds": seconds,
        "evaluations": list(metrics["evaluations"]),
        "config": dict(settings),
        "versions": {**metrics["versions"], "sparse_optim": __version__},
        "device": metrics["device"],
        "machine": machine(),
    }


def percent(value: float | None) -> str:
    """A share as the papers print it."""
    return "diverged" if value is None else f"{100 * value:.2f}"

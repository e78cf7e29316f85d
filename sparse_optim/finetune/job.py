"""Run a fine-tuning job: load, train, evaluate, and write the delta, metrics and a plot."""

from __future__ import annotations

import dataclasses
import logging
import shutil
import tempfile
import time
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn
from transformers import (
    TrainerCallback,
)

from sparse_optim.delta import Delta, apply_delta, load_delta, save_delta
from sparse_optim.files import replacing
from sparse_optim.finetune import processes
from sparse_optim.finetune.adapters import save_adapter
from sparse_optim.finetune.auto_rate import with_rate
from sparse_optim.finetune.best import Evaluated
from sparse_optim.finetune.build import LoadModel, hash_weights
from sparse_optim.finetune.card import load_adapter, load_folder, load_run, write_card
from sparse_optim.finetune.checkpoints import (
    ManifestWriter,
    check_inputs,
    find_last,
    hash_examples,
)
from sparse_optim.finetune.config import LAST, FinetuneConfig
from sparse_optim.finetune.config_file import CONFIG_FILE, write_config
from sparse_optim.finetune.data import TaskData
from sparse_optim.finetune.defaults import resolved
from sparse_optim.finetune.errors import FinetuneError
from sparse_optim.finetune.inputs import Inputs, load_base, load_inputs
from sparse_optim.finetune.models import (
    LoadedModel,
    check_lengths,
    load_base_model,
    set_threads,
)
from sparse_optim.finetune.output import (
    ADAPTER_FOLDER,
    CHECKPOINTS,
    DELTA_FILE,
    METRICS_FILE,
    MODEL_FOLDER,
    PLOT_FILE,
    SERIES_FOLDER,
    check_output,
    locked,
    replaced_results,
)
from sparse_optim.finetune.packing import check_packing
from sparse_optim.finetune.plots import draw_curves
from sparse_optim.finetune.progress import Announcer, ConsoleProgress, tell
from sparse_optim.finetune.push import check_login, push_to_hub
from sparse_optim.finetune.report import collect, write_json
from sparse_optim.finetune.reuse import Tuned, write_model
from sparse_optim.finetune.series import write_series
from sparse_optim.finetune.spec import KEY, ModelSpec, spec_of
from sparse_optim.finetune.stopping import Stopper
from sparse_optim.finetune.trainer import JobTrainer
from sparse_optim.finetune.trainer_setup import make_trainer
from sparse_optim.finetune.validate import (
    check_machine,
    check_method,
    check_schedule,
    check_tracker,
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class FinetuneResult:
    """The result of a job: metrics (as in metrics.json), output folder, and trained model."""

    metrics: dict[str, Any]
    output: Path
    model: nn.Module

    def __repr__(self) -> str:
        """Short, for a notebook: the metrics are long, and so is the model."""
        metric, entries = self.metrics["metric"], self.metrics["active_entries"]
        return (
            f"FinetuneResult(output={str(self.output)!r}, {metric['name']}={metric['value']:.4f}, "
            f"entries={entries:,})"
        )


def run(
    config: FinetuneConfig, console: Console | None = None, data: TaskData | None = None
) -> FinetuneResult:
    """Fine-tune; write delta, metrics, config.yaml, curves.png, allocation.jsonl, and the adapter.

    Args:
        config: the job.
        console: shows progress; None: no progress is shown.
        data: the job's data, if it is loaded already.

    Under torchrun all processes train, and the first one writes and shows progress.

    Raises:
        FinetuneError: wrong input, in one line.
    """
    check_method(config)
    check_tracker(config.report_to)
    check_schedule(config)
    check_machine(config)
    if config.push_to_hub is not None:
        check_login(config.push_to_hub)
    if config.resume == LAST:
        last = find_last(config.output / CHECKPOINTS, config)
        config = dataclasses.replace(config, resume=last)
    is_first = processes.is_first()
    with locked(config.output) if is_first else nullcontext():
        if is_first:
            check_output(config)
        set_threads(config.threads)
        inputs = load_inputs(config, data)
        for line in inputs.notes if is_first else ():
            tell(console, line)
        config = with_rate(config, inputs, console)
        trained = train_model(config, inputs, console if is_first else None, stops=True)
        processes.leave()
        if not is_first:
            return FinetuneResult(trained.metrics, config.output, trained.loaded.model)
        try:
            result = write_results(config, inputs, trained)
        except FinetuneError:  # the results are there, and the message says what is wrong
            raise
        except Exception as error:  # a full disk is an OSError, a SafetensorError or a RuntimeError
            raise rescue(config, inputs, trained, error) from error
    if config.push_to_hub is not None:
        try:
            tell(console, f"uploaded to {push_to_hub(config.output, config.push_to_hub)}")
        except FinetuneError as error:
            raise FinetuneError(f"the results are in {config.output}, but {error}") from error
    return result


@dataclass(frozen=True)
class Trained:
    """A trained model in memory, before anything is written."""

    loaded: LoadedModel
    trainer: JobTrainer
    seconds: float
    metrics: dict[str, Any]
    spec: ModelSpec


def train_model(
    config: FinetuneConfig,
    inputs: Inputs,
    console: Console | None,
    load: LoadModel = load_base_model,
    *,
    callbacks: Iterable[TrainerCallback] = (),
    stops: bool = False,
) -> Trained:
    """Train and evaluate.

    Args:
        load: may take the base model from memory.
        callbacks: added to the trainer.
        stops: whether Ctrl-C and SIGTERM save a checkpoint before they stop the training.
    """
    check_method(config)
    loaded = load_base(config, inputs, load)
    check_lengths(loaded.model, inputs.longest, inputs.lengths.targets)
    weights = hash_weights(loaded.model, without=loaded.fresh)
    trainer = make_trainer(config, inputs, loaded)
    for callback in callbacks:
        trainer.add_callback(callback)
    if config.packing:
        check_packing(loaded.model)
    metric = inputs.task.check_metric(config.metric)
    keeps = trainer.best is not None or trainer.series is not None
    stopper = Stopper(partial(tell, console), evaluates=keeps)
    if stops:
        hashes = {
            "base model": hash_weights(loaded.model),
            "set of training examples": hash_examples(inputs.train_set),
        }
        if config.resume is not None:
            check_inputs(config.resume, hashes)
            if trainer.best is not None:
                trainer.best.restore(config.resume)
            if trainer.series is not None:
                trainer.series.restore(config.resume)
        trainer.add_callback(ManifestWriter(config, hashes))
        trainer.add_callback(stopper)
    with stopper.listening() if stops else nullcontext():
        seconds = train(trainer, config, metric, console)
    stopper.check(trainer.state.global_step, trainer.state.max_steps)
    if trainer.best is not None:
        if console is not None:  # the metrics have it, too
            tell(console, trainer.best.describe())
        kept = trainer.best.kept
        if kept is not None and kept.step != trainer.state.global_step:
            restore_best(loaded.model, kept, load_base(config, inputs, load).model)
    about = (inputs.data, inputs.lengths, inputs.counts)
    metrics = collect(config, trainer, *about, loaded, metric)
    spec = dataclasses.replace(spec_of(config, inputs.data, inputs.lengths), weights=weights)
    return Trained(loaded, trainer, seconds, metrics | {"train_seconds": seconds}, spec)


def write_results(config: FinetuneConfig, inputs: Inputs, trained: Trained) -> FinetuneResult:
    """Write delta, metrics and plot, and check that base + delta is the trained model."""
    with replaced_results(config.output) as folder:
        delta_path = folder / DELTA_FILE
        describe = partial(describe_delta, config=config, spec=trained.spec)
        delta = describe(trained.trainer.delta())
        save_delta(delta, delta_path, unmask_steps=config.store_steps)
        metrics = trained.metrics | {"delta_bytes": delta_path.stat().st_size, "verified": None}
        if trained.trainer.series is not None:
            members = trained.trainer.series.members
            metrics["series"] = write_series(members, folder / SERIES_FOLDER, describe)
        settings, spec, model = resolved(config), trained.spec, trained.loaded.model
        write_config(settings, folder / CONFIG_FILE, config.output / CONFIG_FILE)
        card = partial(write_card, spec=spec, config=settings, metrics=metrics)
        card(folder, load_run(str(config.output)))
        if config.adapter is not None:
            place = ADAPTER_FOLDER
            save_adapter(model, folder / place)
            card(folder / place, load_adapter(str(config.output / place), spec, model))
        if config.save_model:
            place = MODEL_FOLDER
            write_model(Tuned(model, inputs.tokenizer, spec), folder / place)
            card(folder / place, load_folder(str(config.output / place), spec, model))
        trained.trainer.recorder.save(folder, config.method, metrics["metric"]["name"])
        try:
            draw_curves(metrics, folder / PLOT_FILE)
        except Exception:  # a picture is no reason to lose the results
            logger.exception("%s was not drawn", PLOT_FILE)
        metrics["files"] = sorted([METRICS_FILE, *(path.name for path in folder.iterdir())])
        write_json(metrics, folder / METRICS_FILE)
    if not config.verify:
        return FinetuneResult(metrics, config.output, trained.loaded.model)
    try:
        base = load_base(config, inputs)
        differing = differing_tensors(base.model, trained.loaded.model, config.output / DELTA_FILE)
    except Exception as error:
        raise FinetuneError(
            f"the results are in {config.output}, but base + delta could not be checked: "
            f"{' '.join(str(error).split())}"
        ) from error
    metrics["verified"] = not differing
    with replacing(config.output / METRICS_FILE) as temporary:
        write_json(metrics, temporary)
    if differing:
        raise FinetuneError(
            f"base + {config.output / DELTA_FILE} is not the trained model: "
            f"{', '.join(differing[:3])} differ"
        )
    return FinetuneResult(metrics, config.output, trained.loaded.model)


def rescue(
    config: FinetuneConfig, inputs: Inputs, trained: Trained, error: Exception
) -> FinetuneError:
    """Write the results of a finished training elsewhere; the error that says where."""
    reason = getattr(error, "strerror", None) or " ".join(str(error).split())
    problem = f"--output: {config.output} cannot be written ({reason})"
    for place in (tempfile.gettempdir, Path.home):
        folder = None
        try:
            folder = Path(tempfile.mkdtemp(prefix="sparse-optim-", dir=place()))
            write_results(dataclasses.replace(config, output=folder), inputs, trained)
        except FinetuneError as failure:
            return FinetuneError(f"{problem}; the results are in {folder}, but {failure}")
        except Exception:  # the next place may do
            if folder is not None:
                shutil.rmtree(folder, ignore_errors=True)
            continue
        return FinetuneError(f"{problem}; the results are in {folder}")
    return FinetuneError(f"{problem}, nor can the folder for temporary files or your home folder")


def train(
    trainer: JobTrainer, config: FinetuneConfig, metric: str, console: Console | None
) -> float:
    """Train, evaluate at the end, and return the seconds that took."""
    progress = None
    if console is not None:
        trainer.add_callback(Announcer(console))
        progress = ConsoleProgress(console, metric, config.method)
        trainer.add_callback(progress)
    begin = time.perf_counter()
    try:
        trainer.train(resume_from_checkpoint=str(config.resume) if config.resume else None)
        stopped = trainer.state.global_step < trainer.state.max_steps
        if not stopped and evaluated_at(trainer) != trainer.state.global_step:
            trainer.evaluate()
    finally:
        if progress is not None:
            progress.stop()
    return time.perf_counter() - begin


def restore_best(model: nn.Module, kept: Evaluated, base: nn.Module) -> None:
    """Write the model of the best evaluation into a trained one.

    Args:
        model: Mutated.
        base: the base model. Mutated.
    """
    apply_delta(base, kept.delta)
    model.load_state_dict(base.state_dict())


def evaluated_at(trainer: JobTrainer) -> float | None:
    """The step of the last evaluation."""
    steps = [row["step"] for row in trainer.state.log_history if "eval_loss" in row]
    return steps[-1] if steps else None


def describe_delta(delta: Delta, config: FinetuneConfig, spec: ModelSpec) -> Delta:
    """The delta with a note of method, data and how to build the model."""
    note = {"name": config.method, "dataset": config.dataset}
    model = {KEY: spec.note()}
    return dataclasses.replace(delta, method={**note, **delta.method, **model})


def differing_tensors(base: nn.Module, trained: nn.Module, delta_path: Path) -> list[str]:
    """Apply the delta file to a newly loaded base; return the names of tensors that differ."""
    apply_delta(base, load_delta(delta_path))
    rebuilt, expected = base.state_dict(), trained.state_dict()
    if rebuilt.keys() != expected.keys():
        return sorted(rebuilt.keys() ^ expected.keys())
    return [name for name in expected if not same_bits(rebuilt[name], expected[name])]


def same_bits(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Whether two tensors agree in shape, dtype and every bit (NaN and signed zeros included)."""
    if first.shape != second.shape or first.dtype != second.dtype:
        return False
    pair = (tensor.detach().cpu().contiguous().view(-1) for tensor in (first, second))
    return torch.equal(*(tensor.view(torch.uint8) for tensor in pair))

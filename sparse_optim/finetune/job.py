"""Run a fine-tuning job: load, train, evaluate, and write the delta, metrics and a plot."""

from __future__ import annotations

import dataclasses
import logging
import math
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from rich.console import Console
from torch import nn
from transformers import (
    PreTrainedTokenizerBase,
    PrinterCallback,
    TrainerCallback,
    TrainingArguments,
)
from transformers.integrations.integration_utils import TensorBoardCallback, default_logdir

from sparse_optim.delta import Delta, apply_delta, load_delta, save_delta
from sparse_optim.files import replacing
from sparse_optim.finetune import processes
from sparse_optim.finetune.adapters import save_adapter
from sparse_optim.finetune.auto_rate import find_rate
from sparse_optim.finetune.best import Evaluated
from sparse_optim.finetune.build import LoadModel, build, hash_weights
from sparse_optim.finetune.card import load_adapter, load_folder, load_run, write_card
from sparse_optim.finetune.checkpoints import (
    ManifestWriter,
    check_inputs,
    find_last,
    hash_examples,
    saved_rate,
)
from sparse_optim.finetune.config import AUTO, LAST, FinetuneConfig
from sparse_optim.finetune.config_file import CONFIG_FILE, write_config
from sparse_optim.finetune.data import TaskData, load_data
from sparse_optim.finetune.defaults import learning_rate, resolved
from sparse_optim.finetune.encode import Lengths
from sparse_optim.finetune.errors import FinetuneError
from sparse_optim.finetune.models import (
    LoadedModel,
    ModelSource,
    check_lengths,
    find_model,
    load_base_model,
    load_tokenizer,
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
from sparse_optim.finetune.prepare import prepare
from sparse_optim.finetune.progress import Announcer, ConsoleProgress
from sparse_optim.finetune.push import check_login, push_to_hub
from sparse_optim.finetune.report import collect, write_json
from sparse_optim.finetune.request import data_request
from sparse_optim.finetune.reuse import Tuned, write_model
from sparse_optim.finetune.series import write_series
from sparse_optim.finetune.spec import KEY, ModelSpec, spec_of
from sparse_optim.finetune.stopping import Stopper
from sparse_optim.finetune.tasks import TASKS, Task
from sparse_optim.finetune.trainer import JobTrainer, WritingTrainer, arguments_class
from sparse_optim.finetune.validate import (
    check_machine,
    check_method,
    check_schedule,
    check_tracker,
)
from sparse_optim.methods import METHODS, MethodRequest
from sparse_optim.policy.schedule import SCHEDULES

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
class Inputs:
    """The tokenised data of a job; jobs that differ in method, rate or seed share it.

    Attributes:
        train_set, eval_set, lengths, longest, counts, notes: see `Prepared`.
    """

    source: ModelSource
    data: TaskData
    task: Task
    tokenizer: PreTrainedTokenizerBase
    train_set: Dataset
    eval_set: Dataset
    lengths: Lengths
    longest: int
    counts: dict[str, Any]
    notes: tuple[str, ...]


def load_inputs(config: FinetuneConfig, data: TaskData | None = None) -> Inputs:
    """Find the model, load and tokenise the data.

    Args:
        data: the data, if it is loaded already.

    Raises:
        FinetuneError: wrong input, in one line.
    """
    source = find_model(config.model)
    data = data or load_data(data_request(config))
    task = TASKS[data.task]
    task.check_metric(config.metric, data.label_names)
    tokenizer = load_tokenizer(source)
    prepared = prepare(data, tokenizer, config, source)
    return Inputs(source, data, task, tokenizer, **vars(prepared))


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
        save_delta(describe(trained.trainer.delta()), delta_path)
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


def load_base(
    config: FinetuneConfig, inputs: Inputs, load: LoadModel = load_base_model
) -> LoadedModel:
    """Load the model that the job begins with; a second call returns the same model."""
    spec = spec_of(config, inputs.data, inputs.lengths)
    return build(inputs.source, spec, inputs.tokenizer, load)


def make_trainer(config: FinetuneConfig, inputs: Inputs, loaded: LoadedModel) -> JobTrainer:
    """Make the trainer for the tokenised examples."""
    task, names = inputs.task, inputs.data.label_names or []
    if config.gradient_checkpointing and not loaded.model.supports_gradient_checkpointing:
        raise FinetuneError(
            f"--gradient-checkpointing: {type(loaded.model).__name__} does not support it: drop it"
        )
    trainer = (WritingTrainer if task.writes else JobTrainer)(
        partial(build_optimizer, config, loaded),
        averages_tokens=inputs.data.task == "causal-lm",
        model=loaded.model,
        args=training_arguments(config, task, len(inputs.train_set)),
        train_dataset=inputs.train_set,
        eval_dataset=inputs.eval_set,
        processing_class=inputs.tokenizer,
        data_collator=task.collator(inputs.tokenizer, loaded.model),
        compute_metrics=task.scores(inputs.tokenizer, names),
        preprocess_logits_for_metrics=task.preprocess_logits,
    )
    trainer.remove_callback(PrinterCallback)
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, TensorBoardCallback) and callback.logging_dir is None:
            # Where people look: the Trainer would take the folder of the checkpoints.
            callback.logging_dir = str(config.output / default_logdir())
    if config.series is not None:
        trainer.keep_series(config.series, task.check_metric(config.metric))
    if config.keeps_best:
        trainer.keep_best(task.check_metric(config.metric), config.patience)
    return trainer


def training_arguments(config: FinetuneConfig, task: Task, train_size: int) -> TrainingArguments:
    """Arguments of the Trainer, which must not clip if the optimizer already does."""
    method = METHODS[config.method]
    per_step = config.batch_size * config.accumulation * processes.count()
    steps = config.steps or max(1, math.ceil(train_size / per_step * config.epochs))
    return arguments_class(task)(
        output_dir=str(config.output / CHECKPOINTS),
        max_steps=config.steps or -1,
        num_train_epochs=config.epochs,
        per_device_train_batch_size=config.batch_size,
        per_device_eval_batch_size=config.eval_batch_size or task.eval_batch_size,
        gradient_accumulation_steps=config.accumulation,
        learning_rate=learning_rate(config),
        lr_scheduler_type=config.schedule,
        warmup_steps=config.warmup,
        weight_decay=config.weight_decay,
        max_grad_norm=0.0 if method.clips else config.max_grad_norm or 0.0,
        bf16=config.amp == "bf16",
        fp16=config.amp == "fp16",
        **recomputation(config),
        train_sampling_strategy="group_by_length" if config.group_by_length else "random",
        logging_steps=config.log_every or max(1, steps // 100),
        eval_strategy="steps",
        eval_steps=config.eval_every or max(1, steps // 5),
        save_strategy="steps" if config.save_every else "no",
        save_steps=config.save_every or 500,
        seed=config.seed,
        use_cpu=config.cpu or not torch.cuda.is_available(),
        dataloader_pin_memory=torch.cuda.is_available() and not config.cpu,
        disable_tqdm=True,
        log_level_replica="passive",  # as the caller set it: "warning" would print on each process
        report_to=config.report_to,
    )


def recomputation(config: FinetuneConfig) -> dict[str, Any]:
    """The Trainer's arguments for gradient checkpointing."""
    if not config.gradient_checkpointing:
        return {}
    renamed = hasattr(TrainingArguments, "activation_checkpointing")  # the old names warn
    kind = "activation" if renamed else "gradient"
    # The reentrant kind gives no gradients behind frozen embeddings.
    options = {"use_reentrant": False}
    return {f"{kind}_checkpointing": True, f"{kind}_checkpointing_kwargs": options}


def build_optimizer(
    config: FinetuneConfig,
    loaded: LoadedModel,
    model: nn.Module,
    total_steps: int,
    batches: Callable[[], Iterable[Any]],
) -> torch.optim.Optimizer:
    """Build the optimizer of the method; turn its ValueError into a FinetuneError."""
    request = method_request(config, loaded, model, total_steps, batches)
    try:
        return METHODS[config.method].build(request)
    except ValueError as error:
        raise FinetuneError(str(error)) from error


def method_request(
    config: FinetuneConfig,
    loaded: LoadedModel,
    model: nn.Module,
    total_steps: int,
    batches: Callable[[], Iterable[Any]],
) -> MethodRequest:
    """The settings of the job as the methods take them."""
    named = [(name, param) for name, param in model.named_parameters() if param.requires_grad]
    method = METHODS[config.method]
    config = resolved(config)
    lr = config.lr if isinstance(config.lr, float) else 0.0  # auto: until it is found
    return MethodRequest(
        model=model,
        named=named,
        fresh=loaded.fresh,
        rank=config.rank,
        no_decay=frozenset(name for name, param in named if param.ndim < 2),
        lr=lr,
        head_lr=config.head_lr or lr,
        betas=(0.9, 0.999),
        adam_eps=config.adam_eps or method.adam_eps,
        weight_decay=config.weight_decay,
        budget=config.budget,
        total_steps=total_steps,
        d3_exp=config.d3_exp,
        d3_eps=config.d3_eps,
        schedule=SCHEDULES[config.unmask_schedule],
        unmask_share=config.unmask_share,
        bias_correction=config.bias_correction,
        sparse_score=config.sparse_score,
        fuse_backward=config.fuse_backward,
        every=config.every,
        sampled_backward=config.sampled_backward,
        max_grad_norm=config.max_grad_norm,
        backend=config.backend,
        calibration=batches,
        seed=config.seed,
    )


def with_rate(config: FinetuneConfig, inputs: Inputs, console: Console | None) -> FinetuneConfig:
    """The configuration with a number in place of `--lr auto`.

    Raises:
        FinetuneError: no rate follows from the curvature.
    """
    if config.lr != AUTO:
        return config
    if config.resume is not None:
        return dataclasses.replace(config, lr=saved_rate(config.resume))
    loaded = load_base(config, inputs)
    batches = make_trainer(config, inputs, loaded).get_train_dataloader()
    request = method_request(config, loaded, loaded.model, 1, lambda: batches)
    try:
        rate, sentence = find_rate(config.method, request, config.head_lr)
    except ValueError as error:
        raise FinetuneError(f"--lr auto: {error}") from error
    tell(console, sentence)
    return dataclasses.replace(config, lr=rate)


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


def tell(console: Console | None, line: str) -> None:
    """Show a line on the console, or log it; of several processes, the first."""
    if not processes.is_first():
        return
    if console is None:
        logger.warning(line)
    else:
        console.print(line, markup=False, highlight=False, soft_wrap=True)


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

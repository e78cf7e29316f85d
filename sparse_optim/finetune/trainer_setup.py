"""Make the trainer of a job, and the optimizer of its method."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import PrinterCallback, TrainingArguments
from transformers.integrations.integration_utils import TensorBoardCallback, default_logdir

from sparse_optim.finetune import processes
from sparse_optim.finetune.config import FinetuneConfig
from sparse_optim.finetune.defaults import learning_rate, resolved
from sparse_optim.finetune.errors import FinetuneError
from sparse_optim.finetune.inputs import Inputs
from sparse_optim.finetune.models import LoadedModel
from sparse_optim.finetune.output import CHECKPOINTS
from sparse_optim.finetune.tasks import Task
from sparse_optim.finetune.trainer import JobTrainer, WritingTrainer, arguments_class
from sparse_optim.methods import METHODS, MethodRequest
from sparse_optim.policy.defaults import RANK, UNMASK_SHARE
from sparse_optim.policy.schedule import SCHEDULES


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


def planned_steps(config: FinetuneConfig, train_size: int) -> int:
    """Optimizer steps of the whole run, before the Trainer counts them."""
    per_step = config.batch_size * config.accumulation * processes.count()
    return config.steps or max(1, math.ceil(train_size / per_step * config.epochs))


def training_arguments(config: FinetuneConfig, task: Task, train_size: int) -> TrainingArguments:
    """Arguments of the Trainer, which must not clip if the optimizer already does."""
    method, steps = METHODS[config.method], planned_steps(config, train_size)
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
        rank=config.rank or RANK,
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
        unmask_share=config.unmask_share or UNMASK_SHARE,
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

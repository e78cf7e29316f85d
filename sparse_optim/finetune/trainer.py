"""The Trainer of a job, which also measures the time of steps."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import (
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_utils import EvalLoopOutput

from sparse_optim.analysis.recorder import AllocationRecorder
from sparse_optim.delta import Delta
from sparse_optim.finetune.best import BestModel
from sparse_optim.finetune.readings import active_entries, budget_progress, make_delta
from sparse_optim.finetune.series_recorder import SeriesRecorder
from sparse_optim.finetune.stopping import EvaluationLeftOutError
from sparse_optim.finetune.tasks import Task
from sparse_optim.integrations.trainer import SelectiveTrainer
from sparse_optim.optim.grad_scaler import GradScaler

# model, total steps, function that gives training batches -> optimizer
BuildFromBatches = Callable[[nn.Module, int, Callable[[], Iterable[Any]]], torch.optim.Optimizer]

WARM_UP_STEPS = 3  # left out of the timings: allocation, first touch of memory


class JobTrainer(SelectiveTrainer):
    """Trainer of a job: logs active entries of any optimizer, measures time, keeps the best model.

    With fp16 autocast it scales the loss by our scaler: torch's reads every gradient once more, and
    does not find sampled ones. (Not yet run on a GPU; compared with an unscaled run on the CPU.)

    Args:
        build: (model, total steps, function that gives training batches) -> optimizer.
        averages_tokens: whether the model's loss is the mean over the tokens of all micro batches.
            The Trainer takes that from the signature of forward, and then does not divide the sum
            over micro batches and processes by their number: wrong for every loss over examples.
        arguments: keyword arguments of `Trainer`.
    """

    def __init__(self, build: BuildFromBatches, *, averages_tokens: bool, **arguments: Any) -> None:
        super().__init__(**arguments, build_optimizer=self._build)
        if not averages_tokens:
            self.model_accepts_loss_kwargs = False
        self._build_from_batches = build
        self.stopwatch = Stopwatch(torch.device(self.args.device))
        self.add_callback(self.stopwatch)
        self.recorder = AllocationRecorder()
        self.recorder.attach(self)
        self.best: BestModel | None = None
        self.series: SeriesRecorder | None = None
        if self.accelerator.scaler is not None:
            self.accelerator.scaler = GradScaler(self.args.device.type)

    def keep_best(self, metric: str, patience: int | None) -> None:
        """Keep the model of the best evaluation; stop after `patience` that are not better."""
        self.best = BestModel(metric, patience, self._read, self._is_extra)
        self.add_callback(self.best)

    def keep_series(self, parts: int, metric: str) -> None:
        """Keep the model at each of this number of equal parts of the budget."""
        self.series = SeriesRecorder(
            parts, metric, lambda: budget_progress(self.raw_optimizer), self._snapshot
        )
        self.add_callback(self.series)

    def _read(self) -> tuple[int, Delta]:
        return active_entries(self.raw_optimizer), self._snapshot()

    def _is_extra(self) -> bool:
        return self.series is not None and self.series.is_extra

    def _snapshot(self) -> Delta:
        return make_delta(self.raw_optimizer, cast(nn.Module, self.model), finished=False)

    def delta(self) -> Delta:
        """What training changed: up to the best evaluation if one was kept, else up to now."""
        if self.best is not None and self.best.kept is not None:
            return self.best.kept.delta
        return make_delta(self.raw_optimizer, cast(nn.Module, self.model))

    def _build(self, model: nn.Module, total_steps: int) -> torch.optim.Optimizer:
        return self._build_from_batches(model, total_steps, self.get_train_dataloader)

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """Run forward and backward of one micro batch; the update is timed from its end."""
        loss = super().training_step(*args, **kwargs)
        self.stopwatch.backward_done()
        return loss

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Evaluate; return nothing if a signal has stopped the training meanwhile."""
        try:
            return super().evaluate(*args, **kwargs)
        except EvaluationLeftOutError:
            return {}

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the active entries to the training and evaluation logs."""
        if self.optimizer is not None and ("loss" in logs or "eval_loss" in logs):
            logs["active"] = active_entries(self.raw_optimizer)
        super().log(logs, start_time)


class WritingTrainer(JobTrainer, Seq2SeqTrainer):
    """Trainer of a job that lets the model write in evaluation, as `set_decoding` has set it."""

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """Evaluate, and leave out what fills up the last batch of several processes.

        Seq2SeqTrainer would count those examples twice.
        """
        self.gather_function = self.accelerator.gather_for_metrics
        return super().evaluation_loop(*args, **kwargs)


def arguments_class(task: Task) -> Callable[..., TrainingArguments]:
    """The class of a Trainer's arguments for a task."""
    if task.writes:
        return partial(Seq2SeqTrainingArguments, predict_with_generate=True)
    return TrainingArguments


class Stopwatch(TrainerCallback):
    """Measure wall time of steps, and device time of updates (clip, norm and optimizer step)."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        self.step_seconds: list[float] = []
        self.updates: list[tuple[Any, Any]] = []
        self._begin = 0.0
        self._backward_end: Any = 0.0

    def _mark(self) -> Any:
        """A point in time: a CUDA event on a GPU, seconds on the CPU."""
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Start the step, before its first micro batch is moved to the device."""
        self._begin = time.perf_counter()

    def backward_done(self) -> None:
        """Start the update."""
        self._backward_end = self._mark()

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """End the update."""
        self.updates.append((self._backward_end, self._mark()))

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """End the step: gradients are cleared, nothing has been logged or evaluated."""
        self.step_seconds.append(time.perf_counter() - self._begin)

    def step_ms(self) -> float:
        """Median milliseconds of a step, without the first steps."""
        return median_ms(self.step_seconds)

    def update_ms(self) -> float:
        """Median milliseconds of an update, without the first updates."""
        if self.cuda:
            torch.cuda.synchronize()
            return median_ms([begin.elapsed_time(end) / 1000 for begin, end in self.updates])
        return median_ms([end - begin for begin, end in self.updates])


def median_ms(seconds: list[float]) -> float:
    """Median in milliseconds without the warm-up; 0 for an empty list."""
    kept = seconds[WARM_UP_STEPS:] or seconds
    return 1000 * statistics.median(kept) if kept else 0.0

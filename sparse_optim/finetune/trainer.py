"""transformers' Trainer, which builds its optimizer late and measures the time of steps."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from sparse_optim import MaskedAdamW
from sparse_optim.analysis.recorder import AllocationRecorder
from sparse_optim.finetune.readings import active_entries

# model, total steps, function that gives training batches -> optimizer
BuildOptimizer = Callable[[nn.Module, int, Callable[[], Iterable[Any]]], torch.optim.Optimizer]

WARM_UP_STEPS = 3  # left out of the timings: allocation, first touch of memory


class SelectiveTrainer(Trainer):
    """Trainer that builds the optimizer once the number of steps is known, and logs active entries.

    Args:
        build_optimizer: (model, total steps, function that gives training batches) -> optimizer.
        arguments: keyword arguments of `Trainer`.
    """

    def __init__(self, build_optimizer: BuildOptimizer, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.build_optimizer = build_optimizer
        self.stopwatch = Stopwatch(torch.device(self.args.device))
        self.add_callback(self.stopwatch)
        self.recorder = AllocationRecorder()
        self.recorder.attach(self)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Build the optimizer; `state.max_steps` is set by now."""
        if self.optimizer is None:
            held = cast(nn.Module, self.model if model is None else model)
            self.optimizer = self.build_optimizer(
                held, self.state.max_steps, self.get_train_dataloader
            )
        return self.optimizer

    @property
    def raw_optimizer(self) -> torch.optim.Optimizer:
        """The optimizer without accelerate's wrapper."""
        return cast(torch.optim.Optimizer, getattr(self.optimizer, "optimizer", self.optimizer))

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """Run forward and backward of one micro batch; the update is timed from its end."""
        loss = super().training_step(*args, **kwargs)
        self.stopwatch.backward_done()
        return loss

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """The norm found by clipping. Without clipping, Trainer would read every gradient again
        only for the log; our optimizers know the norm from their own pass."""
        return None if grad_norm is None else super()._get_grad_norm(model, grad_norm)  # type: ignore[no-untyped-call]

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add metrics of the optimizer to the training and evaluation logs."""
        if self.optimizer is not None and ("loss" in logs or "eval_loss" in logs):
            logs["active"] = active_entries(self.raw_optimizer)
            if isinstance(self.raw_optimizer, MaskedAdamW) and "loss" in logs:
                metrics = self.raw_optimizer.metrics()
                logs["grad_norm"] = float(metrics["grad_norm"])
                logs["skipped_steps"] = int(metrics["skipped_steps"])
        super().log(logs, start_time)


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

"""A transformers callback: metrics of the optimizer in the log, a delta beside each checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from sparse_optim.delta import save_delta
from sparse_optim.integrations.trainer import SelectiveMixin
from sparse_optim.integrations.unwrap import unwrap

DELTA = "delta.safetensors"
LOGGED = ("active", "budget_left", "threshold", "grad_norm", "skipped_steps", "state_bytes")


class SelectiveCallback(TrainerCallback):
    """Log what the optimizer measures, and save the delta with each checkpoint.

    Works with any subclass of transformers' Trainer, trl's included. The training log, and so every
    tracker of `report_to`, gets `active`, `budget_left`, `threshold`, `grad_norm`,
    `skipped_steps` and `state_bytes` of `metrics()`; what the Trainer has logged under one of these
    names stays. Each checkpoint folder gets `delta.safetensors`, from which `load_delta` reads the
    state of that step. With another optimizer than ours, nothing is logged or saved.

    Examples:
        ```python
        SelectiveCallback().attach(trainer)
        trainer.train()
        delta = load_delta("runs/mine/checkpoint-500/delta.safetensors")
        ```
    """

    def __init__(self) -> None:
        self._clips_in_step = False

    def attach(self, trainer: Trainer) -> None:
        """Add this callback before all others, so that trackers see what it adds to the logs.

        Raises:
            ValueError: it is attached to this trainer already.
        """
        if self in trainer.callback_handler.callbacks:
            raise ValueError("SelectiveCallback is attached to this trainer: attach it once")
        self._clips_in_step = isinstance(trainer, SelectiveMixin)
        trainer.callback_handler.callbacks.insert(0, self)

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: Any = None,
        **_: Any,
    ) -> None:
        """Check that the trainer fits the optimizer.

        Raises:
            ValueError: the trainer would clip a part of the gradients, or searches
                hyper-parameters, so that folders of checkpoints are not known.
        """
        masked = unwrap(optimizer)
        if masked is None:
            return
        if state.is_hyper_param_search:
            raise ValueError(
                "SelectiveCallback does not know the folders of a hyperparameter search: train the "
                "best settings with it afterwards"
            )
        takes = masked.sampled_backward or masked.fuse_backward
        if takes and not self._clips_in_step and args.max_grad_norm > 0:
            raise ValueError(
                f"the Trainer clips to max_grad_norm={args.max_grad_norm}, but with "
                "sampled_backward or fuse_backward it finds a part of the gradients alone: use "
                "SelectiveTrainer or SelectiveMixin, or set max_grad_norm=0 in its arguments and "
                "give the limit to the optimizer"
            )

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        optimizer: Any = None,
        **_: Any,
    ) -> None:
        """Add metrics to a training log, and to the trainer's own history."""
        masked = unwrap(optimizer)
        if masked is None or logs is None or "loss" not in logs:
            return
        metrics = masked.metrics()
        for name in LOGGED:
            logs.setdefault(name, metrics[name])
        if state.log_history and state.log_history[-1].get("step") == state.global_step:
            state.log_history[-1] |= logs

    def on_save(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        optimizer: Any = None,
        **_: Any,
    ) -> None:
        """Save the delta of this step into the folder of the checkpoint."""
        masked = unwrap(optimizer)
        if masked is None:
            return
        delta = masked.delta(model, finished=False)  # sharded: all processes take part
        if state.is_world_process_zero:
            folder = f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
            save_delta(delta, Path(str(args.output_dir), folder, DELTA))

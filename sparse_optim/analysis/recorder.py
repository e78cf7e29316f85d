"""A transformers callback that records where the budget goes while a model trains."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from sparse_optim.analysis.measures import sparsity_entropy, tensor_sparsity
from sparse_optim.analysis.record import AllocationRecord, Snapshot, save_record
from sparse_optim.integrations.unwrap import unwrap
from sparse_optim.optim.masked_adamw import MaskedAdamW


class AllocationRecorder(TrainerCallback):
    """Record the active entries of each tensor whenever the trainer logs or evaluates.

    To the training logs it adds `tensor_sparsity` and `sparsity_entropy` (nats), so that they reach
    TensorBoard or another tracker of the trainer. The cost is one read of M + 1 counts;
    positions are not read. Where a selection replaces entries (`Repeat`, `Stochastic`) the counts
    are those of that step's set, not of all entries that ever changed. With an optimizer other than
    `MaskedAdamW` it records nothing.

    Examples:
        ```python
        recorder = AllocationRecorder()
        recorder.attach(trainer)
        trainer.train()
        recorder.save(Path("runs/mine"), method="id3", metric="accuracy")
        ```
    """

    def __init__(self) -> None:
        self.tensors: dict[str, list[int]] = {}
        self.budget = 0
        self.snapshots: list[Snapshot] = []

    def attach(self, trainer: Trainer) -> None:
        """Add this callback before all others, so that trackers see what it adds to the logs."""
        trainer.callback_handler.callbacks.insert(0, self)

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: Any = None,
        **_: Any,
    ) -> None:
        """Note the tensors, and what is active before the first step (of this run)."""
        masked = unwrap(optimizer)
        self.tensors, self.snapshots = {}, []
        if masked is not None:
            self.tensors = ranked_shapes(masked)
            self._take(masked, state.global_step)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        optimizer: Any = None,
        **_: Any,
    ) -> None:
        """Take a snapshot at training and evaluation logs."""
        masked, logs = unwrap(optimizer), {} if logs is None else logs
        evaluation = {
            name.removeprefix("eval_"): float(value)
            for name, value in logs.items()
            if name.startswith("eval_") and isinstance(value, (int, float)) and math.isfinite(value)
        }
        if masked is None or not self.tensors or not ("loss" in logs or evaluation):
            return
        snapshot = self._take(masked, state.global_step)
        snapshot.metrics.update(evaluation)
        if "loss" in logs:
            counts = dict(zip(self.tensors, snapshot.active, strict=True))
            sizes = {name: math.prod(shape) for name, shape in self.tensors.items()}
            logs["tensor_sparsity"] = tensor_sparsity(counts)
            logs["sparsity_entropy"] = sparsity_entropy(counts, sizes)

    def _take(self, optimizer: MaskedAdamW, step: int) -> Snapshot:
        """The snapshot of this step: the existing one, or a new one."""
        if not self.snapshots or self.snapshots[-1].step != step:
            metrics = optimizer.metrics()
            self.budget = int(metrics["budget"])
            active = [int(metrics[f"active/{name}"]) for name in self.tensors]
            self.snapshots.append(Snapshot(step, active))
        return self.snapshots[-1]

    def save(self, folder: Path, method: str, metric: str) -> Path | None:
        """Write `allocation.jsonl` into a folder, if anything was recorded.

        Args:
            folder: an existing folder.
            method: name of the method, for legends.
            metric: the reported evaluation metric, without its "eval_" prefix.
        """
        if not self.snapshots:
            return None
        record = AllocationRecord(method, metric, self.budget, self.tensors, self.snapshots)
        return save_record(record, folder)


def ranked_shapes(optimizer: MaskedAdamW) -> dict[str, list[int]]:
    """Name -> shape of the tensors that compete for the budget."""
    prefix = "active/"
    names = [name.removeprefix(prefix) for name in optimizer.metrics() if name.startswith(prefix)]
    ranked = (group["params"] for group in optimizer.param_groups if group["unmask"] == "rank")
    shapes = (list(param.shape) for params in ranked for param in params)
    return dict(zip(names, shapes, strict=True))

"""A transformers callback that publishes the weights after each update."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from sparse_optim.delta._tensors import Model
from sparse_optim.integrations.unwrap import unwrap
from sparse_optim.optim.masked_adamw import MaskedAdamW
from sparse_optim.publish import PatchFolder, WeightPublisher


class PublishCallback(TrainerCallback):
    """Write a version of the weights into a folder after each update.

    Works with any subclass of transformers' Trainer, such as trl's GRPOTrainer, whose rollouts
    other processes may write: there, `PatchFolder(path).follow(WeightReceiver(model))` brings a
    model to the newest version. A resumed run goes on with the folder's numbers.

    Args:
        folder: that receivers read; its path, or a PatchFolder with settings of its own.
        every: updates between versions, >= 1. The last update of a run is always published.
        key, dtype, base: as in `WeightPublisher`; a run with `dtype` that is resumed needs `base`.

    Raises:
        ValueError: `every` is below 1.

    Examples:
        ```python
        trainer = SelectiveGRPOTrainer(..., callbacks=[PublishCallback("weights")])
        ```
    """

    def __init__(
        self,
        folder: PatchFolder | str | os.PathLike[str],
        *,
        every: int = 1,
        key: bytes | None = None,
        dtype: torch.dtype | None = None,
        base: Model | None = None,
    ) -> None:
        if every < 1:
            raise ValueError(f"every: expected at least 1, got {every}")
        self.folder = folder if isinstance(folder, PatchFolder) else PatchFolder(folder)
        self._every = every
        self._options: dict[str, Any] = {"key": key, "dtype": dtype, "base": base}
        self._publisher: WeightPublisher | None = None
        self._optimizer: MaskedAdamW | None = None
        self._published = -1  # the update of the last version

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        optimizer: Any = None,
        **_: Any,
    ) -> None:
        """Prepare.

        Raises:
            ValueError: the optimizer is not one of this package. Or as `WeightPublisher`.
        """
        self._optimizer = unwrap(optimizer)
        if self._optimizer is None:
            raise ValueError(
                f"PublishCallback needs an optimizer of sparse_optim, which knows what has moved; "
                f"got {type(optimizer).__name__}"
            )
        self._publisher = WeightPublisher(
            self._optimizer, model, version=self.folder.newest, **self._options
        )
        self._published = -1

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Publish, if it is time."""
        if state.global_step % self._every == 0:
            self._publish(state)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Publish the last update, if it is not there; with `load_best_model_at_end` the best."""
        if args.load_best_model_at_end and state.best_model_checkpoint is not None:
            assert self._optimizer is not None
            self._optimizer.refresh()  # weights of an earlier step of this run are back
            self._publish(state)
        elif state.global_step != self._published:
            self._publish(state)

    def _publish(self, state: TrainerState) -> None:
        assert self._publisher is not None
        assert self._optimizer is not None
        if state.is_world_process_zero:
            self.folder.publish(self._publisher)
        elif self._optimizer.engine.pool.shards is not None:  # all processes give their shards
            self._publisher.patch()
        self._published = state.global_step

"""Keep the model of the best evaluation as a delta, and stop when evaluations no longer improve.

The Trainer's `load_best_model_at_end` would bring back the weights of the best checkpoint, but the
optimizer's active entries stay those of the last step. A delta has both, and takes a few megabytes
of memory where the Trainer writes a whole checkpoint for each evaluation.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from sparse_optim.delta import Delta, load_delta, save_delta
from sparse_optim.finetune.checkpoints import folder_of
from sparse_optim.finetune.errors import FinetuneError

BEST_FILE = "best.safetensors"  # in a checkpoint
NOTE = "best_so_far"  # in the delta's `method`, in that file alone
LOWER_IS_BETTER = frozenset({"perplexity", "token_loss", "rmse"})


@dataclass(frozen=True)
class Evaluated:
    """What training had changed when it was evaluated.

    Attributes:
        step: optimizer steps taken.
        value: of the metric.
        active: entries that training may have changed, the fresh head included.
        delta: the change.
    """

    step: int
    value: float
    active: int
    delta: Delta


class BestModel(TrainerCallback):
    """Keeps the best evaluation; of equal ones the first.

    Args:
        metric: name without its 'eval_' prefix.
        patience: number of evaluations in a row without a better value before training stops; None:
            never stop.
        read: returns the active entries and the delta of the training so far.
        is_extra: whether the evaluation of this step is one that `--series` asked for: it may be
            the best, but patience does not count it.

    Attributes:
        kept: the best evaluation; None before the first, and while the metric is NaN.
        waited: evaluations since then.
        stopped: whether the training was stopped early.
    """

    def __init__(
        self,
        metric: str,
        patience: int | None,
        read: Callable[[], tuple[int, Delta]],
        is_extra: Callable[[], bool] = lambda: False,
    ) -> None:
        self.metric, self.patience = metric, patience
        self.kept: Evaluated | None = None
        self.waited = 0
        self.stopped = False
        self._read, self._is_extra = read, is_extra

    def is_better(self, value: float) -> bool:
        """Whether a value of the metric is better than the best so far."""
        if self.kept is None:
            return not math.isnan(value)
        sign = -1 if self.metric in LOWER_IS_BETTER else 1
        return sign * value > sign * self.kept.value

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Stop at once if the run that is resumed had stopped early."""
        self._stop_if_patience_is_over(state, control)

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        """Keep what is best, or count, and stop the training when patience is at its end."""
        value = (metrics or {})[f"eval_{self.metric}"]
        if self.is_better(value):
            self.kept = Evaluated(state.global_step, value, *self._read())
            self.waited = 0
            return
        if self._is_extra():
            return
        self.waited += 1
        self._stop_if_patience_is_over(state, control)

    def _stop_if_patience_is_over(self, state: TrainerState, control: TrainerControl) -> None:
        if self.patience is not None and self.waited >= self.patience:
            self.stopped = state.global_step < state.max_steps
            control.should_training_stop = True

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Add the best so far to the checkpoint."""
        if self.kept is None or not state.is_world_process_zero:
            return
        note = {
            "metric": self.metric,
            "value": self.kept.value,
            "step": self.kept.step,
            "active": self.kept.active,
            "waited": self.waited,
        }
        delta = self.kept.delta
        noted = dataclasses.replace(delta, method={**delta.method, NOTE: note})
        save_delta(noted, folder_of(args, state) / BEST_FILE)

    def restore(self, checkpoint: Path) -> None:
        """Take the best so far from a checkpoint, if there is one.

        Raises:
            FinetuneError: it was judged by another metric.
        """
        file = checkpoint / BEST_FILE
        if not file.exists():  # saved before the first evaluation
            return
        delta = load_delta(file)
        method = dict(delta.method)
        note: Any = method.pop(NOTE)
        if note["metric"] != self.metric:
            raise FinetuneError(
                f"--resume: the best evaluation in {checkpoint} was chosen by {note['metric']}, "
                f"now --metric is {self.metric}"
            )
        kept = dataclasses.replace(delta, method=method)
        self.kept = Evaluated(note["step"], note["value"], note["active"], kept)
        self.waited = note["waited"]

    def describe(self) -> str:
        """One line for the user: which evaluation was kept, and whether it ended the training."""
        if self.kept is None:
            return f"No evaluation has a number for {self.metric}: the last model is kept."
        kept = f"Kept the best model: step {self.kept.step}, {self.metric} {self.kept.value:.4f}."
        if not self.stopped:
            return kept
        return f"Stopped early: {self.waited} evaluations in a row were not better. {kept}"

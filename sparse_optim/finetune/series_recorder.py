"""Keep the members of a series while a job trains (see `sparse_optim.finetune.series`)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from sparse_optim.delta import Delta, load_delta, save_delta
from sparse_optim.finetune.checkpoints import folder_of
from sparse_optim.finetune.series import NOTE, note_of

SAVED = "series-"  # begins the name of a member's file in a checkpoint


class SeriesRecorder(TrainerCallback):
    """Keeps the delta at the first step whose active entries are at least each part of the budget.

    The model is evaluated at the end of that step. Parts that one step reaches together have one
    member, under the last of them.

    Args:
        parts: n, of the budget.
        metric: name without its 'eval_' prefix.
        progress: returns the unmasked entries and the budget.
        read: returns the delta of the training so far.

    Attributes:
        members: the deltas by the number of their part, 1 to n, each with a note under NOTE.
        is_extra: whether the last step is evaluated for the series alone.
    """

    def __init__(
        self,
        parts: int,
        metric: str,
        progress: Callable[[], tuple[int, int]],
        read: Callable[[], Delta],
    ) -> None:
        self.parts, self.metric = parts, metric
        self.members: dict[int, Delta] = {}
        self.is_extra = False
        self._progress, self._read = progress, read

    def _reached(self) -> int | None:
        """The part that is reached now and has no member yet; None: there is none."""
        last = max(self.members, default=0)
        if last == self.parts:
            return None
        unmasked, budget = self._progress()
        part = unmasked * self.parts // budget
        return part if part > last else None

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Ask for an evaluation where a part is reached."""
        reached = self._reached() is not None
        self.is_extra = reached and not control.should_evaluate
        control.should_evaluate |= reached

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        """Keep the delta of the part that is reached."""
        part = self._reached()
        if part is None:
            return
        note = {
            "part": part,
            "parts": self.parts,
            "step": state.global_step,
            "metric": self.metric,
            "value": (metrics or {})[f"eval_{self.metric}"],
        }
        delta = without_steps(self._read())
        self.members[part] = dataclasses.replace(delta, method={**delta.method, NOTE: note})

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Add the members so far to the checkpoint."""
        if state.is_world_process_zero:
            for part, delta in self.members.items():
                save_delta(delta, folder_of(args, state) / f"{SAVED}{part}.safetensors")

    def restore(self, checkpoint: Path) -> None:
        """Take the members so far from a checkpoint."""
        for file in checkpoint.glob(f"{SAVED}*.safetensors"):
            delta = load_delta(file)
            self.members[int(note_of(delta)["part"])] = delta


def without_steps(delta: Delta) -> Delta:
    """The delta without the steps at which its entries were unmasked."""
    plain = {
        name: dataclasses.replace(values, unmask_step=None) for name, values in delta.sparse.items()
    }
    return dataclasses.replace(delta, sparse=plain)

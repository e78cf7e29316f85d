"""Ctrl-C and SIGTERM: the step is finished, a checkpoint saved, and the user told how to go on.

An evaluation that is due or runs is left out, unless the run keeps its best model or a series: then
a resumed run would choose another one.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from sparse_optim.finetune.checkpoints import folder_of
from sparse_optim.finetune.errors import FinetuneError
from sparse_optim.finetune.processes import count, largest


class JobStoppedError(FinetuneError):
    """A signal stopped the training; a checkpoint was saved.

    Attributes:
        exit_code: of the command: 128 and the signal's number.
    """

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message)
        self.exit_code = 128 + number


class EvaluationLeftOutError(Exception):
    """A signal stops the training during an evaluation; `JobTrainer.evaluate` catches this."""


class Stopper(TrainerCallback):
    """Stops the training at the end of the step in which, or after which, a signal arrives.

    Several processes agree on the step, at the next that is logged: to ask at each would wait for
    the device.

    Args:
        say: shows a line to the user.
        evaluates: whether to finish an evaluation of the last step.
    """

    def __init__(self, say: Callable[[str], None], evaluates: bool = False) -> None:
        self.evaluates = evaluates
        self.signal: int | None = None
        self.checkpoint: Path | None = None
        self._is_over = False
        self._is_stopping = False
        self._say = say

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Take the signals inside the block; only the main thread can."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        numbers = (signal.SIGINT, signal.SIGTERM)
        before = {number: signal.signal(number, self._note) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None:  # the second time: at once
            raise KeyboardInterrupt
        self.signal = number
        if self._is_over:
            self._say("The training is over: writing its results; Ctrl-C again stops at once.")
        else:
            soon = "after this step" if count() == 1 else "at the next step that is logged"
            due = " (and its evaluation, if one is due)" if self.evaluates else ""
            self._say(f"Stopping {soon}{due}, with a checkpoint; Ctrl-C again stops at once.")

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Ask the Trainer to save and stop, if a signal has arrived."""
        self._is_over = state.global_step >= state.max_steps
        if count() > 1:
            if state.global_step % args.logging_steps:
                return
            self.signal = largest(self.signal or 0, args.device) or None
        self._stop(state, control)

    def _stop(self, state: TrainerState, control: TrainerControl) -> bool:
        """Ask for it, if a signal has arrived before the last step; return whether."""
        if self.signal is None or self._is_stopping or state.global_step >= state.max_steps:
            return False
        control.should_save = control.should_training_stop = self._is_stopping = True
        control.should_evaluate = control.should_evaluate and self.evaluates
        return True

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Stop before the next step: the signal came after the end of this one."""
        if count() == 1 and state.global_step:
            self._stop(state, control)

    def on_prediction_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Leave out the rest of the evaluation in which the signal came.

        Raises:
            EvaluationLeftOutError: to get out of the Trainer's loop.
        """
        if count() == 1 and not self.evaluates and self._stop(state, control):
            raise EvaluationLeftOutError

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Note where the checkpoint is; stop with it, if the signal came while it was saved."""
        self.checkpoint = folder_of(args, state)
        if count() == 1 and self._stop(state, control):
            control.should_save = False

    def check(self, step: int, last_step: int) -> None:
        """Raise JobStoppedError if a signal has cut the training short."""
        if self.signal is not None and self._is_stopping:
            raise JobStoppedError(
                f"stopped at step {step} of {last_step}, with a checkpoint in {self.checkpoint}. "
                "The same command with --resume last goes on",
                self.signal,
            )

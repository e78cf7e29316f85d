"""Ctrl-C and SIGTERM: the step is finished, a checkpoint saved, and the user told how to go on."""

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


class Stopper(TrainerCallback):
    """Stops the training at the end of the step in which a signal arrives.

    Several processes agree on the step, at the next that is logged: to ask at each would wait for
    the device.

    Args:
        say: shows a line to the user.
    """

    def __init__(self, say: Callable[[str], None]) -> None:
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
            self._say(f"Stopping {soon}, with a checkpoint; Ctrl-C again stops at once.")

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Ask the Trainer to save and stop, if a signal has arrived."""
        self._is_over = state.global_step >= state.max_steps
        if count() > 1:
            if state.global_step % args.logging_steps:
                return
            self.signal = largest(self.signal or 0, args.device) or None
        if self.signal is not None and state.global_step < state.max_steps:
            control.should_save = control.should_training_stop = self._is_stopping = True

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Note where the last checkpoint is."""
        self.checkpoint = folder_of(args, state)

    def check(self, step: int, last_step: int) -> None:
        """Raise JobStoppedError if a signal has cut the training short."""
        if self.signal is not None and self._is_stopping:
            raise JobStoppedError(
                f"stopped at step {step} of {last_step}, with a checkpoint in {self.checkpoint}. "
                "The same command with --resume last goes on",
                self.signal,
            )

"""Progress of a run on a rich console: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import logging
import time
from typing import Any

from rich.console import Console, RenderableType
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Column
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from sparse_optim.finetune import processes
from sparse_optim.finetune.packing import POSITIONS
from sparse_optim.finetune.readings import usage_of
from sparse_optim.finetune.summary import describe_run, show

logger = logging.getLogger(__name__)

WIDE = 100  # columns of a terminal that has room for the active entries


class Announcer(TrainerCallback):
    """Says what is trained and how, once the optimizer is there.

    Args:
        console: where to write.
    """

    def __init__(self, console: Console) -> None:
        self.console = console

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: Any = None,
        train_dataloader: Any = None,
        **_: Any,
    ) -> None:
        """Print it."""
        usage = usage_of(getattr(optimizer, "optimizer", optimizer))
        batch = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        device = str(args.device)
        if args.world_size > 1:
            device = f"{args.device.type} ({args.world_size} processes)"
        is_packed = POSITIONS in train_dataloader.dataset.column_names
        examples = "rows of packed examples" if is_packed else "examples"
        rows = describe_run(usage, f"{batch:,} {examples}", state.max_steps, device)
        show(self.console, rows)


class ConsoleProgress(TrainerCallback):
    """Steps, loss, active entries, rate, and a line for each evaluation.

    Args:
        console: where to write.
        metric: the evaluation metric to show, without its 'eval_' prefix.
        title: what the bar is of.
    """

    def __init__(self, console: Console, metric: str, title: str) -> None:
        self.console = console
        self.metric = metric
        self.title = title
        self.loss = float("nan")
        self.active = 0
        self._first_step = 0
        self._begin = self._evaluating = 0.0  # seconds
        self._bar = Progress(
            *columns(console.width),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task(title, total=None, loss="-", active="-", rate="-")

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Show the bar; a resumed run begins where it stopped."""
        self._first_step, self._begin = state.global_step, time.perf_counter()
        self._bar.update(self._task, total=state.max_steps, completed=state.global_step)
        self._bar.start()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Move the bar."""
        rate = f"{self.rate(state):.2f} steps/s"
        self._bar.update(self._task, completed=state.global_step, rate=rate)

    def rate(self, state: TrainerState) -> float:
        """Steps per second of this run so far, evaluations left out."""
        seconds = time.perf_counter() - self._begin - self._evaluating
        return (state.global_step - self._first_step) / seconds

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        """Show loss and active entries; print a line where there is no bar, or a new metric."""
        logs = logs or {}
        if "loss" in logs:
            self.loss, self.active = logs["loss"], int(logs.get("active", 0))
            shown = {"loss": f"{self.loss:.4f}", "active": f"{self.active:,}"}
            self._bar.update(self._task, **shown)  # type: ignore[arg-type]  # custom fields
            tenth = max(1, state.max_steps // 10)
            if not self.console.is_terminal and state.global_step % tenth < args.logging_steps:
                self._line(state, f"loss {self.loss:.4f}  active {self.active:,}")
        if f"eval_{self.metric}" in logs:
            value, seconds = logs[f"eval_{self.metric}"], logs["eval_runtime"]
            self._evaluating += seconds
            text = (
                f"{self.metric} {value:.4f}  eval loss {logs['eval_loss']:.4f} in {seconds:.1f} s"
            )
            self._line(state, text)

    def _line(self, state: TrainerState, text: str) -> None:
        """One line, above the bar where there is one."""
        rate = f"  {self.rate(state):.2f} steps/s"
        self.console.print(
            f"step {state.global_step}/{state.max_steps}  {text}{rate}",
            highlight=False,
            markup=False,
            soft_wrap=True,
        )

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Remove the bar."""
        self._bar.stop()

    def renderable(self) -> RenderableType:
        """The bar as it is now."""
        return self._bar.get_renderable()

    def stop(self) -> None:
        """Give the terminal back after an error or an interrupt."""
        self._bar.stop()


def columns(width: int) -> list[ProgressColumn]:
    """The columns of the bar: all of them fit a terminal of 80 columns.

    Args:
        width: of the terminal, in characters.
    """
    active = "  active {task.fields[active]}" if width >= WIDE else ""
    name = Column(no_wrap=True, overflow="ellipsis", max_width=18)
    return [
        TextColumn("{task.description}", style="bold", markup=False, table_column=name),
        BarColumn(bar_width=None),
        MofNCompleteColumn(table_column=Column(no_wrap=True)),
        TextColumn("loss {task.fields[loss]}" + active, table_column=Column(no_wrap=True)),
        TextColumn("{task.fields[rate]}", table_column=Column(no_wrap=True)),
        TimeRemainingColumn(table_column=Column(no_wrap=True)),
    ]


def tell(console: Console | None, line: str) -> None:
    """Show a line on the console, or log it; of several processes, the first."""
    if not processes.is_first():
        return
    if console is None:
        logger.warning(line)
    else:
        console.print(line, markup=False, highlight=False, soft_wrap=True)

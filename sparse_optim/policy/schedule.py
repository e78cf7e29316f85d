"""Schedules: how many entries are to be unmasked after each step.

A schedule maps (budget, steps) to steps + 1 cumulative targets, from 0 to the budget. Targets are
computed in integers, so that no remainder is lost and nothing is unmasked twice.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from sparse_optim.backends.targets import fits, formula

# Above this number of steps, schedules that have a formula give it: a table of that many targets
# takes 64 KB. Functions cannot have more than MAX_TABLE_STEPS, whose table takes 80 MB.
TABLE_STEPS = 8192
MAX_TABLE_STEPS = 10**7

Piece = tuple[int, int, int]  # steps, gain, power; see sparse_optim.backends.targets


class Schedule(Protocol):
    """Anything with `targets`; a plain function t -> cumulative target is accepted too."""

    def targets(self, budget: int, steps: int) -> list[int]:
        """Cumulative targets after steps 0, 1, ..., `steps`."""
        ...


@dataclass(frozen=True)
class Uniform:
    """Unmask the same number each step:  target(t) = budget * t // steps.

    Reference: Agarwal et al. 2025, section 3.2.
    """

    def targets(self, budget: int, steps: int) -> list[int]:
        return [budget * t // steps for t in range(steps + 1)]

    def pieces(self, budget: int, steps: int) -> list[Piece]:
        """The same as a formula: (steps, gain, power) of each piece."""
        return [(steps, budget, 1)]


@dataclass(frozen=True)
class Linear:
    """Unmask fewer and fewer, none at the end:  target(t) = budget * (1 - (1 - t / steps)^2).

    Entries that are unmasked late meet a decayed learning rate; this unmasks most of them early.
    """

    def targets(self, budget: int, steps: int) -> list[int]:
        return [budget * (steps**2 - (steps - t) ** 2) // steps**2 for t in range(steps + 1)]

    def pieces(self, budget: int, steps: int) -> list[Piece]:
        """The same as a formula: (steps, gain, power) of each piece."""
        return [(steps, budget, 2)]


@dataclass(frozen=True)
class Warmup:
    """Unmask a share of the budget in the first steps, the rest uniformly.

    Args:
        share: of the budget, 0 to 1.
        steps: in which that share is unmasked, >= 1.

    Raises:
        ValueError: if share or steps is out of range.
    """

    share: float
    steps: int

    def __post_init__(self) -> None:
        if not 0 <= self.share <= 1:
            raise ValueError(f"Warmup: share must be between 0 and 1, got {self.share}")
        if self.steps < 1:
            raise ValueError(f"Warmup: steps must be at least 1, got {self.steps}")

    def targets(self, budget: int, steps: int) -> list[int]:
        targets = [0]
        for length, gain, _ in self.pieces(budget, steps):
            done = targets[-1]
            targets += [done + gain * t // length for t in range(1, length + 1)]
        return targets

    def pieces(self, budget: int, steps: int) -> list[Piece]:
        """The same as a formula: (steps, gain, power) of each piece."""
        first = min(self.steps, steps)
        if first == steps:
            return [(steps, budget, 1)]
        early = math.floor(budget * self.share)
        return [(first, early, 1), (steps - first, budget - early, 1)]


SCHEDULES: dict[str, Schedule] = {"uniform": Uniform(), "linear": Linear()}  # by name


def _has_formula(schedule: object) -> bool:
    """Whether `pieces` belongs to the class that defines `targets`: a subclass may override it."""
    for parent in type(schedule).__mro__:
        if "targets" in vars(parent) or "pieces" in vars(parent):
            return "pieces" in vars(parent)
    return False


def cumulative_targets(
    schedule: Schedule | Callable[[int], int], budget: int, total_steps: int, unmask_steps: int
) -> Tensor:
    """Evaluate a schedule into what the optimizer keeps: a table, or of long runs a formula.

    Args:
        schedule: spends the budget in `unmask_steps` steps.
        budget: entries.
        total_steps: steps of the whole run, >= unmask_steps.
        unmask_steps: steps in which the budget is spent, >= 1.

    Returns:
        (total_steps + 1,), int64, monotone, from 0, at most `budget`; or a formula, (K, 4), int64.

    Raises:
        ValueError: if a schedule falls, leaves 0..budget or is not of whole numbers, or is a
            function of more steps than a table can have.
    """
    if isinstance(schedule, type):
        raise ValueError(f"schedule must be an instance: write {schedule.__name__}()")
    if total_steps > TABLE_STEPS and _has_formula(schedule):
        pieces: list[Piece] = schedule.pieces(budget, unmask_steps)  # type: ignore[union-attr]
        if all(fits(*piece) for piece in pieces):
            rest = total_steps - unmask_steps
            return formula([*pieces, *([(rest, 0, 1)] if rest else [])])
    if total_steps > MAX_TABLE_STEPS:
        raise ValueError(
            f"{schedule!r} would need a table of {total_steps} targets, at most {MAX_TABLE_STEPS} "
            "are kept: use Uniform(), or fewer total_steps"
        )
    if hasattr(schedule, "targets"):
        table = schedule.targets(budget, unmask_steps)
    elif callable(schedule):
        table = [schedule(t) for t in range(unmask_steps + 1)]
    else:
        raise ValueError(
            f"schedule must be Uniform(), Linear(), Warmup(...) or a function, got {schedule!r}"
        )
    if len(table) != unmask_steps + 1:
        raise ValueError(f"schedule: expected {unmask_steps + 1} targets, got {len(table)}")
    before = 0
    for t, target in enumerate(table):
        if isinstance(target, bool) or not isinstance(target, int):
            raise ValueError(f"schedule: the target at step {t} must be an int, got {target!r}")
        if not before <= target <= budget:
            raise ValueError(
                f"schedule: the target at step {t} is {target}, but must be {before} (the one "
                f"before; entries stay unmasked) to {budget} (the budget)"
            )
        before = target
    # What a function gives for step 0 falls to step 1, the first that can unmask.
    table = [0, *table[1:]] + [table[-1]] * (total_steps - unmask_steps)
    return torch.tensor(table, dtype=torch.int64)

"""Selections: when entries become active, and whether they stay active."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import ClassVar, Protocol

from torch import Tensor

from sparse_optim.policy.schedule import Schedule, Uniform, cumulative_targets


def resolve_budget(budget: int | float, pool_size: int) -> int:
    """Turn a budget into a number of entries.

    Args:
        budget: an int counts entries; a float in (0, 1] is a share of the pool.
        pool_size: entries that may be unmasked.

    Raises:
        ValueError: if the pool is empty, or the budget is not positive or larger than the pool.
    """
    if pool_size == 0:
        raise ValueError(
            "the pool is empty: no parameter group with unmask='rank' holds a trainable entry; set "
            "requires_grad on what is to be ranked, or train it densely (unmask='all')"
        )
    if isinstance(budget, bool) or not isinstance(budget, (int, float)):
        raise ValueError(f"budget must be an int (entries) or a float (share), got {budget!r}")
    if isinstance(budget, float):
        if not 0 < budget <= 1:
            raise ValueError(
                f"a float budget is a share of the pool, above 0 and at most 1, got {budget}; "
                "give an int to count entries"
            )
        return max(1, round(budget * pool_size))
    if not 0 < budget <= pool_size:
        raise ValueError(f"budget must be 1 to {pool_size} (entries in the pool), got {budget}")
    return budget


def steps_of(unmask_steps: int | float, total_steps: int) -> int:
    """The number of steps in which a budget is spent: an int, or a share (float) of the run.

    Raises:
        ValueError: it is neither, or out of range.
    """
    if isinstance(unmask_steps, float):
        if not 0 < unmask_steps <= 1:
            raise ValueError(
                "a float as unmask_steps is a share of the run, above 0 and at most 1, got "
                f"{unmask_steps}; give an int to count steps"
            )
        return max(1, round(unmask_steps * total_steps))
    if isinstance(unmask_steps, bool) or not isinstance(unmask_steps, int):
        raise ValueError(
            "unmask_steps must be an int (steps) or a float (share of the run), got "
            f"{unmask_steps!r}"
        )
    if not 1 <= unmask_steps <= total_steps:
        raise ValueError(
            f"unmask_steps must be 1 to {total_steps} (total_steps), got {unmask_steps}"
        )
    return unmask_steps


class Selection(Protocol):
    """What `Increment`, `Static`, `Repeat` and `Stochastic` offer.

    Attributes:
        budget: entries (int) or share of the pool (float).
        replaces: whether each step drops the set of the one before.
        one_step: whether the whole budget is unmasked at the first step, and never again.
        every: steps from one that unmasks entries to the next.
        noise_seed: seed of the sample of each step; None if nothing is sampled.
    """

    @property
    def budget(self) -> int | float: ...
    @property
    def replaces(self) -> bool: ...
    @property
    def one_step(self) -> bool: ...
    @property
    def every(self) -> int: ...
    @property
    def noise_seed(self) -> int | None: ...

    def targets(self, budget: int) -> Tensor:
        """Cumulative targets of a budget in entries; see `sparse_optim.backends.targets`."""
        ...

    def extended(
        self, budget: int | float, total_steps: int | None, current_steps: int
    ) -> Selection:
        """The same with another budget and, where it has steps, another number of them.

        Args:
            budget: entries (int) or share of the pool (float).
            total_steps: the new number of steps; None keeps `current_steps`.
            current_steps: of the schedule that runs, which may be a checkpoint's.
        """
        ...


@dataclass(frozen=True)
class Increment:
    """Unmask a few entries more at each step, ranked anew each time; none is frozen again.

    Args:
        budget: entries (int) or share of the pool (float) that may ever be active.
        total_steps: optimizer steps of the whole run.
        schedule: how the budget is spread over the steps.
        unmask_steps: spend the budget within this many first steps (int), or in this share of the
            run (float): 1 is the first step, 1.0 the whole run.
        every: unmask only at every N-th call, the first one included, what the schedule asks for
            until the next of them. With `sampled_backward=True` the calls between cost no
            weight gradients.

    Raises:
        ValueError: if a number of steps is out of range.

    Reference: Agarwal et al. 2025, Algorithm 1 (increment-S), for any unmasking scheduler u_t.
    """

    budget: int | float
    total_steps: int
    schedule: Schedule | Callable[[int], int] = field(default_factory=Uniform)
    unmask_steps: int | float = 1.0
    every: int = 1
    replaces: ClassVar[bool] = False
    one_step: ClassVar[bool] = False
    noise_seed: ClassVar[None] = None

    def __post_init__(self) -> None:
        if isinstance(self.total_steps, bool) or not isinstance(self.total_steps, int):
            raise ValueError(f"total_steps must be an int, got {self.total_steps!r}")
        if self.total_steps < 1:
            raise ValueError(f"total_steps must be at least 1, got {self.total_steps}")
        steps_of(self.unmask_steps, self.total_steps)
        if isinstance(self.every, bool) or not isinstance(self.every, int) or self.every < 1:
            raise ValueError(f"every must be an int of at least 1, got {self.every!r}")

    def targets(self, budget: int) -> Tensor:
        """Cumulative targets of a budget in entries; see `Selection`."""
        steps = steps_of(self.unmask_steps, self.total_steps)
        return cumulative_targets(self.schedule, budget, self.total_steps, steps)

    def extended(
        self, budget: int | float, total_steps: int | None, current_steps: int
    ) -> Increment:
        """The same with another budget and number of steps; see `Selection`."""
        steps = current_steps if total_steps is None else total_steps
        return replace(self, budget=budget, total_steps=steps)


@dataclass(frozen=True)
class _Whole:
    """Unmask the whole budget in one step."""

    budget: int | float
    replaces: ClassVar[bool] = True
    one_step: ClassVar[bool] = False
    every: ClassVar[int] = 1

    @property
    def noise_seed(self) -> int | None:
        """None: nothing is sampled."""
        return None

    def targets(self, budget: int) -> Tensor:
        """Cumulative targets, (2,), int64: everything at step 1."""
        return cumulative_targets(Uniform(), budget, 1, 1)

    def extended(
        self, budget: int | float, total_steps: int | None, current_steps: int
    ) -> Selection:
        """The same with another budget.

        Raises:
            ValueError: if total_steps is given.
        """
        if total_steps is not None:
            raise ValueError("a static selection has no total_steps; give only budget")
        return replace(self, budget=budget)


@dataclass(frozen=True)
class Static(_Whole):
    """Unmask the whole budget at the first step, and keep that set.

    Args:
        budget: entries (int) or share of the pool (float).

    Reference: Agarwal et al. 2025, section 3 (static-S).
    """

    replaces: ClassVar[bool] = False
    one_step: ClassVar[bool] = True


@dataclass(frozen=True)
class Repeat(_Whole):
    """Unmask the whole budget anew at each step: the next step drops the set of this one.

    Entries that are in both keep their moments; those that leave lose them and keep the value that
    they reached. Every entry that was ever active is recorded, for the delta.

    Args:
        budget: entries (int) or share of the pool (float), of one step.

    Reference: Agarwal et al. 2025, section 6 (repeat-S).
    """


@dataclass(frozen=True)
class Stochastic(_Whole):
    """As `Repeat`, but each step's set is a sample without replacement.

        probability of the next draw = score^2 / sum of score^2 over entries not drawn yet

    Args:
        budget: entries (int) or share of the pool (float), of one step.
        seed: of the noise, 64 bits. The same on every backend, and after a resume.

    Reference: Akbar-Tajari and Pilehvar, Stochastic Fine-Tuning of Language Models Using Masked
    Gradients, Algorithm 1; drawn by Gumbel top-k, see `sparse_optim.backends.noise`.
    """

    seed: int = 0

    @property
    def noise_seed(self) -> int:
        """Of the noise by which entries are drawn."""
        return self.seed

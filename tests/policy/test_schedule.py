"""Schedules: monotone, from 0 to the budget, with no entry lost to rounding."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparse_optim import Linear, Uniform, Warmup
from sparse_optim.backends.operands import max_quota
from sparse_optim.policy.schedule import cumulative_targets

SCHEDULES = st.one_of(
    st.just(Uniform()),
    st.just(Linear()),
    st.builds(Warmup, share=st.floats(0, 1), steps=st.integers(1, 60)),
)


@given(schedule=SCHEDULES, budget=st.integers(1, 10**10), steps=st.integers(1, 50))
def test_every_schedule_rises_to_the_budget(schedule, budget, steps):
    targets = cumulative_targets(schedule, budget, steps, steps)
    assert targets.dtype == torch.int64
    assert targets.shape == (steps + 1,)
    assert int(targets[0]) == 0
    assert int(targets[-1]) == budget
    assert (targets.diff() >= 0).all()
    assert int(targets.diff().sum()) == budget
    assert max_quota(targets, budget) <= budget


@given(
    schedule=SCHEDULES,
    budget=st.integers(1, 10**6),
    unmask_steps=st.integers(1, 30),
    rest=st.integers(0, 30),
)
def test_unmask_steps_spend_the_budget_early(schedule, budget, unmask_steps, rest):
    targets = cumulative_targets(schedule, budget, unmask_steps + rest, unmask_steps)
    assert targets.numel() == unmask_steps + rest + 1
    assert torch.equal(
        targets[: unmask_steps + 1],
        cumulative_targets(schedule, budget, unmask_steps, unmask_steps),
    )
    assert (targets[unmask_steps:] == budget).all()


@given(budget=st.integers(1, 10**9), steps=st.integers(1, 60))
def test_uniform_never_drifts(budget, steps):
    targets = Uniform().targets(budget, steps)
    assert targets == [budget * t // steps for t in range(steps + 1)]
    quotas = {b - a for a, b in itertools.pairwise(targets)}
    assert max(quotas) - min(quotas) <= 1


@given(budget=st.integers(1, 10**9), steps=st.integers(1, 60))
def test_linear_slows_down_to_nothing(budget, steps):
    targets = Linear().targets(budget, steps)
    exact = [budget * (1 - (1 - t / steps) ** 2) for t in range(steps + 1)]
    assert all(abs(a - b) <= 1 + 1e-9 * budget for a, b in zip(targets, exact, strict=True))
    quotas = [b - a for a, b in itertools.pairwise(targets)]
    assert all(later <= earlier + 1 for earlier, later in itertools.pairwise(quotas))


def test_warmup_by_hand():
    assert Warmup(0.5, 2).targets(100, 6) == [0, 25, 50, 62, 75, 87, 100]
    assert Warmup(0.0, 2).targets(10, 4) == [0, 0, 0, 5, 10]
    assert Warmup(1.0, 1).targets(10, 3) == [0, 10, 10, 10]
    assert Warmup(0.3, 9).targets(10, 2) == [0, 5, 10]  # longer than the run: all of the budget


@pytest.mark.parametrize("share", [-0.1, 1.1, float("nan")])
def test_warmup_refuses_shares(share):
    with pytest.raises(ValueError, match="share must be between 0 and 1"):
        Warmup(share, 1)


def test_warmup_refuses_steps():
    with pytest.raises(ValueError, match="steps must be at least 1"):
        Warmup(0.5, 0)


def test_functions_are_schedules():
    assert cumulative_targets(lambda t: t * t, 9, 5, 3).tolist() == [0, 1, 4, 9, 9, 9]
    assert cumulative_targets(lambda t: min(t, 2), 9, 3, 3).tolist() == [
        0,
        1,
        2,
        2,
    ]  # not all of it
    assert cumulative_targets(lambda t: 5, 9, 2, 2).tolist() == [0, 5, 5]  # at once, in step 1


class Short:
    def targets(self, budget: int, steps: int) -> list[int]:
        return [0, budget]


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        (lambda t: 5 - t, r"at step 1 is 4, but must be 5 \(the one before"),
        (lambda t: t / 2, "target at step 0 must be an int, got 0.0"),
        (lambda t: t > 1, "must be an int, got False"),
        (lambda t: -1, "at step 0 is -1, but must be 0"),
        (lambda t: 10 * t, "at step 1 is 10, but must be .* to 9"),
        (Short(), "expected 4 targets, got 2"),
        (Uniform, r"must be an instance: write Uniform\(\)"),
        ("uniform", "schedule must be Uniform"),
    ],
)
def test_wrong_schedules_are_refused(schedule, message):
    with pytest.raises(ValueError, match=message):
        cumulative_targets(schedule, 9, 3, 3)


@given(quotas=st.lists(st.integers(0, 100), min_size=1, max_size=20))
def test_buffers_hold_two_regular_quotas(quotas):
    targets = torch.tensor([0, *quotas]).cumsum(0)
    assert max_quota(targets, int(targets[-1])) == min(2 * max(quotas), sum(quotas))

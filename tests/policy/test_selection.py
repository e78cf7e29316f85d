"""Budgets and selections."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import Parameter

from sparse_optim import D3, Increment, IncrementalMaskedAdamW, Linear, MaskedAdamW, Static, Warmup
from sparse_optim.policy.defaults import default_every
from sparse_optim.policy.selection import resolve_budget


@given(share=st.floats(1e-9, 1.0), pool=st.integers(1, 10**10))
def test_a_share_is_rounded_but_never_to_nothing(share, pool):
    entries = resolve_budget(share, pool)
    assert isinstance(entries, int)
    assert 1 <= entries <= pool
    assert abs(entries - share * pool) <= max(0.5, 1 - share * pool)


@given(pool=st.integers(1, 10**10), data=st.data())
def test_a_count_is_kept(pool, data):
    budget = data.draw(st.integers(1, pool))
    assert resolve_budget(budget, pool) == budget


def test_one_is_an_entry_and_one_point_zero_is_everything():
    assert resolve_budget(1, 500) == 1
    assert resolve_budget(1.0, 500) == 500


@pytest.mark.parametrize(
    ("budget", "pool", "message"),
    [
        (0, 9, "budget must be 1 to 9"),
        (-3, 9, "budget must be 1 to 9"),
        (10, 9, "budget must be 1 to 9"),
        (0.0, 9, "above 0 and at most 1, got 0.0"),
        (1.5, 9, "give an int to count entries"),
        (float("nan"), 9, "share of the pool"),
        (True, 9, "must be an int"),
        ("5", 9, "must be an int"),
        (1, 0, "the pool is empty.*set requires_grad on what is to be ranked"),
    ],
)
def test_wrong_budgets_are_refused(budget, pool, message):
    with pytest.raises(ValueError, match=message):
        resolve_budget(budget, pool)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"total_steps": 0}, "total_steps must be at least 1, got 0"),
        ({"total_steps": 2.0}, "total_steps must be an int, got 2.0"),
        ({"total_steps": True}, "total_steps must be an int"),
        ({"total_steps": 5, "unmask_steps": 6}, r"unmask_steps must be 1 to 5 .*, got 6"),
        ({"total_steps": 5, "unmask_steps": 0}, "unmask_steps must be 1"),
        ({"total_steps": 5, "unmask_steps": 0.0}, "a share of the run, above 0 and at most 1"),
        ({"total_steps": 5, "unmask_steps": 5.0}, "got 5.0; give an int to count steps"),
        ({"total_steps": 5, "unmask_steps": True}, "must be an int .* or a float .*, got True"),
        ({"total_steps": 5, "unmask_steps": None}, "must be an int .* or a float .*, got None"),
    ],
)
def test_wrong_steps_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Increment(budget=3, **options)


def test_targets():
    assert Increment(10, 4).targets(10).tolist() == [0, 2, 5, 7, 10]
    assert Increment(10, 4, Linear(), unmask_steps=2).targets(10).tolist() == [0, 7, 10, 10, 10]
    assert Increment(10, 5, unmask_steps=0.5).targets(10).tolist() == [0, 5, 10, 10, 10, 10]
    assert Increment(10, 4, unmask_steps=0.1).targets(10).tolist() == [0, 10, 10, 10, 10]
    assert Increment(4, 2, lambda t: t).targets(4).tolist() == [0, 1, 2]
    assert Static(7).targets(7).tolist() == [0, 7]


def test_sampled_runs_unmask_in_a_few_steps_at_least():
    assert [default_every(steps, True) for steps in (1, 7, 20, 60, 64, 1000)] == [
        1,
        1,
        5,
        15,
        16,
        16,
    ]
    assert default_every(1000, False) == 1


@pytest.mark.parametrize("schedule", [Warmup(0.5, 10), lambda t: 3 * t])
def test_a_schedule_of_ones_own_says_when_the_budget_is_spent(schedule):
    params = [Parameter(torch.zeros(400))]
    optimizer = IncrementalMaskedAdamW(params, budget=300, total_steps=100, schedule=schedule)
    targets = optimizer.selection.targets(300).tolist()
    assert targets[20] < 300
    assert targets[100] == 300
    early = IncrementalMaskedAdamW(params, budget=300, total_steps=100, schedule=Linear())
    assert early.selection.targets(300).tolist()[20] == 300


def test_a_share_counts_only_what_can_be_unmasked():
    """Entries that require no gradient, dense groups and frozen groups are no part of the pool."""
    held = [torch.zeros(100) for _ in range(4)]
    optimizer = MaskedAdamW(
        [
            {"params": [Parameter(held[0]), Parameter(held[1], requires_grad=False)]},
            {"params": [Parameter(held[2])], "unmask": "all"},
            {"params": [Parameter(held[3])], "unmask": "none"},
        ],
        importance=D3(),
        selection=Static(0.5),
    )
    assert optimizer.metrics()["budget"] == 50

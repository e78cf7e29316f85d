"""Targets as a formula: the same numbers as the table, on every backend, however long the run."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from op_cases import assert_same_bits, make_case

from sparse_optim import IncrementalMaskedAdamW, Linear, Uniform, Warmup
from sparse_optim.backends.operands import max_quota
from sparse_optim.backends.scoring import step_quota
from sparse_optim.backends.targets import (
    budget_of,
    check_targets,
    formula,
    is_formula,
    largest_quota,
    same_targets,
    target_at,
    total_steps,
)
from sparse_optim.policy import schedule as policy
from sparse_optim.policy.schedule import cumulative_targets

SCHEDULES = st.one_of(
    st.just(Uniform()),
    st.just(Linear()),
    st.builds(Warmup, share=st.floats(0, 1), steps=st.integers(1, 60)),
)


def both(schedule, budget: int, total: int, steps: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A schedule as a table and as a formula."""
    rest = [(total - steps, 0, 1)] if total > steps else []
    made = formula([*schedule.pieces(budget, steps), *rest])
    return cumulative_targets(schedule, budget, total, steps), made


@given(SCHEDULES, st.integers(1, 2**33 - 1), st.integers(1, 200), st.integers(0, 50))
def test_a_formula_gives_the_table(schedule, budget, steps, rest):
    table, made = both(schedule, budget, steps + rest, steps)
    assert [int(target_at(made, torch.tensor([t]))) for t in range(-1, table.numel() + 2)] == [
        0, *table.tolist(), budget, budget,
    ]  # fmt: skip
    assert (total_steps(made), budget_of(made)) == (total_steps(table), budget_of(table))
    assert largest_quota(table) <= largest_quota(made) <= largest_quota(table) + 1
    assert same_targets(table, made)
    check_targets(made, budget)


@given(SCHEDULES, st.integers(1, 30), st.integers(1, 40), st.integers(0, 50))
def test_every_backend_asks_for_the_same_quota(schedule, budget, steps, step):
    """cpp by its operator; CUDA and Triton in `quota_cases`."""
    table, made = both(schedule, budget, steps + 3, steps)
    for backend in ("reference", "cpp"):
        found = []
        for targets in (table, made):
            case = make_case([600], num_active=3, quota=40, seed=step)
            case.targets = targets
            case.active.progress[0] = step
            ops = pytest.importorskip(f"sparse_optim.backends.{backend}")
            case.step(ops, until="cut")
            found.append(case.new_entries())
        assert found[0] == found[1]
        assert len(found[0]) == int(step_quota(table, case.active.progress, 43))


@pytest.mark.parametrize("schedule", [Uniform(), Linear(), Warmup(0.3, 20)])
def test_long_runs_keep_a_formula(schedule, monkeypatch):
    """And unmask what the table says, step by step."""
    state = {}
    for limit in (10, 10**6):
        monkeypatch.setattr(policy, "TABLE_STEPS", limit)
        torch.manual_seed(0)
        param = torch.nn.Parameter(torch.randn(900))
        optimizer = IncrementalMaskedAdamW(
            [("p", param)], budget=300, total_steps=60, schedule=schedule, unmask_steps=1.0
        )
        assert is_formula(optimizer.engine.targets) == (limit == 10)
        for _ in range(65):
            param.grad = torch.randn(900)
            optimizer.step()
        state[limit] = (param.detach().clone(), optimizer.state_dict(), optimizer)
    assert_same_bits(state[10][0], state[10**6][0])
    for limit, other in ((10, 10**6), (10**6, 10)):  # a checkpoint of either form loads
        state[limit][2].load_state_dict(state[other][1])
        assert state[limit][2].metrics()["budget"] == 300


class Late(Uniform):
    """All of it in the last step."""

    def targets(self, budget, steps):
        return [0] * steps + [budget]


def test_a_subclass_that_changes_the_targets_has_no_formula():
    for total in (100, policy.TABLE_STEPS + 100):
        table = cumulative_targets(Late(), 30, total, total)
        assert not is_formula(table)
        assert int(table[total // 2]) == 0


def test_a_billion_steps_take_no_memory():
    param = torch.nn.Parameter(torch.randn(900))
    for schedule in (Uniform(), Warmup(0.5, 10**8)):
        optimizer = IncrementalMaskedAdamW(
            [param], budget=300, total_steps=10**9, schedule=schedule, unmask_steps=1.0
        )
        assert optimizer.engine.targets.nbytes < 200
        assert optimizer.engine.total_steps == 10**9
    with pytest.raises(ValueError, match="would need a table of 1000000000 targets"):
        IncrementalMaskedAdamW(
            [param], budget=3, total_steps=10**9, schedule=lambda t: min(t, 3), unmask_steps=1.0
        )


@pytest.mark.parametrize(
    "damage",
    [
        lambda v: v.__setitem__((0, 0), 1),
        lambda v: v.__setitem__((1, 0), 0),
        lambda v: v.__setitem__((0, 2), -1),
        lambda v: v.__setitem__((0, 3), 3),
        lambda v: v.__setitem__((2, 1), 10**9),
        lambda v: v.__setitem__((1, 1), 5),
    ],
)
def test_a_damaged_formula_is_refused(damage):
    made = formula([(10, 20, 2), (5, 10, 1)])
    check_targets(made, 30)
    damage(made)
    with pytest.raises(ValueError, match="do not rise from 0"):
        check_targets(made, 30)
    for wrong in (made[:1], made[:, :3], made.view(-1)):
        with pytest.raises(ValueError, match="do not rise from 0"):
            check_targets(wrong, 30)


def test_the_quota_has_room_for_a_shortfall():
    made = formula([(7, 100, 1)])
    assert max_quota(made, 100) == 2 * 15

"""Loud and quiet steps: which call unmasks, how many entries, and what the host knows of it."""

from __future__ import annotations

import copy

import pytest
import torch
from op_cases import assert_same_bits
from torch import Tensor
from training import new_params, set_grads

from sparse_optim import IncrementalMaskedAdamW, Linear, MaskedAdamW, Uniform, Warmup
from sparse_optim.backends.targets import ahead, largest_quota, target_at
from sparse_optim.engine import completion
from sparse_optim.policy.schedule import cumulative_targets

SCHEDULES = [Uniform(), Linear(), Warmup(0.3, 5)]
ENTRIES = 60


def build(**options) -> tuple[Tensor, MaskedAdamW]:
    (param,) = new_params((ENTRIES,))
    given = {"lr": 0.01, "budget": 40, "total_steps": 17, "unmask_steps": 1.0, **options}
    return param, IncrementalMaskedAdamW([param], **given)


def step(param: Tensor, optimizer: MaskedAdamW, call: int, good: bool = True) -> int:
    """A call on random gradients; the entries that are active after it."""
    generator = torch.Generator().manual_seed(call)
    param.grad = torch.randn(param.shape, generator=generator) * (1.0 if good else torch.inf)
    optimizer.step()
    return int(optimizer.engine.active.progress[1])


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
@pytest.mark.parametrize("every", [1, 2, 3, 5, 16, 17, 18, 100])
def test_the_number_of_updates_is_exact(every, schedule):
    """The sum over steps t = 1..T of target(min(every * ceil(t / every), T))."""
    param, optimizer = build(every=every, schedule=schedule)
    table = schedule.targets(40, 17)
    active = [step(param, optimizer, call) for call in range(17)]
    assert active == [table[min(every * -(-t // every), 17)] for t in range(1, 18)]


def test_one_updates_as_the_closed_form_says():
    """(B T + B - T + gcd(B, T)) / 2 entry updates for every = 1."""
    param, optimizer = build(budget=40, total_steps=10)
    assert sum(step(param, optimizer, call) for call in range(10)) == (400 + 40 - 10 + 10) // 2


@pytest.mark.parametrize("steps", [1, 2, 7, 100, 20_000])
@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
@pytest.mark.parametrize("total", [90, 9000])
def test_targets_that_come_later(total, schedule, steps):
    """Of a table, and of the formula that long runs have."""
    targets = cumulative_targets(schedule, 31_000, total, total)
    assert targets.dim() == (2 if total == 9000 else 1)
    later = ahead(targets, steps)
    table = schedule.targets(31_000, total)
    for t in (0, 1, 5, 6, 89, 90, 8000, 9000, 10**6):
        want = table[min(t + steps, total)]
        assert int(target_at(later, torch.tensor([t]))) == want
    differences = [table[min(t + steps, total)] - table[t] for t in range(total + 1)]
    most = largest_quota(targets, steps)
    assert max(differences) <= most
    assert most <= min(max(differences) + (total == 9000), 31_000)


def test_calls_count_whether_applied_or_skipped():
    """A skipped loud call is made up for at the next one; the phase stays."""
    param, optimizer = build(every=3, budget=34)
    good = [True, True, True, False, True, False, True, True, True, True]
    active = [step(param, optimizer, call, ok) for call, ok in enumerate(good)]
    # loud at calls 0, 3 (skipped), 6 (four steps applied), 9 (seven)
    assert active == [6, 6, 6, 6, 6, 6, 14, 14, 14, 20]


def test_calls_without_gradients_do_not_count():
    param, optimizer = build(every=2)
    for call in range(4):
        step(param, optimizer, call)
        param.grad = None
        optimizer.step()
        assert optimizer.engine.calls == call + 1


def test_a_shortfall_is_made_up_for_in_phase():
    """After `unmask_steps` calls stay loud in phase only while entries are missing."""
    param, optimizer = build(every=3, unmask_steps=6, budget=12)
    loud = []
    for call in range(17):
        loud.append(optimizer.engine.loud)
        param.grad = torch.zeros(ENTRIES)
        param.grad[: 3 if call < 9 else 30] = 1.0  # too few above zero at first
        optimizer.step()
    assert loud == [call in (0, 3, 6, 9) for call in range(17)]
    assert int(optimizer.engine.active.progress[1]) == 12


def test_a_finished_budget_stays_quiet_until_it_grows():
    param, optimizer = build(total_steps=5, every=2)
    for call in range(7):
        step(param, optimizer, call)
    assert not optimizer.engine.loud
    optimizer.extend(budget=50, total_steps=12)
    assert [optimizer.engine.calls, optimizer.engine.loud] == [7, False]
    step(param, optimizer, 7)
    assert optimizer.engine.loud
    assert step(param, optimizer, 8) > 40


@pytest.mark.parametrize("every", [0, -1, 1.5, True, "2"])
def test_numbers_of_calls_that_are_refused(every):
    with pytest.raises(ValueError, match="every must be an int of at least 1"):
        build(every=every)


# What the host knows.


def run_with_lag(monkeypatch, lag: int, steps: int, **options) -> list[bool]:
    monkeypatch.setitem(completion.LAG, "cpu", lag)
    param, optimizer = build(budget=20, total_steps=4, **options)
    loud = []
    for call in range(steps):
        loud.append(optimizer.engine.loud)
        step(param, optimizer, call)
    return loud


def test_completion_is_known_at_a_fixed_lag(monkeypatch):
    """Never earlier: a copy that has arrived by chance may not make a step quiet."""
    assert run_with_lag(monkeypatch, 0, 8) == [True] * 4 + [False] * 4
    assert run_with_lag(monkeypatch, 2, 8) == [True] * 6 + [False] * 2
    assert run_with_lag(monkeypatch, 2, 8, every=2) == [
        True,
        False,
        True,
        False,
        True,
        *[False] * 3,
    ]


@pytest.mark.parametrize("steps", range(8))
def test_a_resumed_run_learns_of_completion_when_the_unbroken_one_does(monkeypatch, steps):
    monkeypatch.setitem(completion.LAG, "cpu", 2)
    param, optimizer = build(budget=20, total_steps=4)
    for call in range(steps):
        step(param, optimizer, call)
    twin, resumed = build(budget=20, total_steps=4)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    copied = copy.deepcopy(optimizer)
    for call in range(steps, 9):
        assert resumed.engine.loud == optimizer.engine.loud == copied.engine.loud, call
        for each in (optimizer, resumed, copied):
            step(each.param_groups[0]["params"][0], each, call)
    assert param is not twin


# The norm of what moves.


@pytest.mark.parametrize("backend", ["reference", "cpp"])
@pytest.mark.parametrize("fuse", [False, True])
def test_the_norm_of_active_gradients(backend, fuse):
    """With this step's new entries and the dense group; what is frozen counts nowhere."""
    params = new_params((40, 10), (70,), (9,))
    optimizer = IncrementalMaskedAdamW(
        [{"params": params[:2]}, {"params": params[2:], "unmask": "all"}], lr=0.01, budget=60,
        total_steps=6, every=2, norm="active", max_grad_norm=0.5, backend=backend,
        fuse_backward=fuse, unmask_steps=1.0,
    )  # fmt: skip
    for call in range(8):
        generator = torch.Generator().manual_seed(call)
        values = [torch.randn(param.shape, generator=generator) for param in params]
        if call == 4:
            values[1] = None  # a parameter without a gradient in this step
        loss = sum((p * v).sum() for p, v in zip(params, values, strict=True) if v is not None)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        squares = values[2].double().square().sum()
        for value, position in zip(values, optimizer.active_entries().values(), strict=False):
            if value is not None:
                squares += value.view(-1)[position].double().square().sum()
        torch.testing.assert_close(optimizer.grad_norm, squares.sqrt())
        factor = float(optimizer.engine.work.scalars.grad_factor)
        assert factor == pytest.approx(0.5 / (float(squares.sqrt()) + 1e-6), rel=1e-6)
    assert optimizer.metrics()["active"] == 60


def test_quiet_steps_read_active_gradients_alone():
    """An infinite frozen gradient then skips nothing; with norm="all" it does."""
    for norm, skipped in (("active", 1), ("all", 2)):
        param, optimizer = build(every=3, norm=norm)
        step(param, optimizer, 0)
        positions = next(iter(optimizer.active_entries().values()))
        frozen = next(i for i in range(ENTRIES) if i not in positions)
        for call in (1, 2, 3):
            set_grads([param], 1.0)
            if call != 2:
                param.grad[frozen] = torch.inf
            optimizer.step()
        assert optimizer.metrics()["skipped_steps"] == skipped


def test_every_without_a_model_unmasks_as_with_one():
    """Dense gradients on quiet steps: nothing else than the calls that unmask changes."""
    runs = [build(every=4, max_grad_norm=1.0, norm=norm) for norm in ("all", "active")]
    for call in range(17):
        sets = []
        for param, optimizer in runs:
            step(param, optimizer, call)
            sets.append(next(iter(optimizer.active_entries().values())))
        assert_same_bits(*sets)

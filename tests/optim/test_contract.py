"""What MaskedAdamW promises of counts, order, skips and the layouts of gradients.

Faults that were planted by hand, and what saw each: one regular quota a step instead of two
(test_zero_gradients_...), weight decay on frozen entries (test_the_best_are_unmasked_and_stay),
dense groups that step where the rest is skipped (test_a_gradient_that_is_not_finite_...).
"""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from op_cases import DTYPES, EXPS, assert_same_bits, bits, unaligned
from oracle import score
from oracle_checks import assert_matches, rank_oracles
from torch.nn import Parameter
from training import active_of, everything, give_grads, new_params, set_grads, snapshot

from sparse_optim import D3, IncrementalMaskedAdamW, MaskedAdamW, Static

# Counts and order


@given(budget=st.integers(1, 60), steps=st.integers(1, 40))
@settings(max_examples=30)
def test_entry_updates_over_a_run(budget, steps):
    """Exactly (B T + B - T + gcd(B, T)) / 2: half of what a static mask would take."""
    (param,) = new_params((60,))
    optimizer = IncrementalMaskedAdamW(
        [param], lr=1e-3, budget=budget, total_steps=steps, unmask_steps=1.0
    )
    updates = 0
    generator = torch.Generator().manual_seed(budget)
    for _ in range(steps):
        param.grad = torch.randn(60, generator=generator)
        before = param.detach().clone()
        optimizer.step()
        moved = int((bits(param) != bits(before)).sum())
        assert moved == optimizer.metrics()["active"]
        updates += moved
    assert updates == (budget * steps + budget - steps + math.gcd(budget, steps)) // 2


@given(
    exp=st.sampled_from(EXPS),
    dtype=st.sampled_from(DTYPES),
    kind=st.sampled_from(["normal", "ties", "equal", "rows"]),
    budget=st.integers(1, 700),
    steps=st.integers(1, 9),
    seed=st.integers(0, 1000),
)
@settings(max_examples=50)
def test_the_best_are_unmasked_and_stay(exp, dtype, kind, budget, steps, seed):
    """Count = target; the mask grows; frozen bits; no frozen entry outranks an unmasked one."""
    generator = torch.Generator().manual_seed(seed)
    params = new_params((20, 30), (0,), (1,), (99,), dtype=dtype, seed=seed)
    initial = snapshot(params)
    optimizer = IncrementalMaskedAdamW(
        params, lr=0.1, weight_decay=0.5, budget=budget, total_steps=steps,
        importance=D3(exp, 0.25), unmask_steps=1.0,
    )  # fmt: skip
    known: set[tuple[str, int]] = set()
    for t in range(1, steps + 1):
        grads = give_grads(params, kind, generator)
        scores = {}
        for name, param, grad in zip(optimizer.engine.pool.names, params, grads, strict=True):
            values = score(grad, param, exp, 0.25)
            scores |= {(name, i): float(value) for i, value in enumerate(values)}
        optimizer.step()
        now = active_of(optimizer)
        nonzero = sum(value > 0 for key, value in scores.items() if key not in known)
        assert len(now - known) == min(budget * t // steps - len(known), nonzero)
        assert known <= now
        if now - known:
            worst = min(scores[key] for key in now - known)
            left = [value for key, value in scores.items() if key not in now]
            assert worst >= max(left, default=0.0)
        known = now
    for name, param, before in zip(optimizer.engine.pool.names, params, initial, strict=True):
        frozen = torch.ones(param.numel(), dtype=torch.bool)
        frozen[optimizer.active_entries()[name]] = False
        assert_same_bits(param.detach().view(-1)[frozen], before.view(-1)[frozen])


def test_equal_gradients_go_by_position(backend):
    params = new_params((7,), (1000,), (3,))
    optimizer = IncrementalMaskedAdamW(
        params, budget=600, total_steps=4, backend=backend, unmask_steps=1.0
    )
    for t in range(1, 5):
        set_grads(params, -0.125)
        optimizer.step()
        counts = [positions.numel() for positions in optimizer.active_entries().values()]
        assert counts == [7, 150 * t - 7, 0]
        assert optimizer.active_entries()["group0.param1"].tolist() == list(range(150 * t - 7))


def test_zero_gradients_unmask_nothing_and_carry_the_quota(backend):
    """A shortfall is made up later, at most two regular quotas a step."""
    params = new_params((500,))
    initial = snapshot(params)
    optimizer = IncrementalMaskedAdamW(
        params, budget=100, total_steps=10, weight_decay=0.5, backend=backend, unmask_steps=1.0
    )
    set_grads(params, 0.0)
    for _ in range(4):
        optimizer.step()
    assert optimizer.metrics()["active"] == 0
    assert optimizer.metrics()["step"] == 4
    assert_same_bits(params[0].detach(), initial[0])
    set_grads(params, 1.0)
    active = []
    for _ in range(8):
        optimizer.step()
        active.append(optimizer.metrics()["active"])
    assert active == [20, 40, 60, 80, 90, 100, 100, 100]


def test_partial_shortfall_unmasks_what_there_is():
    params = new_params((500,))
    optimizer = MaskedAdamW(params, importance=D3(), selection=Static(200))
    params[0].grad = torch.zeros(500)
    params[0].grad[100:150] = 1.0
    optimizer.step()
    assert optimizer.active_entries()["group0.param0"].tolist() == list(range(100, 150))
    params[0].grad.fill_(1.0)
    optimizer.step()
    assert optimizer.metrics()["active"] == 200


def test_nothing_is_unmasked_past_the_last_step():
    params = new_params((50,))
    optimizer = IncrementalMaskedAdamW(params, budget=7, total_steps=3, unmask_steps=1.0)
    set_grads(params, 1.0)
    for _ in range(6):
        optimizer.step()
    assert optimizer.metrics()["active"] == 7
    assert optimizer.metrics()["budget_left"] == 0
    assert optimizer.metrics()["step"] == 6


def test_fewer_entries_than_steps():
    params = new_params((50,))
    optimizer = IncrementalMaskedAdamW(params, budget=3, total_steps=9, unmask_steps=1.0)
    counts = []
    for _ in range(9):
        set_grads(params, 1.0)
        optimizer.step()
        counts.append(optimizer.metrics()["active"])
    assert counts == [3 * t // 9 for t in range(1, 10)]


def test_forty_percent_of_the_entries_at_once_all_tied(backend):
    params = new_params((700, 300), (50_000,), dtype=torch.bfloat16)
    optimizer = MaskedAdamW(params, importance=D3(), selection=Static(0.4), backend=backend)
    set_grads(params, 0.5)
    optimizer.step()
    positions = optimizer.active_entries()
    assert optimizer.metrics()["active"] == 104_000
    assert torch.equal(positions["group0.param0"], torch.arange(104_000))
    assert positions["group0.param1"].numel() == 0


# Gradients: missing, not contiguous, not finite


@pytest.mark.parametrize("how", ["transposed", "offset", "strided", "expanded"])
def test_layouts_of_gradients(how, backend):
    """Any strides of a gradient give what its contiguous copy gives."""
    generator = torch.Generator().manual_seed(2)
    values = torch.randn(40, 30, generator=generator)
    layout = {
        "transposed": lambda: values.t().contiguous().t(),
        "offset": lambda: unaligned(values),
        "strided": lambda: torch.stack([values, values], dim=-1)[..., 0],
        "expanded": lambda: values[:1].expand(40, 30),
    }[how]()
    results = []
    for grad in (layout, layout.contiguous()):
        params = new_params((40, 30))
        optimizer = IncrementalMaskedAdamW(
            params, budget=200, total_steps=2, backend=backend, unmask_steps=1.0
        )
        params[0].grad = grad
        for _ in range(2):
            optimizer.step()
        results.append((params[0].detach(), optimizer.engine.active.position))
    for got, expected in zip(*results, strict=True):
        assert_same_bits(got, expected)


def test_parameters_that_are_slices_of_one_buffer(backend):
    """Unaligned neighbours in one storage, as flattened models have them."""
    flat = torch.randn(1 + 513 + 7, generator=torch.Generator().manual_seed(0))
    before = flat.clone()
    params = [Parameter(flat[1:514]), Parameter(flat[514:])]
    optimizer = MaskedAdamW(params, importance=D3(), selection=Static(300), backend=backend)
    exact, same = rank_oracles(optimizer)
    grads = give_grads(params, "normal", torch.Generator().manual_seed(1))
    optimizer.step()
    exact.step(grads)
    same.step(grads)
    assert_matches(optimizer, exact, same)
    assert flat[0] == before[0]


@pytest.mark.parametrize("fuse", [False, True], ids=["", "fuse_backward"])
def test_the_default_dtype_does_not_count(backend, fuse):
    """Scripts that load large models leave bfloat16 behind."""
    states = []
    for default in (torch.float32, torch.bfloat16):
        params = [Parameter(torch.linspace(-1, 1, 60).to(dtype)) for dtype in DTYPES]
        torch.set_default_dtype(default)
        try:
            optimizer = IncrementalMaskedAdamW(
                params, budget=9, total_steps=3, importance=D3(exp=-1.0),
                max_grad_norm=1.0, backend=backend, fuse_backward=fuse, unmask_steps=1.0,
            )  # fmt: skip
            for step in range(3):
                for param in params:
                    param.grad = (param.detach() + step).sin()
                optimizer.step()
        finally:
            torch.set_default_dtype(torch.float32)
        states.append([*vars(optimizer.engine.active).values(), *params])
    for one, other in zip(*states, strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)


def test_a_step_without_gradients_is_no_step():
    params = new_params((5,), (0,))
    optimizer = IncrementalMaskedAdamW(params, budget=2, total_steps=2, unmask_steps=1.0)
    optimizer.step()
    params[1].grad = torch.empty(0)
    optimizer.step()
    assert optimizer.metrics()["step"] == 0


def test_missing_gradients_freeze_the_tensor_for_this_step():
    params = new_params((50,), (50,))
    optimizer = IncrementalMaskedAdamW(
        params, budget=60, total_steps=2, weight_decay=0.5, unmask_steps=1.0
    )
    give_grads(params, "normal", torch.Generator().manual_seed(0))
    optimizer.step()
    before, moments = snapshot(params), optimizer.engine.active.segment(1)["exp_avg"].clone()
    assert moments.numel()
    params[1].grad = None
    optimizer.step()
    assert_same_bits(params[1].detach(), before[1])
    assert_same_bits(optimizer.engine.active.segment(1)["exp_avg"], moments)
    assert optimizer.metrics()["active"] == 60  # all thirty more came from the other tensor
    assert optimizer.metrics()["active/group0.param1"] == moments.numel()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["rank", "all", "none"])
def test_a_gradient_that_is_not_finite_skips_the_whole_step(where, value, backend):
    """ "none" is not ours: its gradient counts neither in the norm nor in the skip."""
    ranked, dense, frozen = new_params((300,), (20,), (30,))
    optimizer = IncrementalMaskedAdamW(
        [{"params": [ranked]}, {"params": [dense], "unmask": "all"},
         {"params": [frozen], "unmask": "none"}],
        budget=100, total_steps=5, max_grad_norm=1.0, backend=backend, unmask_steps=1.0,
    )  # fmt: skip
    params = [ranked, dense, frozen]
    generator = torch.Generator().manual_seed(0)
    for _ in range(2):
        give_grads(params, "normal", generator)
        optimizer.step()
    before = everything(optimizer)
    give_grads(params, "normal", generator)
    {"rank": ranked, "all": dense, "none": frozen}[where].grad[7] = value
    optimizer.step()
    if where == "none":
        assert optimizer.metrics()["skipped_steps"] == 0
        assert optimizer.metrics()["step"] == 3
        return
    for got, expected in zip(everything(optimizer), before, strict=True):
        assert_same_bits(got, expected)
    assert optimizer.metrics()["skipped_steps"] == 1
    assert optimizer.metrics()["step"] == 2
    give_grads(params, "normal", generator)
    optimizer.step()
    assert optimizer.metrics()["active"] == 60

"""The specification itself, against plain Python, float64 and torch.optim.AdamW."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from op_cases import (
    DTYPES,
    EDGE_SIZES,
    EXPS,
    Case,
    assert_as_exact,
    assert_same_bits,
    bits,
    make_case,
)

from sparse_optim.backends import reference, scoring


def sorted_by_hand(case: Case) -> list[tuple[int, int, np.float32]]:
    """Frozen entries of positive importance, best first, by Python's sort; numpy float32 scores."""
    ranked = []
    segments = case.active.offsets.tolist()
    eps = np.float32(case.eps)
    for index, (grad, param) in enumerate(zip(case.grads, case.params, strict=True)):
        taken = set(case.active.position[segments[index] : segments[index + 1]].tolist())
        for position, (g, p) in enumerate(
            zip(grad.float().numpy(), param.float().numpy(), strict=False)
        ):
            base = np.abs(p) + eps
            score = {
                0.0: lambda g=g, base=base: np.abs(g),
                1.0: lambda g=g, base=base: np.abs(g) / base,
                2.0: lambda g=g, base=base: np.abs(g) / (base * base),
                0.5: lambda g=g, base=base: np.abs(g) / np.sqrt(base),
                -1.0: lambda g=g, base=base: np.abs(g) * base,
                -0.5: lambda g=g, base=base: np.abs(g) * np.sqrt(base),
            }[case.exp]()
            if position not in taken and score > 0:
                ranked.append((index, position, score))
    return sorted(ranked, key=lambda entry: -entry[2])  # stable: ties stay in global order


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("exp", [*EXPS, 0.3, -1.7])
def test_importance_is_the_formula(exp, dtype):
    generator = torch.Generator().manual_seed(1)
    grad, param = (torch.randn(2, 1000, generator=generator)).to(dtype)
    exact = grad.double().abs() / (param.double().abs() + 1e-3) ** exp
    score = scoring.importance(grad, param, exp, 1e-3)
    assert score.dtype == torch.float32
    # At most four roundings of half a unit each; pow adds up to two units.
    torch.testing.assert_close(
        score.double(), exact, rtol=4 * 2**-24 if exp in EXPS else 2**-21, atol=0
    )


def test_keys_keep_the_order_and_drop_zero_and_nan():
    score = torch.tensor([0.0, -0.0, math.nan, 1e-45, 1e-38, 0.5, 1.0, 3e38, math.inf])
    key = scoring.importance_key(score)
    assert key[:3].tolist() == [0, 0, 0]
    assert key[3:].tolist() == sorted(set(key[3:].tolist()))
    assert int(key[3]) == 1


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tile", [1, 16, 512])
def test_scan_by_hand(dtype, tile):
    sizes = [5, 0, tile - 1, tile, tile + 1, 77]
    case = make_case(
        sizes, dtypes=[dtype], num_active=20, quota=3, tile=tile, dense_sizes=[7], missing=[5],
        max_grad_norm=0.5,
    )  # fmt: skip
    case.work.tiles.max.fill_(-1)
    case.work.scalars.grad_scale.fill_(4.0)
    untouched = case.active.grad.fill_(math.nan).clone()
    case.step(reference, until="clip")
    offsets, tile_max, squares = case.active.offsets.tolist(), [], []
    for index, size in enumerate(sizes):
        grad = case.grads[index].float().numpy()
        segment = slice(offsets[index], offsets[index + 1])
        taken = case.active.position[segment].tolist()
        if grad.size == 0:
            tile_max += [0] * -(-size // tile)
            squares.append(0.0)
            assert_same_bits(case.active.grad[segment], untouched[segment])
            continue
        squares.append(float((grad.astype(np.float64) ** 2).sum()))
        assert case.active.grad[segment].tolist() == grad[taken].tolist()
        kept = np.abs(grad)
        kept[taken] = 0
        tile_max += [kept[i : i + tile].max().view(np.int32) for i in range(0, size, tile)]
    squares.append(float(case.dense_grads[0].double().square().sum()))
    assert case.work.tiles.max.tolist() == tile_max
    assert float(case.work.scalars.found_inf) == 0
    assert case.work.norms.square().tolist() == pytest.approx(squares, rel=1e-6)
    norm = math.sqrt(sum(squares)) / 4
    assert float(case.work.scalars.grad_norm) == pytest.approx(norm, rel=1e-6)
    assert float(case.work.scalars.grad_factor) == pytest.approx(0.5 / (norm + 1e-6) / 4, rel=1e-6)


@pytest.mark.parametrize("kind", ["normal", "ties", "equal", "zeros", "rows"])
@pytest.mark.parametrize("exp", EXPS)
def test_cut_is_a_stable_sort(kind, exp):
    sizes = [40, 0, 1, 130, 61]
    for quota in (1, 7, 100, 500):
        case = make_case(
            sizes, kind=kind, quota=quota, num_active=30, exp=exp, missing=[2], tile=16
        )
        expected = sorted_by_hand(case)
        case.step(reference, until="cut")
        wanted = int(case.targets[-1]) - 30
        winners = expected[:wanted]
        assert case.new_entries() == sorted(entry[:2] for entry in winners)
        if winners:
            assert float(case.work.new.threshold) == winners[-1][2]


def test_cut_evaluates_the_schedule():
    case = make_case([100], quota=10, num_active=20, step=3)
    case.targets = torch.tensor([0, 5, 10, 15, 30, 40])
    case.active.progress[0] = 3
    assert len(case.copy().step(reference, until="cut").new_entries()) == 10
    case.active.progress[0] = 99  # beyond the last step: the last target; the buffer holds ten
    assert len(case.copy().step(reference, until="cut").new_entries()) == 10
    case.active.progress[0] = 2
    assert case.copy().step(reference, until="cut").new_entries() == []  # the target is behind
    case.active.progress[0] = 3
    case.work.scalars.found_inf.fill_(1.0)
    assert case.copy().step(reference, until="cut").new_entries() == []


@pytest.mark.parametrize("dtype", DTYPES)
def test_append_keeps_global_order_and_state(dtype):
    case = make_case([50, 0, 700, 20], dtypes=[dtype], num_active=60, quota=45, kind="ties")
    before = case.copy()
    case.step(reference, until="append")
    added = set(case.new_entries())
    assert len(added) == 45
    assert int(case.active.progress[1]) == 105
    old = {}
    for index in range(4):
        segment = before.active.segment(index)
        for row, position in enumerate(segment["position"].tolist()):
            old[index, position] = {name: value[row].item() for name, value in segment.items()}
    for index in range(4):
        segment = case.active.segment(index)
        positions = segment["position"].tolist()
        assert positions == sorted(set(positions))
        for row, position in enumerate(positions):
            state = {name: value[row].item() for name, value in segment.items()}
            if (index, position) in added:
                fresh = {"position": position, "exp_avg": 0.0, "exp_avg_sq": 0.0, "unmask_step": 8}
                if dtype != torch.float32:
                    fresh["master"] = case.params[index][position].float().item()
                assert state == fresh
                old_or_new = case.grads[index][position].float().item()
                first = int(case.active.offsets[index])
                assert case.active.grad[first + row].item() == old_or_new
            else:
                assert state == old[index, position]


@pytest.mark.parametrize("bias_correction", ["entry", "global"])
@pytest.mark.parametrize("maximize", [False, True])
def test_everything_active_is_adamw(bias_correction, maximize):
    """Five steps with all entries active, against torch in float32 and in float64."""
    generator = torch.Generator().manual_seed(3)
    initial = torch.randn(300, generator=generator)
    case = make_case([300], quota=300, step=0, bias_correction=bias_correction)
    case.params[0].copy_(initial)
    sign = -1.0 if maximize else 1.0
    case.work.scalars.hyper[0] = torch.tensor(
        [1e-2, 0.9, 0.999, 1e-8, 0.1, sign], dtype=torch.float64
    )
    twins, adams = [], []
    for dtype in (torch.float32, torch.float64):
        twins.append(torch.nn.Parameter(initial.to(dtype)))
        adams.append(torch.optim.AdamW([twins[-1]], lr=1e-2, weight_decay=0.1, maximize=maximize))
    for _ in range(5):
        case.grads[0] = torch.randn(300, generator=generator)
        case.step(reference)
        for twin, adam in zip(twins, adams, strict=True):
            twin.grad = case.grads[0].to(twin.dtype)
            adam.step()
    assert int(case.active.progress[1]) == 300
    state32, state64 = (adam.state[twin] for adam, twin in zip(adams, twins, strict=True))
    assert_as_exact(case.params[0], twins[0].detach(), twins[1].detach(), "param")
    assert_as_exact(case.active.exp_avg, state32["exp_avg"], state64["exp_avg"], "exp_avg")
    assert_as_exact(
        case.active.exp_avg_sq, state32["exp_avg_sq"], state64["exp_avg_sq"], "exp_avg_sq"
    )


def test_update_skips_on_found_inf():
    case = make_case([50], num_active=10)
    before = case.copy()
    case.work.scalars.found_inf.fill_(1.0)
    case.step(reference)
    assert case.active.progress.tolist() == [7, 10, 1]
    assert_same_bits(case.params[0], before.params[0])
    assert_same_bits(case.active.exp_avg, before.active.exp_avg)


def test_update_leaves_tensors_without_gradient():
    case = make_case([40, 40], num_active=30, missing=[1], quota=0)
    before = case.copy()
    case.step(reference)
    assert_same_bits(case.params[1], before.params[1])
    assert (bits(case.params[0]) != bits(before.params[0])).any()
    assert int(case.active.progress[0]) == 8


@given(
    size=st.sampled_from(EDGE_SIZES),
    tile=st.sampled_from([1, 7, 128, 512]),
    seed=st.integers(0, 99),
)
@settings(max_examples=30)
def test_tile_abs_max_bounds_every_entry(size, tile, seed):
    param = torch.randn(size, generator=torch.Generator().manual_seed(seed)).bfloat16()
    bound = scoring.tile_abs_max(param, tile)
    assert bound.tolist() == [float(part.float().abs().max()) for part in param.split(tile) if size]

"""The C++ kernels against the reference: selections exact, floats within rounding.

That these tests can fail: faults that were planted by hand, and a test that saw each. The
sanitizers' harness saw every one of them too.

    cut     ties to the higher index, one tie too few          test_edge_sizes
            the last active entry of a tile not masked         test_edge_sizes
            active entries not masked at all                   test_kinds_of_gradients
            bounds of exp < 0 too low                          test_kinds_of_gradients
            floor one unit too high                            test_edge_sizes
            bin of the cut counted twice (radix)               test_many_candidates
    scan    active entries not masked                          test_edge_sizes
            last entry of an odd tile left out                 test_edge_sizes
            one entry beyond an odd tile read                  test_edge_sizes
            NaN taken for finite                               test_one_value_that_is_not_...
            float16 subnormals flushed to zero                 test_every_16_bit_gradient_is...
    append  offsets of later tensors one too small             test_edge_sizes
    update  age one too great, weight decay left out           test_edge_sizes
            eps scaled with the square root                    test_kinds_of_gradients
            bfloat16 truncated instead of rounded              test_every_16_bit_value_is_stored...
"""

import math

import pytest
import step_checks
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from op_cases import (
    DTYPES,
    EDGE_SIZES,
    EXPS,
    TILE,
    Case,
    assert_same_bits,
    fill_bounds,
    make_case,
)

from sparse_optim.backends import reference, scoring

cpp = pytest.importorskip(
    "sparse_optim.backends.cpp", reason="the C++ extension has not been built"
)


def assert_same_step(case: Case) -> Case:
    return step_checks.assert_same_step(case, cpp)


@pytest.mark.parametrize("noise", [(), (5, 3), (-(2**62), 2**32 - 1)], ids=["", "noise", "words"])
@pytest.mark.parametrize("tile", [1, 7, 512, 4096])
@pytest.mark.parametrize("kind", ["normal", "ties", "equal", "zeros", "rows"])
def test_scores_are_ranked_and_sampled(kind, tile, noise):
    """`rank` and the `cut` after it, over dtypes, odd tiles and a missing tensor."""
    case = make_case(
        [TILE + 1, 0, 70, 3 * TILE + 5, 9], dtypes=DTYPES, kind=kind, quota=90, num_active=60,
        missing=[2], tile=tile, offset_views=True,
    )  # fmt: skip
    case.noise = torch.tensor(noise, dtype=torch.int64)
    plain, fast = case.copy(), case.copy()
    for twin, ops in ((plain, reference), (fast, cpp)):
        ops.rank(*twin.rank_args(ops))
        ops.cut(*twin.cut_args(ops))
    for name in ("tile_max", "new_count", "threshold"):
        assert_same_bits(fast.buffer(name), plain.buffer(name), name)
    assert fast.new_entries() == plain.new_entries()
    assert int(fast.work.new.count) == (0 if kind == "zeros" else 90)


@pytest.mark.parametrize("tile", [100, 512, 4096])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tensors_that_several_tasks_scan(dtype, tile):
    """A task reads 512 KB; in both tensors many maxima are those of active entries."""
    case = make_case(
        [600_000, 270_001], dtypes=[dtype], grad_dtypes=[dtype], kind="rows", quota=300,
        num_active=90_000, tile=tile,
    )  # fmt: skip
    assert_same_step(case)


def test_noise_of_a_large_tensor():
    """Entries with a second draw (one in 65536), and a quota beyond the buffered one."""
    case = make_case([1_500_000], kind="equal", quota=70_000)
    case.noise = torch.tensor([8, 1])
    plain, fast = case.copy(), case.copy()
    for twin, ops in ((plain, reference), (fast, cpp)):
        ops.rank(*twin.rank_args(ops))
        ops.cut(*twin.cut_args(ops))
    assert_same_bits(fast.work.tiles.max, plain.work.tiles.max)
    assert fast.new_entries() == plain.new_entries()


@pytest.mark.parametrize("offset_views", [False, True], ids=["aligned", "offset"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", EDGE_SIZES)
def test_edge_sizes(size, dtype, offset_views):
    case = make_case(
        [size], dtypes=[dtype], num_active=size // 3, quota=max(size // 5, 1),
        offset_views=offset_views, seed=size,
    )  # fmt: skip
    fast = assert_same_step(case)
    assert int(fast.active.progress[1]) == int(case.targets[-1])


@pytest.mark.parametrize("beta1", step_checks.SMALL_BETAS)
def test_small_gradients_after_large_ones_are_not_lost(beta1):
    case = make_case([700, 90], dtypes=DTYPES[:2], num_active=300)
    assert_same_step(step_checks.fading(case, beta1))


@pytest.mark.parametrize("kind", ["normal", "ties", "equal", "zeros", "rows"])
@pytest.mark.parametrize("exp", EXPS)
@pytest.mark.parametrize("quota", [1, 40, 3000])
def test_kinds_of_gradients(quota, exp, kind):
    """Quotas below and above the number of tiles (24)."""
    sizes = [TILE * 7 + 3, 1, 0, TILE * 9, 77, TILE * 3 - 1]
    case = make_case(
        sizes, dtypes=DTYPES, kind=kind, quota=quota, num_active=500, exp=exp, eps=0.01, missing=[4]
    )  # fmt: skip
    assert_same_step(case)


@pytest.mark.parametrize("eps", [1e-30, 1e-3, 1.0, 1e30])
@pytest.mark.parametrize("exp", EXPS)
def test_extreme_eps(exp, eps):
    case = make_case([TILE * 5, 33], kind="rows", quota=50, num_active=20, exp=exp, eps=eps)
    case.params[0][:TILE] = 0.0
    case.params[0][TILE : 2 * TILE] *= 1e25
    fill_bounds(case)
    assert_same_step(case)


@pytest.mark.parametrize("tile", [1, 3, 16, 17, 500, 4096])
def test_tiles_of_any_size(tile):
    sizes = [tile - 1, tile, tile + 1, 2 * tile + 1, 1000]
    assert_same_step(
        make_case(sizes, dtypes=DTYPES, num_active=50, quota=30, tile=tile, kind="ties")
    )


@given(
    sizes=st.lists(st.sampled_from([*EDGE_SIZES, 5, 2000]), min_size=1, max_size=6),
    dtypes=st.lists(st.sampled_from(DTYPES), min_size=1, max_size=3),
    grad_dtypes=st.one_of(st.none(), st.lists(st.sampled_from(DTYPES), min_size=1, max_size=3)),
    kind=st.sampled_from(["normal", "ties", "equal", "zeros", "rows"]),
    quota=st.integers(0, 4000),
    num_active=st.integers(0, 1500),
    missing=st.sets(st.integers(0, 5)),
    dense_sizes=st.lists(st.sampled_from(EDGE_SIZES), max_size=2),
    exp=st.sampled_from(EXPS),
    bias_correction=st.sampled_from(["entry", "global"]),
    max_grad_norm=st.sampled_from([math.inf, 1.0]),
    offset_views=st.booleans(),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=150)
def test_any_step(**arguments):
    assert_same_step(make_case(**arguments))


@pytest.mark.parametrize("quota", [100, 9000, 70_000])
@pytest.mark.parametrize("exp", [0.0, 2.0, -1.0])
@pytest.mark.parametrize("kind", ["ties", "rows"])
def test_many_candidates(kind, exp, quota):
    """Buffers that overflow and are trimmed, and quotas that go by radix selection."""
    case = make_case(
        [90_000, 1, 70_000], dtypes=[torch.bfloat16], kind=kind, quota=quota, num_active=3000,
        exp=exp, eps=0.1,
    )  # fmt: skip
    plain, fast = case.copy().step(reference, "cut"), case.copy().step(cpp, "cut")
    assert int(fast.work.new.count) == quota
    for name in ("new_tensor", "new_position", "threshold"):
        assert_same_bits(fast.buffer(name), plain.buffer(name), name)


@pytest.mark.parametrize("quota", [2**16 - 1, 2**16, 2**16 + 1])
@pytest.mark.parametrize("exp", [0.0, 2.0])
def test_rows_of_other_scales_around_the_limit_of_the_buffer(exp, quota):
    """Winners crowd into few rows; up to 2^16 of them are collected, more go by radix selection."""
    generator = torch.Generator().manual_seed(quota)
    case = make_case([600 * 700, 513, 0], quota=quota, num_active=2000, exp=exp, eps=1.0)
    rows = torch.rand(600, 1, generator=generator) ** 4
    case.grads[0] = (torch.randn(600, 700, generator=generator) * rows).view(-1)
    plain, fast = case.copy().step(reference, "cut"), case.copy().step(cpp, "cut")
    assert int(fast.work.new.count) == quota
    for name in ("new_tensor", "new_position", "threshold"):
        assert_same_bits(fast.buffer(name), plain.buffer(name), name)


@pytest.mark.parametrize("exp", [0.0, 2.0, -1.0])
@pytest.mark.parametrize("quota", [1500, 6000])
def test_ties_across_bands_go_to_the_lower_index(exp, quota):
    """Tiles of equal bounds and of larger ones later: ties at the cut lie in several bands."""
    size = 4000 * TILE
    case = make_case([size, 3 * TILE], quota=quota, num_active=100, exp=exp, eps=1.0)
    for param in case.params:
        param.fill_(0.25)
    grad = torch.full((size,), 0.01)
    grad[7::TILE] = 0.5  # one in each tile: 4,000 ties
    grad[3 :: 2 * TILE] = 0.75 + torch.arange(2000) / 8000  # every other tile has a larger bound
    case.grads[:] = [grad, torch.full((3 * TILE,), 0.5)]
    fill_bounds(case)
    plain, fast = case.copy().step(reference, "cut"), case.copy().step(cpp, "cut")
    assert int(fast.work.new.count) == quota
    for name in ("new_tensor", "new_position", "threshold"):
        assert_same_bits(fast.buffer(name), plain.buffer(name), name)


@pytest.mark.parametrize("quota", [200_000, 260_000])
def test_hundreds_of_thousands_of_ties(quota):
    """A quota too large for a buffer: radix selection, ties by position."""
    size = 650_000
    case = make_case([size], dtypes=[torch.bfloat16], quota=quota, num_active=1000, kind="equal")
    case.grads[0][::7] = -0.5  # 92,858 above the tie
    plain, fast = case.copy().step(reference, "cut"), case.copy().step(cpp, "cut")
    assert int(fast.work.new.count) == quota
    assert_same_bits(fast.work.new.position, plain.work.new.position)
    assert float(fast.work.new.threshold) == 0.25


def test_ties_by_the_million_with_a_small_quota():
    """Every one of 3,000,000 entries ties with the cut; 5 are wanted."""
    grad = torch.full((3_000_000,), 1.0)
    grad[2_999_999] = 2.0
    case = make_case([10, 3_000_000], quota=5)
    case.grads[:] = [torch.zeros(10), grad]
    case.step(cpp, "cut")
    assert case.new_entries() == [(1, 0), (1, 1), (1, 2), (1, 3), (1, 2_999_999)]


@pytest.mark.parametrize("exp", [0.3, -0.7, 3.0])
def test_pow_agrees_where_scores_are_apart(exp):
    """Other exponents go through pow, which is not correctly rounded: scores 0.1% apart."""
    generator = torch.Generator().manual_seed(5)
    size = 4 * TILE + 9
    case = make_case([size], quota=100, num_active=30, exp=exp)
    score = 1.001 ** torch.randperm(size, generator=generator)
    case.grads[0] = score * (case.params[0].abs() + case.eps) ** exp
    plain, fast = case.copy().step(reference, "cut"), case.copy().step(cpp, "cut")
    assert fast.new_entries() == plain.new_entries()
    assert len(fast.new_entries()) == 100
    torch.testing.assert_close(
        fast.work.new.threshold, plain.work.new.threshold, rtol=2**-20, atol=0
    )


@pytest.mark.parametrize("exp", EXPS)
@pytest.mark.parametrize("value", [math.nan, math.inf], ids=["nan", "inf"])
def test_weights_that_are_not_finite(exp, value):
    """Such an entry ranks by the formula (NaN: never); the rest of its tile is not affected."""
    case = make_case([3 * TILE], quota=2 * TILE, exp=exp)
    case.params[0][[5, TILE + 1]] = value
    case.work.tiles.param_bound.copy_(
        scoring.tile_abs_max(case.params[0], TILE) if exp < 0 else case.work.tiles.param_bound
    )
    plain, fast = case.copy().step(reference, "cut"), case.copy().step(cpp, "cut")
    assert fast.new_entries() == plain.new_entries()
    assert_same_bits(fast.work.new.threshold, plain.work.new.threshold)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("place", ["frozen", "active", "dense", "tail", "first"])
def test_one_value_that_is_not_finite_skips_the_step(place, dtype, value):
    case = make_case(
        [TILE + 3, 40], dtypes=[dtype], num_active=25, quota=10, dense_sizes=[9], seed=4
    )
    position = int(case.active.position[0])
    where = {
        "frozen": (case.grads[1], next(i for i in range(40) if i not in case.active.position)),
        "active": (case.grads[0], position),
        "dense": (case.dense_grads[0], 8),
        "tail": (case.grads[0], TILE + 2),
        "first": (case.grads[0], 0),
    }
    tensor, index = where[place]
    tensor[index] = value
    before = case.copy()
    for ops in (reference, cpp):
        after = case.copy().step(ops)
        assert float(after.work.scalars.found_inf) == 1
        assert int(after.work.new.count) == 0
        assert after.active.progress.tolist() == [7, 25, 1]
        for name in ("exp_avg", "exp_avg_sq", "position", "master"):
            assert_same_bits(after.buffer(name), before.buffer(name), name)
        for got, expected in zip(after.params, before.params, strict=True):
            assert_same_bits(got, expected)


def test_an_overflowing_sum_is_not_a_non_finite_gradient():
    case = make_case([700], quota=5, max_grad_norm=1.0)
    case.grads[0].fill_(1e30)
    for ops in (reference, cpp):
        after = case.copy().step(ops)
        assert float(after.work.scalars.found_inf) == 0
        assert math.isinf(float(after.work.scalars.grad_norm))
        assert after.active.progress.tolist() == [8, 5, 0]
        assert after.params[0].isfinite().all()


def test_found_inf_from_outside_stays():
    case = make_case([100], quota=5)
    case.work.scalars.found_inf.fill_(1.0)
    for ops in (reference, cpp):
        after = case.copy().step(ops)
        assert after.active.progress.tolist() == [7, 0, 1]


def all_patterns(dtype: torch.dtype) -> torch.Tensor:
    return torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_16_bit_gradient_is_converted_exactly(dtype):
    """All 65536 patterns, one entry a tile: the maxima are the magnitudes."""
    grad = all_patterns(dtype)
    case = make_case([65536], grad_dtypes=[dtype], tile=1, quota=1)
    case.grads[0] = grad
    cpp.scan(*case.scan_args(cpp))
    nan = grad.isnan()
    assert_same_bits(case.work.tiles.max[~nan], grad[~nan].float().abs().view(torch.int32))
    assert (case.work.tiles.max[nan] > reference.INFINITY_BITS).all()
    assert float(case.work.scalars.found_inf) == 1
    # in whole tiles too, where conversions are vectorized; squares must not overflow
    finite = torch.where(grad.float().abs() < 1e18, grad, 0)
    wide = make_case([65536], grad_dtypes=[dtype], tile=32, quota=1)
    wide.grads[0] = finite
    cpp.scan(*wide.scan_args(cpp))
    expected = finite.float().abs().view(torch.int32).view(-1, 32).amax(1)
    assert_same_bits(wide.work.tiles.max, expected)
    exact = float(finite.double().square().sum().sqrt())
    assert wide.work.norms.tolist() == pytest.approx([exact], rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_16_bit_value_is_ranked_and_gathered_exactly(dtype):
    """Every finite pattern once as gradient and once as parameter, subnormal ones included."""
    values = all_patterns(dtype)
    values = values[values.isfinite()]
    for exp in (0.0, 1.0, -1.0):
        case = make_case([values.numel()], dtypes=[dtype], quota=values.numel() // 2, exp=exp)
        case.params[0] = values.clone()
        case.grads[0] = values.flip(0).clone()
        fill_bounds(case)
        plain, fast = case.copy().step(reference, "append"), case.copy().step(cpp, "append")
        assert int(fast.work.new.count) == values.numel() // 2
        assert_same_bits(fast.active.position, plain.active.position)
        assert_same_bits(fast.active.grad, plain.active.grad)
        assert_same_bits(fast.active.master, plain.active.master)


def test_every_16_bit_value_is_stored_as_torch_rounds():
    """update with lr = 0 and weight_decay = 0 writes the master value itself: its rounding."""
    generator = torch.Generator().manual_seed(0)
    for dtype in (torch.bfloat16, torch.float16):
        values = all_patterns(dtype).float()
        middle = (values.view(torch.int32) + (1 << (15 if dtype == torch.bfloat16 else 12))).view(
            torch.float32
        )
        around = [(middle.view(torch.int32) + step).view(torch.float32) for step in (-1, 0, 1)]
        tiny = torch.rand(1000, generator=generator) * 2e-7
        edge = torch.tensor([65503.9, 65504.0, 65519.9, 65520.0, 65536.0, 3.3e38, 3.4e38, 2.0**-25])
        master = torch.cat([values, *around, tiny, edge, -edge])
        size = master.numel()
        case = make_case([size], dtypes=[dtype], quota=size, step=1)
        case.grads[0].fill_(1.0)
        case.step(cpp, "append")
        case.work.scalars.hyper[0, 0] = case.work.scalars.hyper[0, 4] = 0.0
        case.active.master.copy_(master)
        case.step(cpp)
        expected = master.to(dtype)
        nan = expected.isnan()
        assert torch.equal(case.params[0].isnan(), nan)
        assert_same_bits(case.params[0][~nan], expected[~nan], str(dtype))

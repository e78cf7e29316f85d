"""One step of the GPU backends on a GPU, against the reference on the CPU.

Selections bit for bit; moments and parameters by the tolerance rule. Run as they stand by
`pytest --dry-gpu` (see conftest.py), the C++ backend on the CPU in the place of the GPU's: so that
an error in a test shows without one. Never run on a GPU so far.
"""

from __future__ import annotations

import math
from dataclasses import replace
from types import ModuleType

import pytest
import torch
from delta_cases import assert_identical, example_base, example_delta
from exchange_cases import assert_exchanged, exchange_cases, make_exchange
from op_cases import DTYPES, EXPS, Case, assert_same_bits, fill_bounds, make_case
from sampled_cases import all_cases, assert_sampled, make_sampled
from step_checks import assert_same_sample, assert_same_selection, assert_same_step, case_on

from sparse_optim.backends import reference, scoring
from sparse_optim.backends.registry import load
from sparse_optim.delta import DeltaSwitcher, _exchange, merge

pytestmark = pytest.mark.gpu

WARP = 32


def ops_of(target: tuple[str, torch.device]) -> ModuleType:
    return load(target[0])


def tile_of(target: tuple[str, torch.device]) -> int:
    return int(ops_of(target).TILE)


def check(target: tuple[str, torch.device], case: Case) -> Case:
    lanes = 8 if target[1].type == "cpu" else WARP
    return assert_same_step(case, ops_of(target), target[1], lanes)


# One step


@pytest.mark.parametrize("offset_views", [False, True], ids=["aligned", "offset"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_edge_sizes(target, dtype, offset_views):
    tile = tile_of(target)
    for size in (0, 1, 31, 32, 33, 127, 129, tile - 1, tile, tile + 1, 3 * tile + 5):
        case = make_case(
            [size], dtypes=[dtype], num_active=size // 3, quota=max(size // 5, 1), tile=tile,
            offset_views=offset_views, seed=size,
        )  # fmt: skip
        got = check(target, case)
        assert int(got.active.progress[1]) == int(case.targets[-1])


@pytest.mark.parametrize("kind", ["normal", "ties", "equal", "zeros", "rows"])
@pytest.mark.parametrize("exp", EXPS)
@pytest.mark.parametrize("quota", [1, 40, 3000])
def test_kinds_of_gradients(target, quota, exp, kind):
    """Quotas below and above the number of tiles (24); every dtype; a missing gradient."""
    tile = tile_of(target)
    sizes = [tile * 7 + 3, 1, 0, tile * 9, 77, tile * 3 - 1]
    case = make_case(
        sizes, dtypes=DTYPES, kind=kind, quota=quota, num_active=500, exp=exp, eps=0.01,
        missing=[4], tile=tile, offset_views=quota == 40,
    )  # fmt: skip
    check(target, case)


@pytest.mark.parametrize("seed", range(12))
def test_random_steps(target, seed):
    """Dtypes of gradients and parameters dealt out apart, heads of any alignment, many tensors."""
    tile, generator = tile_of(target), torch.Generator().manual_seed(seed)
    draw = lambda last: int(torch.randint(last, (), generator=generator))  # noqa: E731
    sizes = [draw(3 * tile) if draw(3) else draw(50) for _ in range(5 + draw(200))]
    case = make_case(
        sizes, dtypes=DTYPES[: 1 + seed % 3], grad_dtypes=DTYPES[seed % 3 :],
        kind=("normal", "ties", "rows")[seed % 3], quota=1 + draw(sum(sizes) // 4),
        num_active=draw(sum(sizes) // 3), missing={draw(len(sizes)) for _ in range(3)},
        dense_sizes=[0, 7, draw(2 * tile)], exp=EXPS[seed % len(EXPS)], tile=tile, seed=seed,
        bias_correction=("entry", "global")[seed % 2], offset_views=seed % 4 != 0,
        max_grad_norm=(math.inf, 0.5)[seed % 2],
    )  # fmt: skip
    check(target, case)


# Small enough for compute-sanitizer: more tensors than one launch fills rows of the table (120).
MANY = [3, 40, 1, 0, 70] * 26


@pytest.mark.parametrize("quota", [7, 900])
@pytest.mark.parametrize("exp", [0.0, 2.0])
def test_a_step_of_many_tensors(target, exp, quota):
    """With exp = 2 tiles are bounded, scored and listed twice."""
    tile = tile_of(target)
    case = make_case(
        [*MANY, tile + 9], dtypes=DTYPES, quota=quota, num_active=90, exp=exp, eps=0.1, tile=tile
    )
    assert int(check(target, case).work.new.count) == quota


def test_a_sample_of_many_tensors(target):
    tile = tile_of(target)
    case = make_case([*MANY, tile + 9], dtypes=DTYPES, quota=90, num_active=60, tile=tile)
    case.noise = torch.tensor([5, 3])
    assert int(assert_same_sample(case, ops_of(target), target[1]).work.new.count) == 90


@pytest.mark.parametrize("quota", [5, 20_000, 200_000])
@pytest.mark.parametrize("exp", [0.0, 2.0, -1.0])
def test_many_ties_and_great_quotas(target, exp, quota):
    """Hundreds of tiles that tie with the cut; a static selection's quota."""
    case = make_case(
        [900_000, 1, 700_000], dtypes=[torch.bfloat16], kind="ties", quota=quota,
        num_active=3000, exp=exp, eps=0.1, tile=tile_of(target),
    )  # fmt: skip
    assert int(check(target, case).work.new.count) == quota


@pytest.mark.parametrize("noise", [(), (5, 3), (-(2**62), 2**32 - 1)], ids=["", "noise", "words"])
@pytest.mark.parametrize("kind", ["normal", "ties", "equal", "zeros", "rows"])
def test_scores_are_ranked_and_sampled(target, kind, noise):
    tile = tile_of(target)
    case = make_case(
        [tile + 1, 0, 70, 3 * tile + 5, 9], dtypes=DTYPES, kind=kind, quota=90, num_active=60,
        missing=[2], tile=tile, offset_views=True,
    )  # fmt: skip
    case.noise = torch.tensor(noise, dtype=torch.int64)
    got = assert_same_sample(case, ops_of(target), target[1])
    assert int(got.work.new.count) == (0 if kind == "zeros" else 90)


def test_a_large_sample_has_second_draws(target):
    """One entry in 65536 has one, and the largest keys: some 23 of these."""
    case = make_case([1_500_000], kind="equal", quota=5000, tile=tile_of(target))
    case.noise = torch.tensor([8, 1])
    assert_same_sample(case, ops_of(target), target[1])


@pytest.mark.parametrize("exp", [1.5, -0.7])
def test_other_exponents_agree_where_scores_are_apart(target, exp):
    """They go through pow, which is not correctly rounded: scores 0.1% apart."""
    generator = torch.Generator().manual_seed(5)
    size = 3 * tile_of(target) + 9
    case = make_case([size], quota=100, num_active=30, exp=exp, tile=tile_of(target))
    score = 1.001 ** (torch.randperm(size, generator=generator) % 8000).float()
    chosen = torch.randperm(size, generator=generator)[: size - 8000]
    score[chosen] = 0.0 if size > 8000 else score[chosen]
    case.grads[0] = score * (case.params[0].abs() + case.eps) ** exp
    plain = case.copy().step(reference, "cut")
    got = case_on(case, target[1], ops_of(target)).step(ops_of(target), "cut")
    assert got.new_entries() == plain.new_entries()


@pytest.mark.parametrize("exp", EXPS)
@pytest.mark.parametrize("value", [math.nan, math.inf], ids=["nan", "inf"])
def test_weights_that_are_not_finite(target, exp, value):
    tile = tile_of(target)
    case = make_case([3 * tile], quota=2 * tile, exp=exp, tile=tile)
    case.params[0][[5, tile + 1]] = value
    if exp < 0:
        case.work.tiles.param_bound.copy_(scoring.tile_abs_max(case.params[0], tile))
    plain = case.copy().step(reference, "append")
    got = case_on(case, target[1], ops_of(target)).step(ops_of(target), "append")
    assert_same_selection(case_on(got, "cpu"), plain)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("place", ["first", "tail", "active", "dense"])
def test_one_value_that_is_not_finite_skips_the_step(target, place, dtype, value):
    tile = tile_of(target)
    case = make_case(
        [tile + 3, 40], dtypes=[dtype], num_active=25, quota=10, dense_sizes=[9], tile=tile
    )
    index = {"first": 0, "tail": tile + 2, "active": int(case.active.position[0]), "dense": 8}
    (case.dense_grads if place == "dense" else case.grads)[0][index[place]] = value
    ops = ops_of(target)
    after = case_on(case_on(case, target[1], ops).step(ops), "cpu")
    assert float(after.work.scalars.found_inf) == 1
    assert after.active.progress.tolist() == [7, 25, 1]
    for name in ("exp_avg", "exp_avg_sq", "position", "master"):
        assert_same_bits(after.buffer(name), case.buffer(name), name)
    for got, expected in zip(after.params, case.params, strict=True):
        assert_same_bits(got, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_16_bit_value_is_converted_ranked_and_stored(target, dtype):
    """Every finite pattern as gradient and as parameter, subnormal ones included."""
    values = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    values = values[values.isfinite()]
    tile = tile_of(target)
    for exp in (0.0, 1.0, -1.0):
        case = make_case(
            [values.numel()], dtypes=[dtype], quota=values.numel() // 2, exp=exp, tile=tile
        )
        case.params[0], case.grads[0] = values.clone(), values.flip(0).clone()
        fill_bounds(case)
        plain = case.copy().step(reference, "append")
        got = case_on(case, target[1], ops_of(target)).step(ops_of(target), "append")
        got = case_on(got, "cpu")
        assert_same_bits(got.active.position, plain.active.position)
        assert_same_bits(got.active.master, plain.active.master)


def test_results_are_the_same_in_every_run(compiled):
    ops, tile = ops_of(compiled), tile_of(compiled)
    sizes = [50 * tile + 3, 11, 30 * tile]
    case = make_case(
        sizes, dtypes=DTYPES[:2], kind="ties", quota=3000, num_active=9000, exp=1.0, tile=tile
    )
    first = None
    for _ in range(10):
        got = case_on(case_on(case, compiled[1], ops).step(ops), "cpu")
        result = [got.work.scalars.grad_norm, got.work.new.position, *vars(got.active).values()]
        result += got.params
        for one, other in zip(result, first or result, strict=True):
            assert_same_bits(one, other)
        first = result


# Sampled gradients


SAMPLED = dict(all_cases())


@pytest.mark.parametrize("name", SAMPLED)
def test_sampled_sizes(target, name):
    assert_sampled(ops_of(target), name, SAMPLED[name], target[1])


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_sampled_gradients_of_a_wide_weight(target, dtype, transposed):
    """Several blocks of entries, tiles of columns and chunks of tokens."""
    widths = (60, 9000) if transposed else (9000, 60)
    case = make_sampled(300, *widths, 20_000, dtype=dtype, transposed=transposed)
    assert_sampled(ops_of(target), "wide", case, target[1])


def test_sampled_gradients_of_many_tokens(target):
    case = make_sampled(100_000, 20, 30, 40, dtype=torch.bfloat16)
    assert_sampled(ops_of(target), "1e5 tokens", case, target[1])


def test_sampled_gradients_at_positions_outside_of_the_weight(on_gpu):
    """Nothing is read or written for them; a check would wait for the device."""
    case = make_sampled(100, 20, 10, 4)
    case.position = torch.tensor([-(2**31), -1, 200, 2**31 - 1], dtype=torch.int32)
    assert_same_bits(case.run(ops_of(on_gpu), on_gpu[1]), case.out)


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
def test_sampled_gradients_are_captured_without_waiting(on_gpu):
    """A graph adds the gradient once more at each replay."""
    ops, device = ops_of(on_gpu), on_gpu[1]
    case = make_sampled(300, 90, 60, 500, dtype=torch.bfloat16)
    arguments = [
        each.to(device) for each in (case.input, case.grad_output, case.position, case.out)
    ]
    input, grad_output, position, out = arguments
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        ops.sampled_grad(input, grad_output, position, False, out)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert_same_bits(out.cpu(), case.run(ops, device))
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ops.sampled_grad(input, grad_output, position, False, out)
    for _ in range(2):
        graph.replay()
        case.out = case.run(ops, device)
    case.out = case.run(ops, device)
    assert_same_bits(out.cpu(), case.out)


# Entries swapped with values


SWAPPED = dict(exchange_cases())


@pytest.mark.parametrize("name", SWAPPED)
def test_exchanged_sizes(target, name):
    assert_exchanged(ops_of(target), name, SWAPPED[name], target[1])


def test_exchange_of_many_entries(target):
    case = make_exchange([300_000, 7, 0, 200_001], 0.2)
    assert_exchanged(ops_of(target), "many", case, target[1])


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
def test_exchange_is_captured_without_waiting(on_gpu):
    """A graph swaps once more at each replay."""
    ops, device = ops_of(on_gpu), on_gpu[1]
    case = make_exchange([3000, 500], 0.3)
    want, own = case.expected(), case.copy(device)
    table = torch.zeros(2, 4, dtype=torch.int64, device=device)
    bound = ops.bind([param.new_empty(0) for param in own.params], own.params, table)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        ops.exchange(bound, own.position, own.offsets, own.value)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(own.value.cpu(), want.value)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ops.exchange(bound, own.position, own.offsets, own.value)
    for expected in (case, want, case):
        graph.replay()
        assert torch.equal(own.value.cpu(), expected.value)


@pytest.mark.filterwarnings("error")
def test_deltas_are_switched(target, monkeypatch):
    """Without the warning that the operation did something else."""
    name, device = target
    monkeypatch.setattr(_exchange, "BACKENDS", {device.type: (name,)})
    base = {key: tensor.to(device) for key, tensor in example_base().items()}
    deltas = {str(s): replace(example_delta(example_base(), seed=s), dense={}) for s in (5, 6)}
    tasks = DeltaSwitcher(base, deltas)
    for active in ("5", "6", None, "5"):
        tasks.use(active)
        found = {key: tensor.cpu() for key, tensor in base.items()}
        assert_identical(found, merge(deltas[active], example_base()) if active else example_base())

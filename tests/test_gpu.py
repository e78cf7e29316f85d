"""The GPU backends on a GPU, against the reference on the CPU.

Selections bit for bit; moments and parameters by the tolerance rule. Run as they stand by
`pytest --dry-gpu` (see conftest.py), the C++ backend on the CPU in the place of the GPU's: so that
an error in a test shows without one. Never run on a GPU so far.
"""

from __future__ import annotations

import itertools
import math
from types import ModuleType

import pytest
import torch
from device_runs import GRADS, Run, assert_same_run, build, give, new_run, train
from op_cases import DTYPES, EXPS, Case, assert_same_bits, fill_bounds, make_case
from step_checks import assert_same_sample, assert_same_selection, assert_same_step, case_on

from sparse_optim import (
    D3,
    IncrementalMaskedAdamW,
    MaskedAdamW,
    Static,
    backends,
    reference,
    scoring,
)
from sparse_optim.amp import GradScaler

pytestmark = pytest.mark.gpu

WARP = 32


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Every backend that a GPU has; in a dry run those of the CPU."""
    if "target" in metafunc.fixturenames:
        dry = metafunc.config.getoption("--dry-gpu")
        names = ["cpp", "reference"] if dry else ["cuda", "triton", "reference"]
        metafunc.parametrize("target", names, indirect=True)


@pytest.fixture
def target(request: pytest.FixtureRequest) -> tuple[str, torch.device]:
    """(backend, device); the reference on the device is what runs where nothing is compiled."""
    if request.config.getoption("--dry-gpu"):
        return request.param, torch.device("cpu")
    device = torch.device("cuda", torch.cuda.current_device())
    try:
        return backends.resolve(request.param, device), device
    except RuntimeError as error:
        pytest.skip(str(error))


@pytest.fixture
def compiled(target: tuple[str, torch.device]) -> tuple[str, torch.device]:
    """Backends that never wait for the device."""
    if target[0] == "reference":
        pytest.skip("the reference backend waits for the device, as it says")
    return target


@pytest.fixture
def on_gpu(compiled: tuple[str, torch.device]) -> tuple[str, torch.device]:
    if compiled[1].type != "cuda":
        pytest.skip("a dry run: there are no streams and graphs on the CPU")
    return compiled


def ops_of(target: tuple[str, torch.device]) -> ModuleType:
    return backends.operations(target[0])


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


@pytest.mark.parametrize("quota", [5, 20_000, 200_000])
@pytest.mark.parametrize("exp", [0.0, 2.0, -1.0])
def test_many_ties_and_great_quotas(target, exp, quota):
    """Hundreds of tiles that tie with the cut; a static selection's quota."""
    case = make_case(
        [900_000, 1, 700_000], dtypes=[torch.bfloat16], kind="ties", quota=quota,
        num_active=3000, exp=exp, eps=0.1, tile=tile_of(target),
    )  # fmt: skip
    assert int(check(target, case).work.new_count) == quota


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
    assert int(got.work.new_count) == (0 if kind == "zeros" else 90)


def test_a_large_sample_has_second_draws(target):
    """One entry in 65536 has one, and the greatest keys: some 23 of these."""
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
        case.work.param_bound.copy_(scoring.tile_abs_max(case.params[0], tile))
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
    assert float(after.work.found_inf) == 1
    assert after.active.progress.tolist() == [7, 25, 1]
    for name in ("exp_avg", "exp_avg_sq", "position", "master"):
        assert_same_bits(getattr(after.active, name), getattr(case.active, name), name)
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
        result = [got.work.grad_norm, got.work.new_position, *vars(got.active).values()]
        result += got.params
        for one, other in zip(result, first or result, strict=True):
            assert_same_bits(one, other)
        first = result


# A whole optimizer


@pytest.mark.parametrize("exp", [0.0, 2.0, -0.5, 1.5])
def test_fifty_steps_equal_the_reference_on_the_cpu(target, exp):
    """Mixed dtypes, a dense group, missing gradients, an overflow, a schedule of lr."""
    assert_same_run(new_run(*target, exp=exp), new_run("reference", "cpu", exp=exp))


def test_two_runs_are_equal_bit_for_bit(compiled):
    first, second = (train(new_run(*compiled), GRADS) for _ in range(2))
    for one, other in zip(first.everything(), second.everything(), strict=True):
        assert_same_bits(one, other)


def test_resumed_in_mid_run(target):
    straight = train(new_run(*target), GRADS[:20])
    resumed = train(new_run(*target), GRADS[:8])
    saved = resumed.optimizer.state_dict()
    resumed = new_run(*target, params=resumed.params)
    resumed.optimizer.load_state_dict(saved)
    resumed.taken = 8
    train(resumed, GRADS[8:20])
    for one, other in zip(straight.everything(), resumed.everything(), strict=True):
        assert_same_bits(one, other)


@pytest.mark.parametrize("kind", [GradScaler, torch.amp.GradScaler])
def test_loss_scaling_with_overflows(target, kind):
    """The same scales, skips and selections as on the CPU with torch's scaler.

    torch's own takes no bfloat16 gradients on CUDA: float32 there.
    """
    results = []
    on_cpu = "reference", torch.device("cpu")
    instead = {torch.bfloat16: torch.float32} if kind is torch.amp.GradScaler else {}
    for (backend, device), scaler_of in ((target, kind), (on_cpu, torch.amp.GradScaler)):
        run = new_run(backend, device, instead=instead)
        scaler = scaler_of(device.type, init_scale=2.0**10, growth_interval=3)
        scales = []
        for step, grads in enumerate(GRADS[:12]):
            scaler.scale(torch.ones((), device=device))
            give(run, grads, scaler.get_scale(), missing=False)
            if step in (3, 4, 8):
                run.params[0].grad.view(-1)[-1] = math.inf
            scaler.step(run.optimizer)
            scaler.update()
            scales.append((scaler.get_scale(), run.optimizer.metrics()["skipped_steps"]))
        results.append((scales, run))
    assert results[0][0] == results[1][0]
    for got, want in zip(*(run.positions() for _, run in results), strict=True):
        assert torch.equal(got, want)


def test_weights_loaded_in_mid_run_are_taken_over(target):
    run = train(new_run(*target, exp=-0.5), GRADS[:3])
    twin = train(new_run("reference", "cpu", exp=-0.5), GRADS[:3])
    for each in (run, twin):
        with torch.no_grad():
            for param in each.params:
                param.mul_(-3.0)
        train(each, GRADS[3:6])
    for got, want in zip(run.positions(), twin.positions(), strict=True):
        assert torch.equal(got, want)


# Streams, graphs, devices


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
def test_a_step_never_waits_for_the_device(on_gpu):
    run = train(new_run(*on_gpu), GRADS[:2])
    give(run, GRADS[2])
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run.optimizer.step()
        run.optimizer.param_groups[0]["lr"] = 0.5  # copied, without waiting
        run.optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert run.optimizer.metrics()["step"] == 4


def test_a_step_on_another_stream(on_gpu):
    side, expected = torch.cuda.Stream(), train(new_run(*on_gpu), GRADS[:10])
    run = new_run(*on_gpu)
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        train(run, GRADS[:10])
    torch.cuda.current_stream().wait_stream(side)
    for one, other in zip(run.everything(), expected.everything(), strict=True):
        assert_same_bits(one, other)


def captured(run: Run) -> torch.cuda.CUDAGraph:
    """A graph of one step of this run, on the gradients' memory at hand."""
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run.optimizer.step()
    return graph


def test_a_captured_step_replays_as_eager_steps_go(on_gpu):
    """Quotas, counts, an overflow, the clip and a learning rate on the device, without the host."""
    runs = []
    for _ in range(2):
        lr = torch.tensor(0.01, device=on_gpu[1])
        runs.append(new_run(*on_gpu, lr=lr, capturable=True, missing=False))
    eager, replayed = runs
    for run in runs:  # gradients stay where they are from here on
        train(run, GRADS[:2], missing=False)
    graph = captured(replayed)
    for step, grads in enumerate(GRADS[2:14]):
        for run in runs:
            give(run, grads, missing=False)
            if step == 4:
                run.params[0].grad.view(-1)[7] = math.nan
            if step == 6:
                run.optimizer.param_groups[0]["lr"].mul_(0.5)
        eager.optimizer.step()
        graph.replay()
    assert eager.optimizer.metrics()["skipped_steps"] >= 1
    for one, other in zip(replayed.everything(), eager.everything(), strict=True):
        assert_same_bits(one, other)
    # and on without the graph
    for run in runs:
        train(run, GRADS[14:16], missing=False)
    for one, other in zip(replayed.everything(), eager.everything(), strict=True):
        assert_same_bits(one, other)


@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty")  # as it should be
def test_capture_is_refused_where_it_could_not_be_replayed(on_gpu):
    plain = new_run(*on_gpu)
    train(plain, GRADS[:2])
    with pytest.raises(RuntimeError, match="capturable=True"):
        captured(plain)
    torch.cuda.synchronize()
    fresh = new_run(*on_gpu, capturable=True)
    give(fresh, GRADS[0])
    with pytest.raises(RuntimeError, match="take a step before the capture"):
        captured(fresh)
    torch.cuda.synchronize()
    with pytest.raises(ValueError, match="needs backend='cuda' or 'triton'"):
        new_run("reference", on_gpu[1], capturable=True)


def test_parameters_and_gradients_on_other_devices_are_refused(on_gpu):
    backend, device = on_gpu
    here, there = (torch.nn.Parameter(torch.ones(9, device=place)) for place in (device, "cpu"))
    with pytest.raises(ValueError, match=r"on several devices.*use one optimizer per device"):
        MaskedAdamW([here, there], importance=D3(), selection=Static(3))
    with pytest.raises(RuntimeError, match="device"):  # torch itself
        here.grad = torch.ones(9)
    table = torch.zeros(1, 4, dtype=torch.int64, device=device)
    with pytest.raises((RuntimeError, ValueError), match="must be on cuda"):
        backends.operations(backend).bind([torch.ones(9)], [here.detach()], table)
    with pytest.raises(ValueError, match="'cpp' runs on cpu"):
        MaskedAdamW([here], importance=D3(), selection=Static(3), backend="cpp")


def test_a_device_that_is_not_the_current_one(on_gpu):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    other = torch.device("cuda", 1 - torch.cuda.current_device())
    assert_same_run(new_run(on_gpu[0], other), new_run("reference", "cpu"))


def test_more_than_two_to_the_32_entries(on_gpu):
    """Global indices beyond 32 bits: planted winners, a tie to the lower index."""
    size, kept = 1_500_000_000, torch.cuda.mem_get_info()[0]
    if kept < 20e9:
        pytest.skip(f"needs 20 GB of free GPU memory, {kept / 1e9:.0f} are")
    params = []
    for _ in range(3):
        param = torch.nn.Parameter(torch.zeros(size, dtype=torch.bfloat16, device=on_gpu[1]))
        param.grad = torch.zeros_like(param)
        params.append(param)
    optimizer = IncrementalMaskedAdamW(params, lr=0.5, budget=6, total_steps=2, backend=on_gpu[0])
    optimizer._fingerprints = ["not taken"] * 3  # hashing 9 GB takes longer than all the rest
    planted = [(0, 0, 2.0), (1, 1_200_000_001, 4.0), (2, size - 1, 3.0)]
    later = [(0, 5, 0.5), (1, size - 1, 1.5), (2, 7, 1.0), (2, size - 2, 0.5)]
    for index, position, value in itertools.chain(planted, later):
        params[index].grad[position] = value
    for expected in (planted, planted + later[:3]):
        optimizer.step()
        found = [
            (index, position)
            for index, positions in enumerate(optimizer.active_entries().values())
            for position in positions.tolist()
        ]
        assert found == sorted((index, position) for index, position, _ in expected)


def test_auto_takes_a_backend_that_runs_here(target):
    assert build("auto", target[1]).backend in ("cpp", "cuda", "triton", "reference")

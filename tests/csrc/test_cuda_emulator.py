"""The CUDA kernels, run on the CPU by the emulator, against the reference.

Shows that what the kernels compute is right, at any order of threads and blocks between barriers.
Cannot show races between blocks that run at once, memory ordering or speed: no GPU has run them.

Faults planted by hand, one at a time, and what caught them (a crash is a write out of bounds that
followed):

    no barrier after zeroing the bins of a digit      no_more_entries_are_collected
    no barrier between zeroing and setting tile marks a crash in the cut tests
    no barrier before a block prefix is added up      a crash in the cut tests
    no barrier before a tile's winners are stored     all cut tests
    no __syncwarp after clearing the marks of a tile  scan_finds_non_finite, active_at_tile_edges
    last active entry of a tile missed                scan_equals_reference, append_keeps_the_order
    last entry of the tail missed                     scan_equals_reference, cut_equals_reference
    marks not shifted by the unaligned head           scan_equals_reference, scan_reads_whole_tiles
    ties to the higher index within 32 entries        ties_go_to_the_lower, all cut tests
    ties to the last tiles instead of the first       ties_go_to_the_lower, cut_of_equal_gradients
    tiles whose bound equals the limit left out       ties_go_to_the_lower, cut_equals_reference
    bounds with |param| = 1 instead of 0              cut_equals_reference
    entries at an insertion point not moved           append_keeps_the_order, whole_step
    age of an entry one too low                       whole_step
    infinity not counted as non-finite                scan_finds_non_finite_gradients
    second launch of the table at the first's place   many_tensors_fill_the_table
    count of arrived blocks not reset                 all cut tests
    surplus candidates that tie kept                  a crash
    a candidate's first digit not counted             few_candidates_of_many_tiles
    candidates sorted in ascending runs alone         few_candidates_of_many_tiles
    count of the first collection kept                winners_crowd_into_a_few_tiles and others
    ties among those above in the second collection   winners_crowd_into_a_few_tiles and others
    no barrier before those that tie are moved        ties_among_winners_that_crowd_into_a_few_tiles
    first that tie: warps, or lanes, not in order     more_candidates_than_there_is_room_for
    no barrier before tiles with ties are opened      more_candidates_than_there_is_room_for
    new entries written before all others have moved  append_keeps_the_order
    new entries not counted                           append_keeps_the_order, active_at_tile_edges
    a skipped step updates                            skipped_step_moves_nothing
    norm of one tensor added up by every block        a_scan_of_one_tensor_is_that_of_all
    first entries of a chunk not saved                append_keeps_the_order
    no barrier between reading and writing a run      append_keeps_the_order, whole_step
    new entries behind the last one not written       append_keeps_the_order
"""

from __future__ import annotations

import math

import device_reads
import emulated_cuda
import pytest
import torch
from cuda_cases import FLOAT, TILE, Case, check_cut, check_exact, check_scan, check_state, run_both
from op_cases import make_case
from step_checks import SMALL_BETAS, assert_same_step, fading

from sparse_optim import D3, Increment, MaskedAdamW
from sparse_optim.backends import registry, scoring
from sparse_optim.backends.targets import formula, target_at

EXPS = (-1.0, -0.5, 0.0, 0.5, 1.0, 2.0)


@pytest.fixture(autouse=True)
def _device(cuda_emulator):
    emulated_cuda.configure(multiprocessors=1, seed=0)


EDGES = [0, 1, TILE - 1, TILE, TILE + 1, 3 * TILE + 5, 31, 33]
DTYPES = [(FLOAT,), (torch.bfloat16,), (torch.float16,), (torch.bfloat16, FLOAT, torch.float16)]


@pytest.mark.parametrize("dtypes", DTYPES, ids=len)
@pytest.mark.parametrize("shift", [0, 1, 3])
def test_scan_equals_reference(dtypes, shift):
    case = Case(EDGES, grad_dtypes=dtypes, param_dtypes=dtypes, shift=shift, missing=(4,))
    case.work.scalars.grad_scale.fill_(8.0)
    dense = [torch.randn(5000), torch.randn(77).bfloat16()[1:]]
    expected, actual = run_both(case, "scan", scan={"dense": dense, "max_grad_norm": 1.5})
    check_scan(expected, actual)


@pytest.mark.parametrize("dtypes", DTYPES, ids=len)
def test_a_scan_of_one_tensor_is_that_of_all_in_one_launch(dtypes):
    emulated_cuda.configure(multiprocessors=2, seed=5)
    case = Case(EDGES, grad_dtypes=dtypes, param_dtypes=dtypes, shift=1, active=0.3)
    case.grads[5][7] = math.inf
    alone = case.copy()
    case.bind(emulated_cuda)
    case.scan(emulated_cuda)
    work, scalars = alone.work, alone.work.scalars
    firsts = work.tiles.offsets.tolist()
    found = []
    for index, (grad, param) in enumerate(zip(alone.grads, alone.params, strict=True)):
        scalars.found_inf.zero_()
        before = emulated_cuda.launches()
        emulated_cuda.scan_one(
            grad, param, work.table[index : index + 1],
            work.tiles.of_tensors(index, index + 1, slice(*firsts[index : index + 2])),
            alone.active.of_tensors(index, index + 1), work.norms[index : index + 1],
            scalars.found_inf, scalars.arrived, work.scratch,
        )  # fmt: skip
        assert emulated_cuda.launches() - before == 1
        assert scalars.arrived == 0
        found.append(float(scalars.found_inf))
        bound = emulated_cuda.bind([grad], [param], torch.zeros(1, 4, dtype=torch.int64))
        assert torch.equal(work.table[index : index + 1], bound)
    assert found == [0, 0, 0, 0, 0, 1, 0, 0]
    scalars.found_inf.fill_(1.0)
    check_exact(case, alone, "tile_max", "active_grad", "found_inf")
    assert torch.equal(alone.work.norms, case.work.norms)


def test_scan_reads_whole_tiles_of_4096():
    for dtype in (FLOAT, torch.bfloat16):
        case = Case([3 * 4096 + 7], tile=4096, grad_dtypes=(dtype,), shift=1, active=0.3)
        check_scan(*run_both(case, "scan"))


def test_scan_sums_do_not_depend_on_the_device():
    case = Case([40 * TILE + 11])
    norms = set()
    for multiprocessors in (1, 2, 3):
        emulated_cuda.configure(multiprocessors, seed=multiprocessors)
        own = case.copy()
        own.bind(emulated_cuda)
        own.scan(emulated_cuda, dense=[torch.ones(9000)])
        norms.add(float(own.work.scalars.grad_norm))
    assert len(norms) == 1


def test_scan_of_many_dense_gradients_takes_several_launches():
    case = Case([5])
    dense = [torch.full((i % 7,), float(i)) for i in range(200)]
    check_scan(*run_both(case, "scan", scan={"dense": dense}))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", ["frozen", "active", "dense"])
def test_scan_finds_non_finite_gradients(value, place):
    case = Case([2 * TILE + 3, 7], active=0.2, grad_dtypes=(FLOAT, torch.float16))
    dense = [torch.ones(100)]
    active = set(case.active.position[: int(case.active.offsets[1])].tolist())
    index = next(i for i in range(TILE, 2 * TILE) if (i in active) == (place == "active"))
    if place == "dense":
        dense[0][99] = value
    else:
        case.grads[0][index] = value
    expected, actual = run_both(case, "scan", scan={"dense": dense})
    assert actual.work.scalars.found_inf == 1
    check_exact(expected, actual, "tile_max", "active_grad", "found_inf")


def test_overflowing_sum_is_not_a_non_finite_gradient():
    case = Case([200])
    case.grads[0].fill_(1e30)
    expected, actual = run_both(case, "scan", scan={"max_grad_norm": 1.0})
    assert actual.work.scalars.found_inf == 0
    check_scan(expected, actual)


def test_scan_keeps_an_overflow_found_before():
    case = Case([50])
    case.work.scalars.found_inf.fill_(1.0)
    assert run_both(case, "scan")[1].work.scalars.found_inf == 1


@pytest.mark.parametrize("exp", EXPS)
@pytest.mark.parametrize("seed", range(4))
def test_cut_equals_reference(exp, seed):
    emulated_cuda.configure(multiprocessors=1 + seed, seed=seed)
    case = Case(
        EDGES, exp=exp, seed=seed, missing=(5,) if seed == 3 else (), quota=(1, 20, 100, 300)[seed],
        grad_dtypes=DTYPES[seed], param_dtypes=DTYPES[-1 - seed],
    )  # fmt: skip
    check_cut(*run_both(case, "scan", "cut"))


@pytest.mark.parametrize("exp", [0.0, 1.0])
@pytest.mark.parametrize("quota", [1, 7, TILE, 2 * TILE + 1])
@pytest.mark.parametrize("levels", [1, 3])
def test_ties_go_to_the_lower_global_index(exp, quota, levels):
    emulated_cuda.configure(multiprocessors=2, seed=quota)
    case = Case([TILE + 9, 3, 2 * TILE + 2], exp=exp, quota=quota, levels=levels)
    for param in case.params:
        param.fill_(0.5)
    check_cut(*run_both(case, "scan", "cut"))


@pytest.mark.parametrize("exp", [0.0, 2.0, -1.0])
def test_cut_of_equal_gradients(exp):
    case = Case([5 * TILE, 40], exp=exp, quota=33, active=0.3)
    for grad, param in zip(case.grads, case.params, strict=True):
        grad.fill_(0.25)
        param.fill_(-0.5)
    check_cut(*run_both(case, "scan", "cut"))


@pytest.mark.parametrize("exp", [0.0, 1.0, -0.5])
def test_quota_beyond_the_candidates(exp):
    case = Case([TILE + 5, 60], exp=exp, quota=400)
    case.grads[0][TILE // 2 :] = 0
    expected, actual = run_both(case, "scan", "cut")
    assert 0 < int(actual.work.new.count) < 400
    check_cut(expected, actual)


@pytest.mark.parametrize("exp", [0.0, 1.0])
def test_cut_without_any_candidate(exp):
    case = Case([TILE + 5], exp=exp)
    case.grads[0].zero_()
    expected, actual = run_both(case, "scan", "cut")
    assert actual.work.new.count == 0
    check_cut(expected, actual)


def test_quota_is_zero_once_the_target_is_reached_and_after_an_overflow():
    reached, overflown = Case([TILE], quota=0, max_quota=5), Case([TILE])
    overflown.grads[0][3] = math.nan
    for case in (reached, overflown):
        check_cut(*run_both(case, "scan", "cut"))


def test_quota_is_at_most_the_room_for_new_entries():
    case = Case([3 * TILE], quota=50, max_quota=11)
    expected, actual = run_both(case, "scan", "cut")
    assert actual.work.new.count == 11
    check_cut(expected, actual)


@pytest.mark.parametrize("exp", [0.0, 1.0])
def test_tiles_most_of_whose_entries_are_active(exp):
    emulated_cuda.configure(multiprocessors=1, seed=3)
    case = Case([3 * 512, 700], tile=512, exp=exp, active=0.7, quota=100)
    check_cut(*run_both(case, "scan", "cut"))


def test_infinite_and_nan_parameters_are_ranked_as_in_the_reference():
    for exp in EXPS:
        case = Case([2 * TILE], exp=exp, quota=12)
        case.params[0][::17] = math.inf
        case.params[0][5::23] = math.nan
        if exp < 0:
            case.work.tiles.param_bound.copy_(scoring.tile_abs_max(case.params[0], case.tile))
        check_cut(*run_both(case, "scan", "cut"))


def test_many_tiles_take_several_chunks():
    case = Case([5000], tile=1, quota=700, active=0.01)
    check_cut(*run_both(case, "scan", "cut"))


def selection(case):
    """Of csrc/cuda/select.h, which scratch memory begins with: what follows the bins."""
    return case.work.scratch[8 * 2048 : 8 * 2057]


def candidates(case):
    """`num_candidates`: of the second collection, above the limit, if there was one."""
    return int(selection(case).view(torch.int64)[4])


def collected_again(case):
    """`passes`: there was no room for all candidates."""
    return bool(selection(case).view(torch.int32)[16])


@pytest.mark.parametrize("seed", range(3))
def test_no_more_entries_are_collected_than_can_win(seed):
    """With exp = 0 the floor is just below the quota-th largest maximum of a tile. (Too low a limit
    would go unnoticed: results stay right.)"""
    emulated_cuda.configure(multiprocessors=2, seed=seed)
    case = Case([40 * TILE], quota=7, seed=seed)
    case.bind(emulated_cuda)
    case.scan(emulated_cuda)
    floor = case.work.tiles.max.sort(descending=True).values[6]
    case.cut(emulated_cuda)
    frozen = case.grads[0].abs()
    frozen[case.active.position[: case.num_active].long()] = 0
    assert candidates(case) == int((frozen.view(torch.int32) >= floor).sum())


@pytest.mark.parametrize("exp", EXPS)
@pytest.mark.parametrize("seed", range(3))
def test_few_candidates_of_many_tiles(exp, seed):
    emulated_cuda.configure(multiprocessors=1 + seed, seed=seed)
    case = Case(
        [15 * TILE, 7, 30 * TILE + 1], exp=exp, quota=(3, 9, 20)[seed], seed=seed,
        grad_dtypes=DTYPES[-1], param_dtypes=DTYPES[1 + seed], levels=9 if seed == 2 else None,
    )  # fmt: skip
    expected, actual = run_both(case, "scan", "cut")
    assert 0 < candidates(actual) <= 160 or exp != 0 or seed == 2
    assert not collected_again(actual) or exp != 0 or seed == 2
    check_cut(expected, actual)


@pytest.mark.parametrize("quota", [1, 9, 17])
@pytest.mark.parametrize("exp", [0.0, 1.0])
def test_ties_among_few_candidates(exp, quota):
    emulated_cuda.configure(multiprocessors=2, seed=quota)
    case = Case([15 * TILE, 7, 30 * TILE + 1], exp=exp, quota=quota, max_quota=20, seed=quota)
    case.work.new.position.fill_(-1)
    for grad, param in zip(case.grads, case.params, strict=True):
        param.fill_(0.5)
        grad[torch.randperm(grad.numel(), generator=case.generator)[:30]] = 7.5
    expected, actual = run_both(case, "scan", "cut")
    assert quota < candidates(actual) <= 67
    check_cut(expected, actual)
    assert (actual.work.new.position[quota:] == -1).all()


@pytest.mark.parametrize("exp", [0.0, 2.0, -1.0])
@pytest.mark.parametrize("levels", [1, 2])
def test_more_candidates_than_there_is_room_for(exp, levels):
    emulated_cuda.configure(multiprocessors=2, seed=levels)
    case = Case([3, 16 * TILE + 5, 5 * TILE], exp=exp, quota=8, levels=levels)
    for param in case.params:
        param.fill_(0.5)
    expected, actual = run_both(case, "scan", "cut")
    assert collected_again(actual)
    check_cut(expected, actual)


@pytest.mark.parametrize("exp", [0.0, 2.0, -1.0])
@pytest.mark.parametrize("seed", range(3))
def test_winners_crowd_into_a_few_tiles(exp, seed):
    """As where gradients of some rows are far larger: no two tie."""
    emulated_cuda.configure(multiprocessors=1 + seed, seed=seed)
    case = Case([3, 16 * TILE + 5, 24 * TILE], exp=exp, quota=(7, 13, 20)[seed], seed=seed)
    for param in case.params:
        param.fill_(0.5)
    case.grads[1][TILE : 4 * TILE] *= 1e3
    case.grads[2][TILE // 2 : TILE] *= 1e3
    expected, actual = run_both(case, "scan", "cut")
    assert collected_again(actual)
    assert candidates(actual) == case.work.new.position.numel() - 1
    check_cut(expected, actual)


@pytest.mark.parametrize("exp", [0.0, 1.0])
@pytest.mark.parametrize("quota", [5, 11, 20])
@pytest.mark.parametrize("tied", [40, 400])
def test_ties_among_winners_that_crowd_into_a_few_tiles(exp, quota, tied):
    """There is room for 40 that tie, and none for 400; the others that win come anywhere."""
    emulated_cuda.configure(multiprocessors=2, seed=quota + tied)
    case = Case([7, 30 * TILE, 20 * TILE + 3], exp=exp, quota=quota, seed=quota)
    for grad, param in zip(case.grads, case.params, strict=True):
        grad.clamp_(-3, 3)
        param.fill_(0.5)
    flat = torch.randperm(30 * TILE, generator=case.generator)
    case.grads[1][flat[:tied]] = 7.5
    case.grads[1][torch.arange(200) + 3 * TILE] *= 2.0
    case.grads[2][-3:] = torch.tensor([9.0, 7.5, 8.0])
    case.grads[0][5] = 8.5
    expected, actual = run_both(case, "scan", "cut")
    check_cut(expected, actual)
    assert collected_again(actual) == (tied == 400)


@pytest.mark.parametrize(("exp", "most"), [(0.0, 14), (2.0, 18)])
def test_launches_of_a_step(exp, most):
    """Three return at once, unless there are more candidates than room."""
    case = Case([15 * TILE, 7, 30 * TILE], exp=exp, quota=9)
    before = emulated_cuda.launches()
    case.bind(emulated_cuda)
    for step in (case.scan, case.cut, case.append, case.update):
        step(emulated_cuda)
    assert case.work.new.count == 9
    assert emulated_cuda.launches() - before == most


def test_cut_of_a_general_exponent_by_the_same_pow():
    case = Case([4 * TILE], exp=0.3, quota=25)
    expected, actual = run_both(case, "scan", "cut")
    # pow of float32 may differ by a unit: the selections agree but for entries that nearly tie.
    want = set(expected.work.new.position.tolist())
    assert len(want ^ set(actual.work.new.position.tolist())) <= 2


def test_active_entries_at_tile_edges():
    case = Case([3 * TILE, TILE], active=0.0, quota=9, max_quota=20)
    state = case.active
    edges = torch.tensor([0, TILE - 1, TILE, 2 * TILE - 1, 2 * TILE, 3 * TILE - 1, 0, TILE - 1])
    state.position[:8] = edges.int()
    state.offsets.copy_(torch.tensor([0, 6, 8]))
    state.progress[1] = 8
    state.unmask_step.fill_(1)
    case.targets += 8
    for grad in case.grads:  # active entries attain every tile's maximum
        grad[::TILE] = 99.0
        grad[TILE - 1 :: TILE] = -99.0
    expected, actual = run_both(case, "scan", "cut", "append", "update")
    check_scan(expected, actual)
    check_cut(expected, actual)
    check_state(expected, actual)


@pytest.mark.parametrize("step", [0, 3, 6, 7, 12, 30])
def test_a_formula_of_targets_gives_the_quota_of_the_reference(step):
    case = Case([3 * TILE, TILE], active=0.0, quota=9, max_quota=20)
    case.targets = formula([(7, 12, 2), (10, 30, 1), (5, 0, 1)])
    case.active.progress.copy_(torch.tensor([step, 0, 0]))
    expected, actual = run_both(case, "scan", "cut")
    check_cut(expected, actual)
    wanted = int(target_at(case.targets, torch.tensor([step + 1])))
    assert int(actual.work.new.count) == min(20, wanted)


@pytest.mark.parametrize("dtypes", DTYPES, ids=len)
@pytest.mark.parametrize("bias_correction", ["entry", "global"])
def test_whole_step_equals_reference(dtypes, bias_correction):
    emulated_cuda.configure(multiprocessors=3, seed=11)
    case = Case(
        EDGES, grad_dtypes=dtypes, param_dtypes=dtypes, missing=(3,), quota=60, active=0.3, seed=5
    )
    expected, actual = run_both(
        case, "scan", "cut", "append", "update",
        scan={"max_grad_norm": 0.5}, update={"bias_correction": bias_correction},
    )  # fmt: skip
    check_cut(expected, actual)
    check_state(expected, actual)
    assert torch.equal(actual.params[3], case.params[3])  # whose gradient is missing


@pytest.mark.parametrize("quota", [1, 100, 900])
def test_append_keeps_the_order(quota):
    emulated_cuda.configure(multiprocessors=2, seed=quota)
    case = Case([700, 0, 1500, 40], quota=quota, active=0.4, seed=quota)
    expected, actual = run_both(case, "scan", "cut", "append")
    total = int(expected.active.progress[1])
    check_exact(expected, actual, "offsets", "progress")
    for name in ("position", "exp_avg", "exp_avg_sq", "unmask_step"):
        want, got = getattr(expected.active, name), getattr(actual.active, name)
        assert torch.equal(got[:total], want[:total]), name
    assert torch.equal(actual.active.grad[:total], expected.active.grad[:total])


def test_skipped_step_moves_nothing_but_its_count():
    case = Case([TILE, 50], grad_dtypes=(torch.bfloat16,), param_dtypes=(torch.bfloat16,))
    case.grads[0][1] = math.inf
    before = case.copy()
    _, actual = run_both(case, "scan", "cut", "append", "update")
    assert actual.active.progress.tolist() == [7, before.num_active, 4]
    check_exact(before, actual, "position", "exp_avg", "exp_avg_sq", "master", "offsets")
    for want, got in zip(before.params, actual.params, strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("exp", EXPS)
def test_the_checks_of_the_gpu_tests_hold(exp):
    """tests/gpu/test_gpu.py compares by this function; every field, scratch guarded."""
    emulated_cuda.configure(multiprocessors=2, seed=1)
    case = make_case(
        [3 * TILE + 5, 0, 1, TILE], dtypes=(FLOAT, torch.bfloat16), kind="ties", quota=30,
        num_active=90, exp=exp, eps=0.01, missing=[3], tile=TILE, dense_sizes=[70],
        offset_views=True, max_grad_norm=0.5,
    )  # fmt: skip
    assert_same_step(case, emulated_cuda, lanes=32)


@pytest.mark.parametrize("beta1", SMALL_BETAS)
def test_small_gradients_after_large_ones_are_not_lost(beta1):
    case = make_case([2 * TILE, 70], dtypes=(FLOAT, torch.bfloat16), num_active=90, tile=TILE)
    assert_same_step(fading(case, beta1), emulated_cuda, lanes=32)


def test_many_tensors_fill_the_table_in_several_launches():
    case = Case([3] * 300, quota=30)
    check_cut(*run_both(case, "scan", "cut"))


def test_a_training_run_unmasks_what_the_reference_does(monkeypatch):
    monkeypatch.setitem(registry.BACKENDS, "emulated", ("emulated_cuda", "cpu"))
    torch.manual_seed(0)
    start = [torch.randn(300).bfloat16(), torch.randn(17), torch.randn(2, 65)]
    runs = {}
    for name in ("reference", "emulated"):
        params = [torch.nn.Parameter(value.clone()) for value in start]
        optimizer = MaskedAdamW(
            params, lr=1e-2, importance=D3(exp=0.0), selection=Increment(90, total_steps=6),
            max_grad_norm=1.0, backend=name,
        )  # fmt: skip
        generator = torch.Generator().manual_seed(1)
        for step in range(7):
            for param in params:
                param.grad = torch.randn(param.shape, generator=generator).to(param.dtype)
            if step == 2:
                params[1].grad[3] = math.nan
            params[2].grad = None if step == 4 else params[2].grad
            optimizer.step()
        runs[name] = optimizer, params
    (expected, params), (actual, emulated_params) = runs.values()
    assert actual.backend == "emulated"
    for want, got in zip(
        expected.active_entries().values(), actual.active_entries().values(), strict=True
    ):
        assert torch.equal(got, want)
    assert actual.metrics()["skipped_steps"] == 1
    assert actual.metrics()["active"] == 90
    for want, got in zip(params, emulated_params, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5 if want.dtype == FLOAT else 8e-3, atol=1e-6)


@pytest.mark.parametrize("exp", [0.0, -0.5])
def test_a_step_reads_nothing_from_the_device(exp, monkeypatch):
    """Nothing that Python does in a step; reads in kernels' C++ cannot be."""
    monkeypatch.setitem(registry.BACKENDS, "emulated", ("emulated_cuda", "cpu"))
    pool, dense = (torch.nn.Parameter(torch.ones(300).bfloat16()) for _ in range(2))
    groups = [{"params": [pool]}, {"params": [dense], "unmask": "all"}]
    optimizer = MaskedAdamW(
        groups, importance=D3(exp=exp), selection=Increment(90, total_steps=6), max_grad_norm=1.0,
        backend="emulated",
    )  # fmt: skip
    for _ in range(3):
        pool.grad, dense.grad = torch.randn(2, 300).bfloat16()
        with device_reads.refused():
            optimizer.step()
    assert optimizer.metrics()["active"] == 45


@pytest.mark.parametrize("seed", range(5))
def test_result_does_not_depend_on_the_order_of_threads_and_blocks(seed):
    case = Case([6 * TILE, 2 * TILE + 1], exp=1.0, quota=50, levels=5, seed=1)
    emulated_cuda.configure(multiprocessors=1, seed=99)
    first = run_both(case, "scan", "cut", "append", "update")[1]
    emulated_cuda.configure(multiprocessors=1 + seed, seed=seed)
    again = run_both(case, "scan", "cut", "append", "update")[1]
    check_exact(first, again, "tile_max", "active_grad", "grad_norm", "new_position")
    check_exact(first, again, "position", "exp_avg", "exp_avg_sq", "progress")
    for want, got in zip(first.params, again.params, strict=True):
        assert torch.equal(got, want)

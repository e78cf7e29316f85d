"""The Triton operations against the reference, interpreted on the CPU.

Run by test_triton_interpreter.py in a process of its own: TRITON_INTERPRET=1 must be set before the
kernels are imported, and then holds for all of them. Whole steps are compared as those of the
emulated and the real CUDA kernels are, by `step_checks.assert_same_step`: NumPy, which works out
what the interpreter is asked for, rounds as a GPU does but for fused operations, so that the rule
needs no exception. Tiles are small, as the interpreter takes some ten milliseconds per program.

Faults planted by hand, once each, and what failed:
    locate: a tile begins one entry later           test_scan, 23 tests in all
    is_listed: the last active entry is missed      test_scan[everything active], 24 in all
    is_listed: the last of few is missed            test_scan, 4 of its tests
    floor kept for the digits: a bin too high       test_cut[..-0.0], 14 of 15
    bind: seal of the C++ rows read as a dtype      test_tables_of_the_compiled_bind_are_read
    ties go to the largest index in a tile         test_cut[all equal], [ties], 3 tests
    ties are counted anew by each program           test_cut[all equal], 17 in all
    floor: upper edge of the bin                    test_cut[fewer winners than tiles]
    floor of maxima: one bin too high               test_cut[tight bounds]
    floor from bounds, not from exact maxima        test_cut[fewer winners than tiles], exp != 0
    bounds for exp < 0 without param_bound          test_cut[fewer winners than tiles], exp < 0
    exp = -1 through a fused multiply-add           test_cut[many scales--1.0]
    float instead of integer maximum                test_non_finite_gradients_are_found[..-nan]
    noise: words in the order 0, 2, 1, 3            test_rank_and_the_cut_after_it, 12 tests
    noise: second draw left out, or first again     test_rank_and_the_cut_after_it[..refined]
    noise: tensor missing from the counter          test_rank_and_the_cut_after_it[all equal-..]
    noise: groups counted from the tile             test_rank_and_the_cut_after_it[all equal-..]
    cut: scores as they are, without noise          test_rank_and_the_cut_after_it[missing-..]
    append: old entries one place off               test_append, 5 tests
    update: age one too small                       test_update, 4 tests
    update: gradient 1e-5 too great                 test_update[edges], by the tolerance rule
"""

from __future__ import annotations

import importlib
import importlib.util
import math
import os

import device_reads
import numpy as np
import pytest
import torch
from op_cases import assert_as_exact, assert_same_bits
from step_checks import SMALL_BETAS, assert_same_step, fading
from triton_cases import BF16, F16, F32, STEP, TILE, assert_bits, make_case

from sparse_optim import D3, IncrementalMaskedAdamW
from sparse_optim.backends import reference, registry
from sparse_optim.backends.held import Held
from sparse_optim.backends.targets import formula
from sparse_optim.engine import self_check

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("run by test_interpreter.py", allow_module_level=True)
importlib.import_module("triton_interpreter").install()
kernels = importlib.import_module("sparse_optim.triton_kernels")

EXPS = (-1.0, -0.5, 0.0, 0.5, 1.0, 2.0)


@pytest.fixture(autouse=True)
def _small_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several programs, and several rounds in each, even in small cases."""
    few = importlib.import_module("triton.language").constexpr(2)  # more are searched for
    for name, constants in {
        "device_functions": {"FEW_ACTIVE": few},
        "scan": {"GATHER_BLOCK": 4, "SUM_BLOCK": 2, "DENSE_BLOCK": 8, "DENSE_PROGRAMS": 4},
        "tiles": {"LOCATE_BLOCK": 16},
        "candidate_tiles": {"BOUND_BLOCK": 4, "NUM_PROGRAMS": 2},
        "cut": {"NUM_PROGRAMS": 2, "LOCATE_BLOCK": 16},
        "append": {"MERGE_BLOCK": 16, "INSERT_BLOCK": 4},
        "update": {"UPDATE_BLOCK": 16},
    }.items():
        module = importlib.import_module(f"sparse_optim.triton_kernels.{name}")
        for constant, value in constants.items():
            monkeypatch.setattr(module, constant, value)


SCANS = {
    "edges": {},
    "no active entries": {"num_active": 0},
    "everything active": {"sizes": (5, TILE, 40), "num_active": 61},
    "active at tile edges": {
        "sizes": (TILE - 1, 3 * TILE + 1),
        "positions": [[0, TILE - 2], [0, TILE - 1, TILE, 2 * TILE - 1, 3 * TILE]],
    },
    "a tile full of active entries": {
        "sizes": (7, 3 * TILE), "positions": [[], list(range(TILE, 2 * TILE))]
    },
    "mixed dtypes": {"dtypes": (F32, BF16, F16), "grad_dtypes": (F16, BF16, F32, BF16)},
    "unaligned": {"dtypes": (BF16, F32), "unaligned": True, "sizes": (2 * TILE, 5, 3 * TILE)},
    "missing": {"missing": (1, 5), "kind": "ties"},
    "dense": {"dense_sizes": (0, 3, 41), "max_grad_norm": 0.5},
    "dense alone": {"sizes": (), "num_active": 0, "dense_sizes": (5,), "max_grad_norm": 1e9},
    "many scales": {"kind": "rows"},
}  # fmt: skip


@pytest.mark.parametrize("name", SCANS)
def test_scan(name: str) -> None:
    case = make_case(**SCANS[name])
    case.work.scalars.grad_scale.fill_(8.0)
    assert_same_step(case, kernels)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", ["frozen", "active", "dense", "bfloat16"])
def test_non_finite_gradients_are_found(place: str, value: float) -> None:
    dtype = BF16 if place == "bfloat16" else F32
    case = make_case((TILE + 3,), positions=[[2]], dense_sizes=(9,), dtypes=(dtype,))
    target = case.dense_grads[0] if place == "dense" else case.grads[0]
    target[2 if place == "active" else 8] = value
    got, want = (case.run(ops, "scan", "cut") for ops in (kernels, reference))
    assert got.work.scalars.found_inf.item() == 1.0
    assert_bits(got, want, "tile_max", "found_inf", "new_count")


def test_found_inf_stays_and_largest_finite_is_finite() -> None:
    case = make_case((3,), positions=[[]])
    case.grads[0][1] = torch.finfo(F32).max
    with np.errstate(over="ignore"):  # the sum of squares does, which is no gradient's fault
        assert case.run(kernels, "scan").work.scalars.found_inf.item() == 0.0
    case.grads[0].fill_(1.0)
    case.work.scalars.found_inf.fill_(1.0)
    assert case.run(kernels, "scan").work.scalars.found_inf.item() == 1.0


CUTS = {
    "edges": {},
    "ties": {"kind": "ties"},
    "all equal": {"kind": "equal", "quota": 23},
    "all zero": {"kind": "zeros"},
    "fewer candidates than the quota": {"kind": "few", "quota": 60},
    "quota 0": {"quota": 0},
    "quota of everything": {"sizes": (TILE + 1, 20), "quota": 30, "num_active": 7},
    "active at tile edges": {
        "sizes": (TILE - 1, 3 * TILE + 1), "kind": "equal", "quota": 20,
        "positions": [[0, TILE - 2], [0, TILE - 1, TILE, 2 * TILE - 1, 3 * TILE]],
    },
    "mixed dtypes": {"dtypes": (F32, BF16, F16), "grad_dtypes": (F16, BF16, F32, BF16)},
    "unaligned": {"dtypes": (BF16, F32), "unaligned": True, "sizes": (2 * TILE, 5, 3 * TILE)},
    "missing": {"missing": (0, 5), "kind": "ties"},
    "many scales": {"kind": "rows", "quota": 40},
    "fewer winners than tiles": {"sizes": (7 * TILE, 3, 5 * TILE + 1), "quota": 3},
    "tight bounds": {"sizes": (7 * TILE, 3, 5 * TILE + 1), "quota": 3, "eps": 100.0},
    "fewer winners than tiles, ties": {"sizes": (40, 6 * TILE), "quota": 3, "kind": "ties"},
}  # fmt: skip
# With every exponent.
SCORED = ("ties", "mixed dtypes", "many scales", "fewer winners than tiles", "tight bounds")


@pytest.mark.parametrize(
    ("name", "exp"),
    [(name, exp) for name in CUTS for exp in EXPS if exp in (0.0, 2.0) or name in SCORED],
)
def test_cut(name: str, exp: float) -> None:
    case = make_case(**CUTS[name], exp=exp, seed=len(name))
    got, want = (case.run(ops, "scan", "cut") for ops in (kernels, reference))
    count = int(want.work.new.count)
    assert_bits(got, want, "new_count", "threshold")
    for entries in ("new_tensor", "new_position"):
        assert torch.equal(got.buffer(entries)[:count], want.buffer(entries)[:count])


def test_cut_of_a_general_exponent() -> None:
    """Scores may differ in the last place, so that the entries are far apart here."""
    case = make_case((40,), exp=1.7, num_active=0, quota=5)
    case.params[0].fill_(0.3)
    case.grads[0].copy_(1.5 ** torch.randperm(40, generator=torch.Generator().manual_seed(3)))
    got, want = (case.run(ops, "scan", "cut") for ops in (kernels, reference))
    assert torch.equal(got.work.new.position[:5], want.work.new.position[:5])
    grad, base = case.grads[0].double().sort().values[-5], case.params[0][0].double() + case.eps
    assert_as_exact(got.work.new.threshold, want.work.new.threshold, grad / base**1.7)


@pytest.mark.parametrize(
    ("targets", "applied", "quota"),
    [
        (torch.tensor([0, 3, 5, 40]), 0, 3),
        (torch.tensor([0, 3, 5, 40]), 1, 5),
        (torch.tensor([0, 3, 5, 40]), 2, 9),
        (torch.tensor([0, 3, 5, 40]), 50, 9),
        (formula([(10, 4, 1), (10, 8, 2)]), 0, 0),
        (formula([(10, 4, 1), (10, 8, 2)]), 7, 3),
        (formula([(10, 4, 1), (10, 8, 2)]), 9, 4),
        (formula([(10, 4, 1), (10, 8, 2)]), 11, 6),
        (formula([(10, 4, 1), (10, 8, 2)]), 50, 9),
        (formula([(10**9, 10**9, 1)]), 6, 7),
    ],
)
def test_quota_follows_the_schedule(targets: torch.Tensor, applied: int, quota: int) -> None:
    """At most what the buffers hold; beyond the last step, the last target."""
    case = make_case((50,), num_active=0, quota=9)
    case.targets = targets
    case.active.progress.copy_(torch.tensor([applied, 0, 0]))
    got, want = (case.run(ops, "scan", "cut") for ops in (kernels, reference))
    assert got.work.new.count.item() == want.work.new.count.item() == quota


# Seed and step for which entries 19 and 101 of tensor 0 have a second draw, alone among its first
# 160 (test_cuda_rank.py checks it).
REFINED = (86, 2**32 - 399)
NOISES = {"none": (), "refined": REFINED, "negative seed": (-(2**62), 2**32 - 1)}
RANKS = {
    "edges": {},
    "ties": {"kind": "ties"},
    "all equal": {"sizes": (110, TILE + 5), "kind": "equal", "quota": 23},
    "all zero": {"kind": "zeros"},
    "fewer candidates than the quota": {"kind": "few", "quota": 60},
    "active at tile edges": {
        "sizes": (TILE - 1, 3 * TILE + 1), "kind": "equal", "quota": 20,
        "positions": [[0, TILE - 2], [0, TILE - 1, TILE, 2 * TILE - 1, 3 * TILE]],
    },
    "mixed dtypes": {"dtypes": (F32, BF16, F16), "grad_dtypes": (F16, BF16, F32, BF16)},
    "unaligned": {"dtypes": (BF16, F32), "unaligned": True, "sizes": (2 * TILE, 5, 3 * TILE)},
    "missing": {"missing": (0, 5), "kind": "ties"},
    "fewer winners than tiles": {"sizes": (7 * TILE, 3, 5 * TILE + 1), "quota": 3},
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "noise"),
    [
        (name, noise) for name in RANKS for noise in NOISES
        if noise == "refined" or name in ("edges", "all equal", "missing")
    ],
)  # fmt: skip
def test_rank_and_the_cut_after_it(name: str, noise: str) -> None:
    case = make_case(**RANKS[name], noise=NOISES[noise], seed=len(name))
    got, want = (case.run(ops, "rank", "cut") for ops in (kernels, reference))
    count = int(want.work.new.count)
    assert_bits(got, want, "tile_max", "new_count", "threshold")
    for entries in ("new_tensor", "new_position"):
        assert torch.equal(got.buffer(entries)[:count], want.buffer(entries)[:count])


def test_noise_is_refused_where_it_means_nothing() -> None:
    with pytest.raises(ValueError, match=r"noise must hold seed and step, or nothing, got 3"):
        make_case(noise=(1, 2, 3)).run(kernels, "rank")
    with pytest.raises(ValueError, match=r"exp must be 0 with noise, got 2.0"):
        make_case(noise=(1, 2), exp=2.0).run(kernels, "cut")


APPENDS = {
    "edges": {},
    "nothing new": {"quota": 0},
    "first entries": {"num_active": 0},
    "ties in every tensor": {"kind": "equal", "quota": 70, "num_active": 3},
    "mixed dtypes": {"dtypes": (F32, BF16, F16), "grad_dtypes": (F16, BF16, F32)},
    "behind all others": {"sizes": (9, 5), "positions": [[0, 4], []], "kind": "equal"},
    "missing": {"missing": (0, 5)},
}


@pytest.mark.parametrize("name", APPENDS)
def test_append(name: str) -> None:
    case = make_case(**APPENDS[name])
    got, want = (case.run(ops, "scan", "cut", "append") for ops in (kernels, reference))
    assert_bits(
        got, want, "position", "exp_avg", "exp_avg_sq", "unmask_step", "master", "active_grad",
        "offsets", "progress",
    )  # fmt: skip


UPDATES = {
    "edges": {},
    "global bias correction": {"bias_correction": "global"},
    "mixed dtypes": {"dtypes": (F32, BF16, F16)},
    "unaligned": {"dtypes": (F16, F32), "unaligned": True},
    "missing": {"missing": (0, 5), "num_active": 40},
    "no active entries": {"num_active": 0},
}


@pytest.mark.parametrize("name", UPDATES)
def test_update(name: str) -> None:
    case = make_case(**UPDATES[name])
    case.work.scalars.grad_scale.fill_(2.0)
    assert_same_step(case, kernels)


@pytest.mark.parametrize("beta1", SMALL_BETAS)
def test_small_gradients_after_large_ones_are_not_lost(beta1: float) -> None:
    assert_same_step(fading(make_case(dtypes=(F32, BF16)), beta1), kernels)


def test_found_inf_skips_the_step() -> None:
    case = make_case(dtypes=(F32, BF16))
    case.work.scalars.found_inf.fill_(1.0)
    got = case.run(kernels, "scan", "clip", "cut", "append", "update")
    assert got.active.progress.tolist() == [STEP, 12, 3]
    assert all(map(torch.equal, got.params, case.params))
    assert_bits(got, case, "position", "exp_avg", "exp_avg_sq", "unmask_step", "master", "offsets")


@pytest.mark.parametrize("exp", [0.0, 1.0])
def test_whole_step(exp: float) -> None:
    case = make_case(dtypes=(F32, BF16), exp=exp, max_grad_norm=1.0, dense_sizes=(4,))
    assert_same_step(case, kernels)


def test_the_self_check_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A whole optimizer on this backend, as `backend="auto"` runs it on a GPU before taking it."""
    monkeypatch.setitem(registry.BACKENDS, "triton", ("sparse_optim.triton_kernels", "cpu"))
    # Few programs, as in use, and few steps, which take a second each: exponents and kinds of
    # gradients have tests of their own above.
    for name, constant in (("append", "INSERT_BLOCK"), ("append", "MERGE_BLOCK"),
                           ("update", "UPDATE_BLOCK")):  # fmt: skip
        module = importlib.import_module(f"sparse_optim.triton_kernels.{name}")
        monkeypatch.setattr(module, constant, 128)
    exact, power, sampled = (self_check.METHODS[place] for place in (2, 4, 5))
    monkeypatch.setattr(self_check, "METHODS", (exact, power, sampled))
    monkeypatch.setattr(self_check, "STEPS", ("ties", "overflow"))
    monkeypatch.setattr(self_check, "POWER_STEPS", ("far apart",))
    assert self_check.first_mismatch("triton", torch.device("cpu")) is None


def test_a_step_reads_nothing_from_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing that Python does in a step; the interpreter reads by NumPy."""
    monkeypatch.setitem(registry.BACKENDS, "triton", ("sparse_optim.triton_kernels", "cpu"))
    monkeypatch.setattr(kernels, "TILE", 128)
    params = [torch.nn.Parameter(torch.ones(130, dtype=dtype)) for dtype in (BF16, F32)]
    groups = [{"params": params[:1]}, {"params": params[1:], "unmask": "all"}]
    optimizer = IncrementalMaskedAdamW(
        groups,
        budget=60,
        total_steps=3,
        importance=D3(exp=-0.5),
        max_grad_norm=1.0,
        backend="triton",
        unmask_steps=1.0,
    )
    for _ in range(2):
        for param in params:
            param.grad = torch.linspace(-1.0, 1.0, 130).to(param.dtype)
        with device_reads.refused():
            optimizer.step()
    assert optimizer.metrics()["active"] == 40


def test_gradients_taken_one_by_one_give_the_same_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients come at the addresses of the last step's, in a table that it has used otherwise."""
    monkeypatch.setitem(registry.BACKENDS, "triton", ("sparse_optim.triton_kernels", "cpu"))
    runs = []
    for fuse in (False, True):
        generator = torch.Generator().manual_seed(3)
        params = [torch.nn.Parameter(torch.randn(n, generator=generator)) for n in (300, 17, 130)]
        optimizer = IncrementalMaskedAdamW(
            params, lr=1e-2, budget=60, total_steps=3, max_grad_norm=1.0, backend="triton",
            fuse_backward=fuse, unmask_steps=1.0,
        )  # fmt: skip
        memory = [torch.empty_like(param.detach()) for param in params]
        for _ in range(3):
            for param, grad in zip(params, memory, strict=True):
                param.grad = grad.normal_(generator=generator)
            optimizer.step()
        runs.append(optimizer)
    ordinary, fused = runs
    assert torch.equal(fused.engine.active.position, ordinary.engine.active.position)
    for got, want in zip(fused.engine.pool.params, ordinary.engine.pool.params, strict=True):
        assert_same_bits(got, want)


def test_bind_refuses_what_kernels_cannot_read() -> None:
    table = torch.zeros(1, 4, dtype=torch.int64)
    good = torch.zeros(4, 4)
    with pytest.raises(ValueError, match=r"grads\[0\] has 3 entries, its parameter 16"):
        kernels.bind([torch.zeros(3)], [good], table)
    with pytest.raises(ValueError, match=r"params\[0\] must be contiguous, got strides \(1, 4\)"):
        kernels.bind([good], [good.t()], table)
    with pytest.raises(ValueError, match=r"grads\[0\] must be float32, .* got torch.float64"):
        kernels.bind([good.double()], [good], table)
    with pytest.raises(ValueError, match=r"table must be int64 of shape \(1, 4\)"):
        kernels.bind([good], [good], table[:0])


@pytest.fixture
def _compiled_bind(monkeypatch: pytest.MonkeyPatch) -> None:
    """The C++ operator writes the table, as on a GPU that has the CUDA backend, too."""
    cpp = pytest.importorskip("sparse_optim.backends.cpp", reason="the extension is not built")
    launch = importlib.import_module("sparse_optim.triton_kernels.launch")
    monkeypatch.setattr(launch, "compiled_bind", lambda device_type: cpp.bind)


@pytest.mark.usefixtures("_compiled_bind")
def test_tables_of_the_compiled_bind_are_read() -> None:
    """Its rows are sealed, in bits that say nothing to these kernels."""
    case = make_case(dtypes=(F32, BF16, F16), grad_dtypes=(F16, BF16, F32, BF16), missing=(4,))
    assert int(case.bound(kernels)[0, 3]) >> 16 != 0
    assert_same_step(case, kernels)


@pytest.mark.usefixtures("_compiled_bind")
def test_the_compiled_bind_refuses_in_the_same_words() -> None:
    test_bind_refuses_what_kernels_cannot_read()


def test_rows_that_were_read_in_one_call_are_those_of_bind() -> None:
    pytest.importorskip("sparse_optim.backends.cpp", reason="the extension is not built")
    params = [torch.nn.Parameter(torch.ones(5)), torch.nn.Parameter(torch.ones(2, 3).bfloat16())]
    params[1].grad = torch.ones(2, 3).bfloat16()
    rows, grads = Held(params).read()
    table, expected = torch.zeros(2, 2, 4, dtype=torch.int64)
    kernels.bind_rows(rows, table)
    kernels.bind(grads, params, expected)
    assert torch.equal(table[:, :3], expected[:, :3])
    assert torch.equal(table[:, 3] & 0xFFFF, expected[:, 3])
    rows.zero_()
    assert table.any()  # a copy


def test_the_compiled_bind_is_of_a_gpu_alone() -> None:
    launch = importlib.import_module("sparse_optim.triton_kernels.launch")
    assert launch.compiled_bind("cpu") is None
    if importlib.util.find_spec("sparse_optim._C_cuda") is None:
        assert launch.compiled_bind("cuda") is None


def test_tables_that_share_memory_hold_what_was_bound_last() -> None:
    """As in a backward pass, where each tensor has a row of the whole table for its own."""
    table = torch.zeros(2, 4, dtype=torch.int64)
    row = table[1:]
    grads, params = ([torch.ones(4) for _ in range(2)] for _ in range(2))
    for _ in range(2):
        kernels.bind(grads[1:], params[1:], row)
        assert table[1, :2].tolist() == [grads[1].data_ptr(), params[1].data_ptr()]
        kernels.bind(params, params, table)
        assert table[:, 0].tolist() == [param.data_ptr() for param in params]


class FakeTable:
    """Stands for a table on a GPU, where a graph may be captured; counts the copies into it."""

    is_cuda, shape = True, (1, 4)

    def __init__(self) -> None:
        self.copies: list[list[int]] = []

    def copy_(self, source: torch.Tensor, non_blocking: bool) -> None:
        assert non_blocking
        self.copies.append(source.flatten().tolist())


def test_a_graph_reads_a_block_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    work = importlib.import_module("sparse_optim.triton_kernels.launch")
    capturing = False
    make = torch.empty  # nothing can be pinned without a GPU
    monkeypatch.setattr(torch, "empty", lambda *a, pin_memory=False, **k: make(*a, **k))
    monkeypatch.setattr(torch.Tensor, "pin_memory", torch.Tensor.clone)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    staging, table = work._Staging(), FakeTable()
    first, second = torch.tensor([[1, 2, 3, 4]]), torch.tensor([[5, 6, 7, 8]])
    capturing = True
    with pytest.raises(RuntimeError, match="take a step between two captures"):
        staging.write(first, table)
    capturing = False
    staging.write(first, table)
    assert table.copies == [[1, 2, 3, 4]]
    capturing = True
    staging.write(second, table)
    with pytest.raises(RuntimeError, match="take a step between two captures"):
        staging.write(second, table)
    capturing = False
    staging.write(first, table)
    assert table.copies[1:] == [[5, 6, 7, 8], [1, 2, 3, 4]]
    assert staging._captured[0].flatten().tolist() == [5, 6, 7, 8]
    assert staging._spare is not staging._captured[0]

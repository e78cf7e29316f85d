"""The Triton operations against the reference, interpreted on the CPU.

Run by test_triton_interpreter.py in a process of its own: TRITON_INTERPRET=1 must be set before the
kernels are imported, and then holds for all of them. Integers, positions, masks and gradients must
be equal bit for bit, floats that are summed or updated up to their rounding. Tiles are small, as
the interpreter takes some ten milliseconds per program.
"""

from __future__ import annotations

import copy
import importlib
import itertools
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import triton_interpreter
from torch import Tensor

from sparse_optim import reference
from sparse_optim.active_set import ActiveSet, WorkSpace

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("run by test_triton_interpreter.py", allow_module_level=True)
triton_interpreter.install()
kernels = importlib.import_module("sparse_optim.triton_kernels")

TILE = 16
STEP = 7
EXPS = (-1.0, -0.5, 0.0, 0.5, 1.0, 2.0)
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
# Sizes around the tile, without a tile, and of several.
SIZES = (1, TILE, 0, TILE - 1, TILE + 1, 3 * TILE + 5)
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _small_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several programs, and several rounds in each, even in small cases."""
    for name, constants in {
        "scan": {"GATHER_BLOCK": 4, "SUM_BLOCK": 4, "NUM_PARTIALS": 4, "DENSE_BLOCK": 8},
        "tiles": {"LOCATE_BLOCK": 16},
        "listing": {"BOUND_BLOCK": 4, "NUM_PROGRAMS": 2},
        "cut": {"NUM_PROGRAMS": 2},
        "append": {"MERGE_BLOCK": 16, "INSERT_BLOCK": 4, "OFFSETS_BLOCK": 4},
        "update": {"UPDATE_BLOCK": 16},
    }.items():
        module = importlib.import_module(f"sparse_optim.triton_kernels.{name}")
        for constant, value in constants.items():
            monkeypatch.setattr(module, constant, value)


@dataclass
class Case:
    """One optimizer step, and its place in the schedule."""

    grads: list[Tensor]
    params: list[Tensor]
    dense_grads: list[Tensor]
    active: ActiveSet
    work: WorkSpace
    targets: Tensor
    exp: float = 0.0
    eps: float = 1e-3
    bias_correction: str = "entry"
    max_grad_norm: float = math.inf

    def run(self, ops: ModuleType, *names: str) -> Case:
        """A copy of the case after the named operations."""
        case = copy.deepcopy(self)
        active, work = case.active, case.work
        work.scratch = torch.full(
            (ops.scratch_bytes(
                work.tile_max.numel(), active.position.numel(), work.new_tensor.numel()
            ),), 0x5A, dtype=torch.uint8,
        )  # fmt: skip
        bound = ops.bind(case.grads, case.params, work.table)
        arguments: dict[str, tuple[Any, ...]] = {
            "scan": (
                bound, case.dense_grads, active.position, active.offsets, work.tile_offsets,
                work.grad_scale, self.max_grad_norm, TILE, work.tile_max, work.active_grad,
                work.grad_norm, work.grad_factor, work.found_inf, work.scratch,
            ),
            "cut": (
                bound, active.position, active.offsets, work.tile_offsets, work.tile_max,
                work.param_bound, self.targets, active.progress, work.found_inf, self.exp,
                self.eps, TILE, work.new_tensor, work.new_position, work.new_count,
                work.threshold, work.scratch,
            ),
            "append": (
                bound, work.new_tensor, work.new_position, work.new_count, active.position,
                active.exp_avg, active.exp_avg_sq, active.unmask_step, active.master,
                work.active_grad, active.offsets, active.progress, work.scratch,
            ),
            "update": (
                bound, active.position, active.offsets, work.active_grad, work.grad_factor,
                work.found_inf, work.hyper, work.group_index, self.bias_correction,
                active.exp_avg, active.exp_avg_sq, active.unmask_step, active.master,
                active.progress,
            ),
        }  # fmt: skip
        for name in names:
            getattr(ops, name)(*arguments[name])
        return case


def make_case(
    sizes: Sequence[int] = SIZES,
    *,
    dtypes: Sequence[torch.dtype] = (F32,),
    grad_dtypes: Sequence[torch.dtype] | None = None,
    kind: str = "normal",
    quota: int = 10,
    num_active: int = 12,
    missing: Sequence[int] = (),
    dense_sizes: Sequence[int] = (),
    unaligned: bool = False,
    positions: Sequence[Sequence[int]] | None = None,
    seed: int = 0,
    **options: Any,
) -> Case:
    """A random step; `positions` says which entries are active, else `num_active` of them."""
    generator = torch.Generator().manual_seed(seed)
    grad_dtypes = grad_dtypes or dtypes
    params = [
        torch.randn(size, generator=generator).to(dtypes[i % len(dtypes)])
        for i, size in enumerate(sizes)
    ]
    grads = [
        values_of(kind, size, generator).to(grad_dtypes[i % len(grad_dtypes)])
        for i, size in enumerate([*sizes, *dense_sizes])
    ]
    if unaligned:
        grads = [torch.cat([grad[:1], grad])[1:] if grad.numel() else grad for grad in grads]
        params = [torch.cat([p[:1], p])[1:] if p.numel() else p for p in params]
    dense = grads[len(sizes) :]
    grads = [grad[:0] if i in missing else grad for i, grad in enumerate(grads[: len(sizes)])]
    if positions is None:
        starts = torch.tensor([0, *sizes]).cumsum(0)
        chosen = torch.randperm(sum(sizes), generator=generator)[:num_active].sort().values
        positions = [
            (chosen[(chosen >= a) & (chosen < b)] - a).tolist()
            for a, b in itertools.pairwise(starts)
        ]
    case = assemble(params, grads, dense, positions, quota, options, generator)
    return case


def values_of(kind: str, size: int, generator: torch.Generator) -> Tensor:
    values = torch.randn(size, generator=generator)
    match kind:
        case "ties":
            return (values * 2).round().clamp(-2, 2) / 4
        case "equal":
            return torch.full((size,), -0.25)
        case "zeros":
            return torch.zeros(size)
        case "few":  # most are exactly zero
            return values * (torch.rand(size, generator=generator) < 0.1)
        case "rows":  # scales of many orders, down to subnormal numbers
            return values * 10.0 ** (-39 * torch.rand(size, generator=generator))
    return values


def assemble(
    params: list[Tensor],
    grads: list[Tensor],
    dense: list[Tensor],
    positions: Sequence[Sequence[int]],
    quota: int,
    options: dict[str, Any],
    generator: torch.Generator,
) -> Case:
    """The case in the buffers of an optimizer."""
    num_active = sum(map(len, positions))
    capacity = num_active + quota + 3 if params else 0
    targets = torch.tensor([0] * (STEP + 1) + [num_active + quota])
    active = ActiveSet.empty(params, capacity, CPU)
    segments = []
    for param, places in zip(params, positions, strict=True):
        where, count = torch.tensor(places, dtype=torch.int64), len(places)
        noise = 1 + 1e-4 * torch.randn(count, generator=generator)
        segments.append({
            "position": where,
            "exp_avg": 0.1 * torch.randn(count, generator=generator),
            "exp_avg_sq": 0.1 * torch.rand(count, generator=generator),
            "unmask_step": torch.randint(1, STEP + 1, (count,), generator=generator),
            "master": param[where].float() * (noise if active.master.numel() else 1),
        })  # fmt: skip
    active.fill(segments, torch.tensor([STEP, num_active, 2]))
    exp = options.get("exp", 0.0)
    work = WorkSpace.empty(
        params, [i % 2 for i in range(len(params))], 2, capacity, max(quota, 1), TILE, exp < 0, 0,
        CPU,
    )  # fmt: skip
    work.hyper.copy_(
        torch.tensor([[1e-2, 0.9, 0.999, 1e-8, 0.1, 1.0], [3e-3, 0.8, 0.95, 1e-6, 0.0, -1.0]])
    )
    if exp < 0:
        work.param_bound.copy_(torch.cat([reference.tile_abs_max(p, TILE) for p in params]))
    work.active_grad.uniform_(generator=generator)
    return Case(grads, params, dense, active, work, targets, **options)


def assert_bits(case: Case, expected: Case, *names: str) -> None:
    """Fields of the buffers are equal, NaN to NaN and -0.0 not to 0.0."""
    for name in names:
        owner = "active" if hasattr(case.active, name) else "work"
        got, want = (getattr(getattr(each, owner), name) for each in (case, expected))
        if got.is_floating_point():
            got, want = (each.view(torch.int32) for each in (got, want))
        assert torch.equal(got, want), f"{name}:\n{got}\n{want}"


def assert_close(got: Tensor, want: Tensor, units: float = 4) -> None:
    """Equal within units in the last place of the dtype."""
    eps = torch.finfo(want.dtype).eps
    torch.testing.assert_close(got, want, rtol=units * eps, atol=units * eps * 1e-3)


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
    case.work.grad_scale.fill_(8.0)
    got, want = (case.run(ops, "scan") for ops in (kernels, reference))
    assert_bits(got, want, "tile_max", "active_grad", "found_inf")
    assert_close(got.work.grad_norm.float(), want.work.grad_norm.float())
    assert_close(got.work.grad_factor, want.work.grad_factor)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", ["frozen", "active", "dense", "bfloat16"])
def test_non_finite_gradients_are_found(place: str, value: float) -> None:
    dtype = BF16 if place == "bfloat16" else F32
    case = make_case((TILE + 3,), positions=[[2]], dense_sizes=(9,), dtypes=(dtype,))
    target = case.dense_grads[0] if place == "dense" else case.grads[0]
    target[2 if place == "active" else 8] = value
    got, want = (case.run(ops, "scan", "cut") for ops in (kernels, reference))
    assert got.work.found_inf.item() == 1.0
    assert_bits(got, want, "tile_max", "found_inf", "new_count")


def test_found_inf_stays_and_greatest_finite_is_finite() -> None:
    case = make_case((3,), positions=[[]])
    case.grads[0][1] = torch.finfo(F32).max
    with np.errstate(over="ignore"):  # the sum of squares does, which is no gradient's fault
        assert case.run(kernels, "scan").work.found_inf.item() == 0.0
    case.grads[0].fill_(1.0)
    case.work.found_inf.fill_(1.0)
    assert case.run(kernels, "scan").work.found_inf.item() == 1.0


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
    "fewer winners than tiles, ties": {"sizes": (40, 6 * TILE), "quota": 3, "kind": "ties"},
}  # fmt: skip
SCORED = ("ties", "mixed dtypes", "many scales", "fewer winners than tiles")  # with every exponent


@pytest.mark.parametrize(
    ("name", "exp"),
    [(name, exp) for name in CUTS for exp in EXPS if exp in (0.0, 2.0) or name in SCORED],
)
def test_cut(name: str, exp: float) -> None:
    case = make_case(**CUTS[name], exp=exp, seed=len(name))
    got, want = (case.run(ops, "scan", "cut") for ops in (kernels, reference))
    count = int(want.work.new_count)
    assert_bits(got, want, "new_count", "threshold")
    for entries in ("new_tensor", "new_position"):
        assert torch.equal(getattr(got.work, entries)[:count], getattr(want.work, entries)[:count])


def test_cut_of_a_general_exponent() -> None:
    """Scores may differ in the last place, so that the entries are far apart here."""
    case = make_case((40,), exp=1.7, num_active=0, quota=5)
    case.params[0].fill_(0.3)
    case.grads[0].copy_(1.5 ** torch.randperm(40, generator=torch.Generator().manual_seed(3)))
    got, want = (case.run(ops, "scan", "cut") for ops in (kernels, reference))
    assert torch.equal(got.work.new_position[:5], want.work.new_position[:5])
    assert_close(got.work.threshold, want.work.threshold, units=32)


@pytest.mark.parametrize(("applied", "quota"), [(0, 3), (1, 5), (2, 9), (50, 9)])
def test_quota_follows_the_schedule(applied: int, quota: int) -> None:
    """At most what the buffers hold; beyond the last step, the last target."""
    case = make_case((50,), num_active=0, quota=9)
    case.targets = torch.tensor([0, 3, 5, 40])
    case.active.progress.copy_(torch.tensor([applied, 0, 0]))
    got, want = (case.run(ops, "scan", "cut") for ops in (kernels, reference))
    assert got.work.new_count.item() == want.work.new_count.item() == quota


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
    case.work.grad_factor.fill_(0.5)
    got, want = (case.run(ops, "update") for ops in (kernels, reference))
    assert_bits(got, want, "progress", "position", "unmask_step")
    for field in ("exp_avg", "exp_avg_sq", "master"):
        assert_close(getattr(got.active, field), getattr(want.active, field))
    for index, (param, expected) in enumerate(zip(got.params, want.params, strict=True)):
        assert_close(param, expected)
        first, last = case.active.offsets[index : index + 2].tolist()
        frozen = torch.ones(param.numel(), dtype=torch.bool)
        frozen[case.active.position[first:last].long()] = False
        assert torch.equal(param[frozen], case.params[index][frozen])


def test_found_inf_skips_the_step() -> None:
    case = make_case(dtypes=(F32, BF16))
    case.work.found_inf.fill_(1.0)
    got = case.run(kernels, "scan", "cut", "append", "update")
    assert got.active.progress.tolist() == [STEP, 12, 3]
    assert all(map(torch.equal, got.params, case.params))
    assert_bits(got, case, "position", "exp_avg", "exp_avg_sq", "unmask_step", "master", "offsets")


@pytest.mark.parametrize("exp", [0.0, 1.0])
def test_whole_step(exp: float) -> None:
    case = make_case(dtypes=(F32, BF16), exp=exp, max_grad_norm=1.0, dense_sizes=(4,))
    got, want = (case.run(ops, "scan", "cut", "append", "update") for ops in (kernels, reference))
    assert_bits(got, want, "position", "offsets", "unmask_step", "progress")
    for param, expected in zip(got.params, want.params, strict=True):
        assert_close(param, expected)


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

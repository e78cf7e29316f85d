"""One optimizer step in the arguments of the operations, for the interpreted Triton kernels."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import op_cases
import torch
from op_cases import assert_same_bits
from step_checks import case_on
from torch import Tensor

from sparse_optim.backends import scoring
from sparse_optim.backends.operands import ActiveSet

TILE = 16
STEP = 7
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
# Sizes around the tile, without a tile, and of several.
SIZES = (1, TILE, 0, TILE - 1, TILE + 1, 3 * TILE + 5)
CPU = torch.device("cpu")


class Case(op_cases.Case):
    """One optimizer step, and its place in the schedule."""

    def run(self, ops: ModuleType, *names: str) -> Case:
        """A copy of the case after the named operations."""
        own = case_on(self, "cpu", ops)
        for name in names:
            getattr(ops, name)(*getattr(own, f"{name}_args")(ops))
        return own


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
    return assemble(params, grads, dense, positions, quota, options, generator)


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
    rows = [i % 2 for i in range(len(params))]
    work = op_cases.work_space(params, len(dense), rows, 2, max(quota, 1), TILE, exp < 0)
    work.scalars.hyper.copy_(
        torch.tensor([[1e-2, 0.9, 0.999, 1e-8, 0.1, 1.0], [3e-3, 0.8, 0.95, 1e-6, 0.0, -1.0]])
    )
    if exp < 0:
        work.tiles.param_bound.copy_(torch.cat([scoring.tile_abs_max(p, TILE) for p in params]))
    active.grad.uniform_(generator=generator)
    options["noise"] = torch.tensor(options.get("noise", ()), dtype=torch.int64)
    options = {"eps": 1e-3, "tile": TILE, **options}
    return Case(grads, params, dense, active, work, targets, **options)


def assert_bits(case: Case, expected: Case, *names: str) -> None:
    """Fields of the buffers are equal, bit for bit."""
    for name in names:
        assert_same_bits(case.buffer(name), expected.buffer(name), name)

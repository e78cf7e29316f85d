"""What norms and clip factors of every backend must be, given its module."""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import ModuleType

import torch
from op_cases import work_space
from torch import Tensor

from sparse_optim.backends.operands import ActiveSet

CPU = torch.device("cpu")
DTYPES = (torch.float32, torch.bfloat16)
MISSING = 2  # of the pool


def norms_of(
    ops: ModuleType,
    grads: Sequence[Tensor],
    params: Sequence[Tensor],
    dense: Sequence[Tensor],
    tile: int,
) -> list[float]:
    """As `scan` writes them, with no entry active."""
    num_tiles = sum(-(-param.numel() // tile) for param in params)
    active = ActiveSet.empty(params, 0, CPU)
    scratch = ops.scratch_bytes(num_tiles, 0, 0)
    work = work_space(params, len(dense), [0] * len(params), 1, 0, tile, False, scratch)
    work.norms.fill_(math.nan)
    ops.scan(
        ops.bind(grads, params, work.table), dense, work.tiles, active, work.norms,
        work.scalars.found_inf, work.scratch,
    )  # fmt: skip
    return work.norms.tolist()


def assert_norms_are_the_tensors_own(
    ops: ModuleType, sizes: Sequence[int], dense_sizes: Sequence[int], tile: int
) -> None:
    """Those of a pool; and the same bits for each tensor alone, in other company and place.

    Beside the square of one entry, float64 loses those of others or not: another order shows.
    """
    generator = torch.Generator().manual_seed(0)
    values = []
    for index, size in enumerate([*sizes, *dense_sizes]):
        value = torch.randn(size, generator=generator)
        value[size // 2 : size // 2 + 1] = 2.0**27
        values.append(value.to(DTYPES[index % 2]))
    params, dense = values[: len(sizes)], values[len(sizes) :]
    grads = [grad[:0] if index == MISSING else grad for index, grad in enumerate(params)]
    together = norms_of(ops, grads, params, dense, tile)
    exact = [float(grad.double().square().sum().sqrt()) for grad in [*grads, *dense]]
    for got, expected in zip(together, exact, strict=True):
        assert math.isclose(got, expected, rel_tol=1e-5), (got, expected)
    alone = [
        norms_of(ops, [grad], [param], [], tile) for grad, param in zip(grads, params, strict=True)
    ]
    alone += [norms_of(ops, [], [], [grad], tile) for grad in dense]
    assert [norm for [norm] in alone] == together
    other_way = norms_of(ops, grads[::-1], params[::-1], dense[::-1], tile)
    assert other_way == together[: len(sizes)][::-1] + together[len(sizes) :][::-1]


def assert_clips(ops: ModuleType, limit: float) -> None:
    """grad_norm and grad_factor by hand; the factor of a norm that is no number does not clip."""
    several = [1.5, 0.0, 2.0, 3.0, 0.5, 7.0] * 90
    for values in ([], [0.0], several, [1e200, 1.0], [math.inf, 0.0], [math.nan, 1.0]):
        norms = torch.tensor(values, dtype=torch.float64)
        norm, factor = torch.full((), math.nan, dtype=torch.float64), torch.full((), math.nan)
        ops.clip(norms, torch.full((), 4.0), limit, norm, factor)
        expected = math.sqrt(sum(value * value for value in values)) / 4
        wanted = torch.tensor(expected, dtype=torch.float64)
        torch.testing.assert_close(norm, wanted, rtol=1e-14, atol=0, equal_nan=True)
        ratio = limit / (expected + 1e-6)
        wanted = torch.tensor((ratio if ratio < 1 else 1.0) / 4)  # NaN is not below 1
        torch.testing.assert_close(factor, wanted, rtol=2e-7, atol=0)

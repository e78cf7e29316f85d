"""The C++ CPU backend: the operations of `reference` as compiled torch operators (csrc/)."""

from __future__ import annotations

import importlib
from collections.abc import Sequence

import torch
from torch import Tensor

from sparse_optim.backends.operands import (
    ActiveSet,
    BiasCorrection,
    NewEntries,
    Rule,
    StepScalars,
    Tiles,
)

importlib.import_module("sparse_optim._C")  # registers torch.ops.sparse_optim
_ops = torch.ops.sparse_optim

# 512 entries: 2 KB of float32, small enough that opening a tile costs little, large enough that
# tile maxima (4 bytes each) do not count. A prototype's choice; not measured anew here.
TILE = 512


def bind(grads: Sequence[Tensor], params: Sequence[Tensor], table: Tensor) -> Tensor:
    """Note pointers, sizes and dtypes in the table, which is what the operations take.

    Once a step: handing two lists of 200 tensors to an operator takes 0.1 ms.
    """
    _ops.bind(grads, params, table)
    return table


def bind_rows(rows: Tensor, table: Tensor) -> Tensor:
    """The same from rows that `held` has read: (S, 4), int64, on the CPU."""
    _ops.bind_rows.default(rows, table)
    return table


def scan(
    bound: Tensor,
    dense_grads: Sequence[Tensor],
    tiles: Tiles,
    active: ActiveSet,
    norms: Tensor,
    found_inf: Tensor,
    scratch: Tensor,
) -> None:
    """See `reference.scan`."""
    _ops.scan.default(
        bound, dense_grads, active.position, active.offsets, tiles.offsets, tiles.size, tiles.max,
        active.grad, norms, found_inf, scratch,
    )  # fmt: skip


clip = _ops.clip.default


def rank(bound: Tensor, tiles: Tiles, active: ActiveSet, noise: Tensor, scratch: Tensor) -> None:
    """See `reference.rank`."""
    _ops.rank.default(
        bound, active.position, active.offsets, tiles.offsets, noise, tiles.size, tiles.max, scratch
    )


def cut(
    bound: Tensor,
    tiles: Tiles,
    active: ActiveSet,
    rule: Rule,
    targets: Tensor,
    found_inf: Tensor,
    new: NewEntries,
    scratch: Tensor,
) -> None:
    """See `reference.cut`."""
    _ops.cut.default(
        bound, active.position, active.offsets, tiles.offsets, tiles.max, tiles.param_bound,
        targets, active.progress, found_inf, rule.exp, rule.eps, rule.noise, tiles.size, new.tensor,
        new.position, new.count, new.threshold, scratch,
    )  # fmt: skip


def append(bound: Tensor, new: NewEntries, active: ActiveSet, scratch: Tensor) -> None:
    """See `reference.append`."""
    _ops.append.default(
        bound, new.tensor, new.position, new.count, active.position, active.exp_avg,
        active.exp_avg_sq, active.unmask_step, active.master, active.grad, active.offsets,
        active.progress, scratch,
    )  # fmt: skip


def update(
    bound: Tensor, active: ActiveSet, scalars: StepScalars, bias_correction: BiasCorrection
) -> None:
    """See `reference.update`."""
    _ops.update.default(
        bound, active.position, active.offsets, active.grad, scalars.grad_factor,
        scalars.found_inf, scalars.hyper, scalars.group_index, bias_correction, active.exp_avg,
        active.exp_avg_sq, active.unmask_step, active.master, active.progress, scalars.arrived,
    )  # fmt: skip


sampled_grad = _ops.sampled_grad.default
gather = _ops.gather.default
exchange = _ops.exchange.default


def scratch_bytes(num_tiles: int, capacity: int, max_quota: int) -> int:
    """No scratch: work space of the CPU kernels lives on their stacks and in short vectors."""
    return 0


def _mutates_only(*args: object) -> None:
    """Shape function of an operator that returns nothing."""


for _name in (
    "bind", "bind_rows", "scan", "scan_one", "clip", "rank", "cut", "collect_begin", "collect",
    "collect_end", "append", "update", "sampled_grad", "gather", "exchange",
):  # fmt: skip
    torch.library.register_fake(f"sparse_optim::{_name}", _mutates_only)

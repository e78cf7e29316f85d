"""The CUDA backend: the operations of `reference` as kernels on the parameters' device (csrc/cuda).

Nothing in a step waits for the device: quota, counts and flags stay there, so that a step can be
captured in a CUDA graph. Selections equal those of `reference` bit for bit, for exponents in
{-1, -0.5, 0, 0.5, 1, 2}.

Unrun on a GPU so far: the kernels are compiled for sm_80 to sm_120 and run against `reference` by
an emulator on the CPU. No claim about speed has been measured.
"""

from __future__ import annotations

import importlib

import torch
from torch import Tensor

from sparse_optim.backends.cpp import (
    append,
    bind,
    bind_rows,
    clip,
    cut,
    exchange,
    gather,
    rank,
    sampled_grad,
    scan,
    update,
)
from sparse_optim.backends.operands import ActiveSet, NewEntries, Rule, Tiles

__all__ = [
    "TILE", "append", "bind", "bind_rows", "clip", "collect", "collect_begin", "collect_end",
    "collected_bytes", "cut", "exchange", "gather", "rank", "sampled_grad", "scan",
    "scan_one", "scratch_bytes", "update",
]  # fmt: skip

# The operators are those of `cpp`; this registers their CUDA kernels.
_kernels = importlib.import_module("sparse_optim._C_cuda")
_ops = torch.ops.sparse_optim

# 4096 entries: 128 for each lane of the warp that reads a tile, so that searching the active
# entries and reducing over the warp cost little beside; tile maxima are 4 bytes in 16 KB.
# Larger ones would make `cut` read more around each winner. Not yet measured on a GPU.
TILE = 4096


def scratch_bytes(num_tiles: int, capacity: int, max_quota: int) -> int:
    """Bytes of scratch memory: 200 KB for the sums of dense gradients and 4 per tile; or 400 KB for
    candidates and 24 per tile; or 8 to 12 per entry of the capacity and 8 per entry of the quota;
    the largest of these."""
    return int(_kernels.scratch_bytes(num_tiles, capacity, max_quota))


def scan_one(
    grad: Tensor,
    param: Tensor,
    table: Tensor,
    tiles: Tiles,
    active: ActiveSet,
    norm: Tensor,
    found_inf: Tensor,
    arrived: Tensor,
    scratch: Tensor,
) -> None:
    """`bind` and `scan` of one tensor, in one launch.

    Args:
        table: (1, 4), int64, its row. Mutated.
        tiles, active, norm: of the tensor; norm is (1,).
        arrived: as in `StepScalars`.
    """
    _ops.scan_one.default(
        grad, param, table, active.position, active.offsets, tiles.size, tiles.max, active.grad,
        norm, found_inf, arrived, scratch,
    )  # fmt: skip


# An exact running selection over gradients that come one at a time. See csrc/cuda/collect.cu.


def collected_bytes(max_quota: int) -> int:
    """Bytes of a step's candidates: 2 MB, and for quotas above 4,096 64 per entry of the largest
    quota, where that is more."""
    return int(_kernels.collected_bytes(max_quota))


def collect_begin(active: ActiveSet, targets: Tensor, max_quota: int, collected: Tensor) -> None:
    """Start a step's selection in `collected`, (collected_bytes(max_quota),), uint8."""
    _ops.collect_begin.default(targets, active.progress, max_quota, collected)


def collect(
    bound: Tensor,
    tiles: Tiles,
    active: ActiveSet,
    rule: Rule,
    scored: bool,
    first: int,
    max_quota: int,
    collected: Tensor,
    scratch: Tensor,
) -> None:
    """Let the frozen entries of tensors first, first + 1, ... compete.

    Args:
        bound, tiles, active, rule, scratch: of these tensors, as in `reference.cut`; scanned.
        scored: ranked by scores; in `bound` they take the place of gradients, and these that of
            parameters.
    """
    _ops.collect.default(
        bound, active.position, active.offsets, tiles.offsets, tiles.max, tiles.param_bound,
        rule.exp, rule.eps, scored, tiles.size, first, max_quota, collected, scratch,
    )  # fmt: skip


def collect_end(found_inf: Tensor, new: NewEntries, grad: Tensor, collected: Tensor) -> None:
    """Write the step's new entries, as `reference.cut` does, and their gradients.

    Args:
        new: with room for max_quota entries, as in `collect_begin`.
        grad: (max_quota,), float32. Mutated.
    """
    _ops.collect_end.default(
        found_inf, new.tensor, new.position, new.count, new.threshold, grad, collected
    )

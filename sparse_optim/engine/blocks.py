"""The memory of sharded parameters (DTensors) in this process, and where it is in the whole tensor.

A shard is a block of its tensor. Entry p of it, in C order, is this entry of the whole tensor:

    (p // run) * pitch + p % run + offset

`Shard(0)` is one run; `Shard(1)` of a matrix has a run in each row.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor


def is_sharded(param: Tensor) -> bool:
    """Whether a tensor is a DTensor; does not import torch.distributed.tensor."""
    if type(param) is Tensor or type(param) is torch.nn.Parameter:
        return False
    return hasattr(param, "to_local") and hasattr(param, "placements")


def local_of(tensor: Any) -> Tensor:
    """The memory of a tensor in this process; of a plain tensor, itself."""
    if not is_sharded(tensor):
        plain: Tensor = tensor
        return plain
    # `to_local()` makes a view each time, which took 4 us a parameter and call.
    local: Any = tensor._local_tensor  # noqa: SLF001
    return local.wait() if hasattr(local, "wait") else local  # type: ignore[no-any-return]


def local_gradient(param: Any, name: str) -> Tensor | None:
    """The gradient of this process's shard of a parameter, or None.

    One with other placements (Partial, after tensor parallelism) is redistributed, which all
    processes do together.

    Raises:
        TypeError: the gradient is no DTensor.
    """
    grad: Any = param.grad
    if grad is None:
        return None
    if not is_sharded(grad):
        raise TypeError(f"{name} is a DTensor, but its gradient is a {type(grad).__name__}")
    if grad.placements != param.placements:
        grad = grad.redistribute(param.device_mesh, param.placements)
    return local_of(grad)


@dataclass(frozen=True)
class Block:
    """Where a shard is in its tensor; see the module.

    Attributes:
        entries: of the shard.
    """

    run: int
    pitch: int
    offset: int
    entries: int

    @staticmethod
    def of(param: Any, name: str) -> Block:
        """The block that this process holds of a parameter.

        Raises:
            TypeError: it is a sum to be made (Partial), or no block of this form.
        """
        from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

        if not is_sharded(param):
            return Block(max(param.numel(), 1), max(param.numel(), 1), 0, param.numel())
        whole, placements = tuple(param.shape), param.placements
        if any(each.is_partial() for each in placements):
            raise TypeError(
                f"{name} has placements {placements}: expected Shard or Replicate. Redistribute it "
                "before the optimizer is built"
            )
        shape, begin = compute_local_shape_and_global_offset(whole, param.device_mesh, placements)
        local = tuple(local_of(param).shape)
        if tuple(shape) != local:
            raise TypeError(
                f"{name} has placements {placements} and a shard of {local}, expected "
                f"{tuple(shape)}: such a layout is not supported"
            )
        return block_of(whole, shape, begin, name)


def block_of(whole: Sequence[int], shape: Sequence[int], begin: Sequence[int], name: str) -> Block:
    """The block of `shape` that begins at the coordinates `begin` of a tensor of shape `whole`.

    Raises:
        TypeError: it takes more than one run in each of evenly spaced places.

    Examples:
        >>> block_of((6, 4), (2, 4), (2, 0), "rows")
        Block(run=8, pitch=24, offset=8, entries=8)
        >>> block_of((6, 4), (6, 2), (0, 2), "columns")
        Block(run=2, pitch=4, offset=2, entries=12)
    """
    entries = prod(shape)
    if not entries:
        return Block(1, 1, 0, 0)
    strides = [prod(whole[dim + 1 :]) for dim in range(len(whole))]
    offset = sum(at * stride for at, stride in zip(begin, strides, strict=True))
    cut = [dim for dim, size in enumerate(shape) if size != whole[dim]]
    last = cut[-1] if cut else 0
    before = cut[:-1]
    if before and prod(shape[: before[-1]]) != 1:
        raise TypeError(
            f"{name} of shape {tuple(whole)} is sharded in dimensions {cut}: at most the first one "
            "and one more are supported"
        )
    return Block(prod(shape[last:]), prod(whole[last:]), offset, entries)


def make_up(blocks: Collection[Block], entries: int) -> bool:
    """Whether different blocks are a grid that holds each of a tensor's entries once."""
    columns: dict[tuple[int, int], list[tuple[int, int]]] = {}
    pitch = max((block.pitch for block in blocks if block.entries), default=1)
    for block in blocks:
        if block.entries:
            row, column = divmod(block.offset, block.pitch)
            rows = (row, row + block.entries // block.run)
            columns.setdefault((column, column + block.run), []).append(rows)
            if block.pitch != pitch:
                return False
    return all(covers(rows, entries // pitch) for rows in columns.values()) and covers(
        list(columns), pitch if entries else 0
    )


def covers(ranges: Sequence[tuple[int, int]], size: int) -> bool:
    """Whether ranges are 0 to size, without gap or overlap."""
    ends = [0, *(end for _, end in sorted(ranges))]
    return ends == [*(begin for begin, _ in sorted(ranges)), size]

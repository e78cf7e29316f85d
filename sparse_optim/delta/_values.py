"""The changed entries of one parameter in memory."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor

from sparse_optim.delta._packing import packed_bytes
from sparse_optim.delta._tensors import DTYPE_CODES, gather, host_copy
from sparse_optim.errors import SparseOptimError

MAX_NUMEL = 2**63 - 1  # Positions are int64.
MAX_DIMS = 64  # torch's own limit for indexing and copies.
UINT32_NUMEL = 2**32  # Up to this size every position fits in uint32.
Made = TypeVar("Made")


class DeltaError(SparseOptimError):
    """A delta, its file, or the model that it is applied to is invalid."""


def check_shape(shape: Sequence[int]) -> tuple[int, ...]:
    """Return `shape` as a tuple, or raise DeltaError when no tensor can have it."""
    if not all(isinstance(size, int) and size >= 0 for size in shape):
        raise DeltaError(f"shape: expected integers >= 0, got {list(shape)[:8]}")
    if len(shape) > MAX_DIMS or math.prod(size for size in shape if size) > MAX_NUMEL:
        raise DeltaError(
            f"shape: expected at most {MAX_DIMS} dimensions and {MAX_NUMEL} entries, "
            f"got {list(shape)[:8]}"
        )
    return tuple(shape)


def unchecked(like: Made, **fields: object) -> Made:
    """`dataclasses.replace` with parts of checked values: no check, and tensors are shared."""
    made = object.__new__(type(like))
    held = vars(made)
    held.update(vars(like), **fields)
    for name, part in held.items():
        if type(part) is dict:  # faster than isinstance, of which an increment makes thousands
            held[name] = part.copy()
    return made


def check_positions(label: str, position: Tensor, numel: int) -> None:
    if position.dtype != torch.int64 or position.dim() != 1:
        raise DeltaError(
            f"{label}: expected int64 of shape (n,), got {position.dtype} of shape "
            f"{tuple(position.shape)}"
        )
    if position.numel() == 0:
        return
    if bool((position[1:] <= position[:-1]).any()):
        raise DeltaError(f"{label}: expected strictly ascending positions: sort, drop duplicates")
    first, last = int(position[0]), int(position[-1])
    if first < 0 or last >= numel:
        raise DeltaError(
            f"{label}: expected 0 <= position < {numel}, got {first if first < 0 else last}"
        )


def _check_column(label: str, column: Tensor, dtype: torch.dtype, count: int) -> None:
    if column.dtype != dtype or tuple(column.shape) != (count,):
        raise DeltaError(
            f"{label}: expected {dtype} of shape ({count},), one for each position, got "
            f"{column.dtype} of shape {tuple(column.shape)}"
        )


@dataclass(frozen=True, eq=False)
class SparseValues:
    """The changed entries of one parameter.

        param.flat[position] = value        (flat: C order, for any strides)

    Tensors are copied to the host: changing the arguments later has no effect here.

    Args:
        shape: shape of the parameter.
        dtype: dtype of the parameter.
        position: (n,), int64, strictly ascending, 0 <= position < numel.
        value: (n,), dtype. Absolute final values, not differences.
        unmask_step: (n,), int32, >= 0. Optimizer step at which each entry was unmasked.
        original: (n,), dtype. Values of the base, for `revert_delta`.

    Raises:
        DeltaError: names the argument, what was expected, what arrived.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    position: Tensor
    value: Tensor
    unmask_step: Tensor | None = None
    original: Tensor | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", check_shape(tuple(self.shape)))
        if self.dtype not in DTYPE_CODES:
            raise DeltaError(f"dtype: safetensors cannot hold {self.dtype}")
        check_positions("position", self.position, self.numel)
        count = self.position.numel()
        _check_column("value", self.value, self.dtype, count)
        if self.unmask_step is not None:
            _check_column("unmask_step", self.unmask_step, torch.int32, count)
            if bool((self.unmask_step < 0).any()):
                raise DeltaError("unmask_step: expected steps >= 0, got a negative one")
        if self.original is not None:
            _check_column("original", self.original, self.dtype, count)
        for name in ("position", "value", "unmask_step", "original"):
            column = getattr(self, name)
            object.__setattr__(self, name, None if column is None else host_copy(column))

    @property
    def numel(self) -> int:
        """Entries of the parameter."""
        return math.prod(self.shape)

    @property
    def position_dtype(self) -> torch.dtype:
        """dtype of the positions in a file: uint32 if every position fits, else int64."""
        return torch.uint32 if self.numel <= UINT32_NUMEL else torch.int64

    @property
    def num_entries(self) -> int:
        """Changed entries."""
        return self.position.numel()

    @property
    def nbytes(self) -> int:
        """Bytes that the entries take in a file, with packed positions."""
        width = self.dtype.itemsize
        width += 4 if self.unmask_step is not None else 0
        width += self.dtype.itemsize if self.original is not None else 0
        return self.num_entries * width + packed_bytes(self.num_entries, self.numel)

    def take(self, keep: Tensor) -> "SparseValues":
        """The entries where `keep`, (n,) bool, is true."""
        return replace(
            self,
            position=self.position[keep],
            value=gather(self.value, keep.nonzero().view(-1)),
            unmask_step=None if self.unmask_step is None else self.unmask_step[keep],
            original=None
            if self.original is None
            else gather(self.original, keep.nonzero().view(-1)),
        )

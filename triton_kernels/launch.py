"""Host side of the launches: the table of tensors, scratch, grids.

Operations run one after the other, and each carves its arrays from the whole of scratch.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from .device_functions import BFLOAT16, COLUMNS, FLOAT16, FLOAT32

# Pieces of scratch begin at multiples of this, so that loads of 16 bytes stay aligned.
ALIGNMENT = 16

_CODES = {
    torch.float32: FLOAT32.value,
    torch.bfloat16: BFLOAT16.value,
    torch.float16: FLOAT16.value,
}

Pieces = Sequence[tuple[int, torch.dtype]]


def bind(grads: Sequence[Tensor], params: Sequence[Tensor], table: Tensor) -> Tensor:
    """Note addresses, sizes and dtypes in the table, which is what the operations take.

    By the C++ operator where the CUDA backend is installed. It looks at the same things in less of
    the host's time, and needs no pinned memory; what it refuses is looked at again here.

    Args, Raises: see `reference.bind`; also refuses other dtypes, devices and strided tensors.
    """
    compiled = compiled_bind(table.device.type)
    if compiled is not None:
        with contextlib.suppress(RuntimeError):
            compiled(grads, params, table)
            return table
    if rows := rows_of(grads, params, table):
        write(torch.tensor(rows, dtype=torch.int64), table)
    return table


def bind_rows(rows: Tensor, table: Tensor) -> Tensor:
    """The same from rows that one call of C++ has read: (S, 4), int64, on the CPU."""
    if compiled_bind(table.device.type) is not None:
        torch.ops.sparse_optim.bind_rows.default(rows, table)
    else:
        write(rows, table)
    return table


@functools.cache
def compiled_bind(device_type: str) -> Callable[..., object] | None:
    """`bind` of the CUDA backend, which writes the same table; None where it is not installed."""
    if device_type != "cuda":
        return None
    try:
        for extension in ("_C", "_C_cuda"):  # the operator, and its kernel
            importlib.import_module(f"sparse_optim.{extension}")
    except ImportError:
        return None
    return torch.ops.sparse_optim.bind


def write(rows: Tensor, table: Tensor) -> None:
    """table <- rows, without waiting for the device."""
    _staged.setdefault(table, _Staging()).write(rows, table)


def rows_of(
    grads: Sequence[Tensor], params: Sequence[Tensor], table: Tensor
) -> list[tuple[int, ...]]:
    """The rows of the table for these tensors, which are checked as `bind` promises."""
    rows: list[tuple[int, ...]] = []
    for index, (grad, param) in enumerate(zip(grads, params, strict=True)):
        _check(grad, f"grads[{index}]", table)
        _check(param, f"params[{index}]", table)
        if grad.numel() and grad.shape != param.shape:
            raise ValueError(
                f"grads[{index}] has {grad.numel()} entries, its parameter {param.numel()}, "
                "or another shape"
            )
        dtypes = _CODES[grad.dtype] << 8 | _CODES[param.dtype]
        address = grad.data_ptr() if grad.numel() else 0
        rows.append((address, param.data_ptr(), param.numel(), dtypes))
    if table.shape != (len(rows), COLUMNS.value) or table.dtype != torch.int64:
        raise ValueError(
            f"table must be int64 of shape {(len(rows), COLUMNS.value)}, got {table.dtype} of "
            f"shape {tuple(table.shape)}"
        )
    return rows


class _Staging:
    """Memory from which a table is copied without waiting.

    Outside of a CUDA graph each copy takes a fresh pinned block: the caching allocator hands it out
    again only when the copy that reads it is done. A graph reads its block at every replay, and
    nothing can be allocated while it is captured: a block is kept ready, and then kept as long as
    the table.

    Rows that a table was given before are copied again all the same: another table may be a view of
    the same memory, and a graph's replay writes it behind our back.
    """

    def __init__(self) -> None:
        self._spare: Tensor | None = None
        self._captured: list[Tensor] = []

    def write(self, rows: Tensor, table: Tensor) -> None:
        """table <- rows"""
        if table.is_cuda and torch.cuda.is_current_stream_capturing():
            self._copy_in_graph(rows, table)
            return
        table.copy_(rows.pin_memory() if table.is_cuda else rows, non_blocking=True)
        if table.is_cuda and self._spare is None:
            self._spare = torch.empty(table.shape, dtype=torch.int64, pin_memory=True)

    def _copy_in_graph(self, rows: Tensor, table: Tensor) -> None:
        if self._spare is None:
            raise RuntimeError("take a step between two captures of step() in CUDA graphs")
        self._spare.copy_(rows)
        table.copy_(self._spare, non_blocking=True)
        self._captured.append(self._spare)
        self._spare = None


# By identity; an entry goes with its table.
_staged: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def _check(tensor: Tensor, name: str, table: Tensor) -> None:
    if tensor.dtype not in _CODES:
        raise ValueError(f"{name} must be float32, bfloat16 or float16, got {tensor.dtype}")
    if tensor.device != table.device:
        raise ValueError(f"{name} must be on {table.device}, got {tensor.device}")
    if not tensor.is_contiguous():
        raise ValueError(f"{name} must be contiguous, got strides {tensor.stride()}")


def check_vector(name: str, vector: Tensor, dtype: torch.dtype, count: int) -> None:
    """Raise ValueError unless there are `count` contiguous elements of `dtype`."""
    if vector.dtype != dtype or vector.numel() != count:
        raise ValueError(f"{name} must hold {count} elements of {dtype}")
    if not vector.is_contiguous():
        raise ValueError(f"{name} must be contiguous, got strides {vector.stride()}")


def carve(scratch: Tensor, pieces: Pieces) -> list[Tensor]:
    """Views into scratch of the given (elements, dtype), one after the other."""
    views, begin = [], 0
    for count, dtype in pieces:
        end = begin + count * dtype.itemsize
        views.append(scratch[begin:end].view(dtype))
        begin += aligned_bytes(count, dtype)
    return views


def total_bytes(pieces: Pieces) -> int:
    """Scratch that `carve` needs for these pieces."""
    return sum(aligned_bytes(count, dtype) for count, dtype in pieces)


def aligned_bytes(count: int, dtype: torch.dtype) -> int:
    """Bytes of one piece, rounded up to ALIGNMENT."""
    return -(-count * dtype.itemsize // ALIGNMENT) * ALIGNMENT


def blocks_of(count: int, block: int) -> int:
    """Programs that cover `count` elements with `block` each."""
    return -(-count // block)

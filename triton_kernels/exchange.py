"""exchange: value[e] <-> the parameter at position[e], bit by bit; gather: value[e] <- it.

Bytes: 12 per entry streamed (position, value each way), and a 32-byte sector of the parameter each
way per entry; gather: 8, and one sector. Results are those of the reference; positions outside of
their tensor are left out.

An exchange of 3.5e6 entries: 266 MB. Predicted: bytes / bandwidth = 0.13 ms on A100 (2.0 TB/s),
0.35 ms on A6000 (0.768), 80 us on H100 (3.35), 55 us on H200 (4.8).
Not run on a GPU yet: compiled ahead of time and interpreted.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .device_functions import COLUMNS, FLOAT32, NUMEL, PARAM, lower_bound, param_dtype
from .launch import blocks_of, check_vector

# As `update`: the gathers want many requests in flight. Unmeasured.
EXCHANGE_BLOCK = 256
EXCHANGE_WARPS = 4


@triton.jit(do_not_specialize=["num_tensors", "capacity"])
def exchange_kernel(
    table_ptr,
    position_ptr,
    offsets_ptr,
    value_ptr,
    num_tensors,
    capacity,
    WRITES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    in_bounds = offs < tl.minimum(tl.load(offsets_ptr + num_tensors), capacity)
    first_tensor = tl.zeros((BLOCK,), tl.int32)
    behind = lower_bound(
        offsets_ptr, first_tensor, first_tensor + num_tensors + 1, num_tensors + 1, offs + 1
    )
    tensor = tl.where(in_bounds, behind - 1, 0)
    position = tl.load(position_ptr + offs, mask=in_bounds, other=0)
    in_bounds &= (position >= 0) & (position < tl.load(table_ptr + tensor * COLUMNS + NUMEL))
    address = tl.load(table_ptr + tensor * COLUMNS + PARAM)
    is_wide = param_dtype(table_ptr, tensor) == FLOAT32
    wide_ptr = address.to(tl.pointer_type(tl.int32)) + position
    narrow_ptr = address.to(tl.pointer_type(tl.int16)) + position

    wide = tl.load(wide_ptr, mask=in_bounds & is_wide, other=0)
    narrow = tl.load(narrow_ptr, mask=in_bounds & (is_wide == 0), other=0)
    if WRITES:
        value = tl.load(value_ptr + offs, mask=in_bounds, other=0)
        tl.store(wide_ptr, value, mask=in_bounds & is_wide)
        tl.store(narrow_ptr, value.to(tl.int16), mask=in_bounds & (is_wide == 0))
    tl.store(value_ptr + offs, tl.where(is_wide, wide, narrow.to(tl.int32) & 0xFFFF), in_bounds)


def gather(bound: Tensor, position: Tensor, offsets: Tensor, value: Tensor) -> None:
    """See `reference.gather`, and `exchange`."""
    _launch(bound, position, offsets, value, writes=False)


def exchange(bound: Tensor, position: Tensor, offsets: Tensor, value: Tensor) -> None:
    """See `reference.exchange`.

    Positions are not checked, which would wait for the device.

    Raises:
        ValueError: shapes, dtypes or devices do not match.
    """
    _launch(bound, position, offsets, value, writes=True)


def _launch(
    bound: Tensor, position: Tensor, offsets: Tensor, value: Tensor, *, writes: bool
) -> None:
    num_tensors = bound.numel() // COLUMNS.value
    check_vector("position", position, torch.int32, position.numel())
    check_vector("offsets", offsets, torch.int64, num_tensors + 1)
    check_vector("value", value, torch.int32, position.numel())
    if len({each.device for each in (bound, position, offsets, value)}) > 1:
        raise ValueError("bound, position, offsets and value must be on one device")
    if not num_tensors or not position.numel():
        return
    with torch.cuda.device_of(bound):
        exchange_kernel[(blocks_of(position.numel(), EXCHANGE_BLOCK),)](
            bound, position, offsets, value, num_tensors, position.numel(), WRITES=writes,
            BLOCK=EXCHANGE_BLOCK, num_warps=EXCHANGE_WARPS,
        )  # fmt: skip

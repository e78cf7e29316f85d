"""sampled_grad: the gradient of a weight at its active entries alone.

    out[e] <- out[e] + sum over tokens t of grad_output[t, row(e)] * input[t, column(e)]

A position is a column of `outer` times the width of `inner`, plus a column of `inner`. Tokens are
rows, so an entry that read its columns by itself would move a sector of 32 bytes per value. Both
matrices are therefore transposed first, which leaves the tokens of a column together, and each
entry is a dot product of two runs of memory.

Bytes: both matrices read and written once by the transpose, then 2 values per entry and token, of
which consecutive entries of a row share one. Predicted, not measured, for 3.5M entries of a 7B
model in bfloat16 and 4096 tokens: 41 GB by the transposes and 29 to 57 GB through L2, on an H100 25
ms against 90 ms for the dense products; the CUDA kernel needs no transposed copy. Bytes / bandwidth
of the transposes alone: 20 ms on A100 (2.0 TB/s), 53 on A6000 (0.768), 12 on H100 (3.35), 8.5 on
H200 (4.8).

Not bitwise equal to the reference: each of TOKENS lanes sums every TOKENS-th token in turn, then
the lanes are added in pairs. The order does not depend on the layout or on tokens of zero gradient
at the end. Entries whose position is outside of the weight are left as they are.
Not run on a GPU yet: compiled ahead of time and interpreted.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import blocks_of, check_vector

# Tokens of a column that are read at once, a multiple of what 16 bytes hold: four warps read 16
# entries with 16-byte loads, 32 products a thread. Small programs, as a weight may have few
# entries. Unmeasured.
TOKENS = 256
ENTRIES = 16
# A tile of the transpose, 16 values a thread; it reads runs of 64 bytes of bfloat16 and writes runs
# of 128. TURN_TOKENS divides TOKENS. Unmeasured.
TURN_TOKENS = 64
TURN_COLUMNS = 32
# Of a transposed copy at most; more tokens take several rounds. 4096 tokens of 16384 columns in
# bfloat16 take one. ROUND_TOKENS bounds the second dimension of a grid, of which there are 65535.
ROUND_BYTES = 128 << 20
ROUND_TOKENS = 1 << 20


@triton.jit(do_not_specialize=["tokens", "token_blocks", "width", "row_stride", "column_stride"])
def transpose_kernel(
    matrix_ptr,
    turned_ptr,
    tokens,
    token_blocks,
    width,
    row_stride,
    column_stride,
    UNIT: tl.constexpr,
    TOKENS: tl.constexpr,
    TURN_TOKENS: tl.constexpr,
    TURN_COLUMNS: tl.constexpr,
):
    """turned[c, t] <- matrix[t, c], 0 for t from `tokens` up to token_blocks * TOKENS."""
    column = tl.program_id(0).to(tl.int64) * TURN_COLUMNS + tl.arange(0, TURN_COLUMNS)
    token = tl.program_id(1).to(tl.int64) * TURN_TOKENS + tl.arange(0, TURN_TOKENS)
    if UNIT:
        offs = token[:, None] * row_stride + column[None, :]
    else:
        offs = token[:, None] * row_stride + column[None, :] * column_stride
    in_bounds = (token < tokens)[:, None] & (column < width)[None, :]
    values = tl.trans(tl.load(matrix_ptr + offs, mask=in_bounds, other=0.0))
    turned = turned_ptr + (column * token_blocks * TOKENS)[:, None] + token[None, :]
    tl.store(turned, values, mask=(column < width)[:, None])


@triton.jit(do_not_specialize=["num_entries", "token_blocks", "inner_width", "size"])
def sampled_grad_kernel(
    outer_ptr,
    inner_ptr,
    position_ptr,
    out_ptr,
    num_entries,
    token_blocks,
    inner_width,
    size,
    TOKENS: tl.constexpr,
    ENTRIES: tl.constexpr,
):
    offs = tl.program_id(0).to(tl.int64) * ENTRIES + tl.arange(0, ENTRIES)
    position = tl.load(position_ptr + offs, mask=offs < num_entries, other=-1)
    in_bounds = (position >= 0) & (position < size)
    position = tl.where(in_bounds, position, 0)
    # The compiler reads 16 bytes at a time because it knows that runs begin at multiples of TOKENS.
    outer_begin = (position // inner_width).to(tl.int64) * token_blocks * TOKENS
    inner_begin = (position % inner_width).to(tl.int64) * token_blocks * TOKENS
    token = tl.arange(0, TOKENS)
    outer_run = outer_ptr + outer_begin[:, None] + token[None, :]
    inner_run = inner_ptr + inner_begin[:, None] + token[None, :]
    total = tl.zeros((ENTRIES, TOKENS), tl.float32)
    for block in range(token_blocks):
        outer = tl.load(outer_run + block * TOKENS).to(tl.float32)
        inner = tl.load(inner_run + block * TOKENS).to(tl.float32)
        total += outer * inner
    before = tl.load(out_ptr + offs, mask=in_bounds, other=0.0)
    tl.store(out_ptr + offs, before + tl.sum(total, axis=1), mask=in_bounds)


def sampled_grad(
    input: Tensor, grad_output: Tensor, position: Tensor, transposed: bool, out: Tensor
) -> None:
    """See `reference.sampled_grad`.

    Positions are not checked, which would wait for the device.

    Raises:
        ValueError: shapes, dtypes or devices do not match.
    """
    _check(input, grad_output, position, out)
    outer, inner = (input, grad_output) if transposed else (grad_output, input)
    entries, size = position.numel(), outer.size(1) * inner.size(1)
    if not entries or not size:
        return
    at_once = _tokens_at_once(outer, inner)
    with torch.cuda.device_of(out):
        for outer_part, inner_part in zip(outer.split(at_once), inner.split(at_once), strict=True):
            if not outer_part.size(0):  # which `split` gives for no tokens
                continue
            sampled_grad_kernel[(blocks_of(entries, ENTRIES),)](
                _transpose(outer_part), _transpose(inner_part), position, out, entries,
                blocks_of(inner_part.size(0), TOKENS), inner.size(1), size, TOKENS=TOKENS,
                ENTRIES=ENTRIES, num_warps=4,
            )  # fmt: skip


def _tokens_at_once(outer: Tensor, inner: Tensor) -> int:
    """Tokens of a round: a multiple of TOKENS; it depends on the widths, not on the tokens."""
    row_bytes = max(matrix.size(1) * matrix.itemsize for matrix in (outer, inner))
    return max(min(ROUND_BYTES // row_bytes, ROUND_TOKENS) // TOKENS, 1) * TOKENS


def _transpose(matrix: Tensor) -> Tensor:
    """The columns as rows, each filled up with zeros to a multiple of TOKENS."""
    tokens, width = matrix.shape
    token_blocks = blocks_of(tokens, TOKENS)
    turned = matrix.new_empty(width, token_blocks * TOKENS)
    row_stride, column_stride = matrix.stride()
    transpose_kernel[(blocks_of(width, TURN_COLUMNS), turned.size(1) // TURN_TOKENS)](
        matrix, turned, tokens, token_blocks, width, row_stride, column_stride,
        UNIT=column_stride == 1, TOKENS=TOKENS, TURN_TOKENS=TURN_TOKENS,
        TURN_COLUMNS=TURN_COLUMNS, num_warps=4,
    )  # fmt: skip
    return turned


def _check(input: Tensor, grad_output: Tensor, position: Tensor, out: Tensor) -> None:
    if input.dim() != 2 or grad_output.dim() != 2 or input.size(0) != grad_output.size(0):
        raise ValueError(
            "input must be (T, in) and grad_output (T, out), got "
            f"{tuple(input.shape)} and {tuple(grad_output.shape)}"
        )
    for name, matrix in (("input", input), ("grad_output", grad_output)):
        if matrix.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise ValueError(f"{name} must be float32, bfloat16 or float16, got {matrix.dtype}")
    check_vector("position", position, torch.int32, position.numel())
    check_vector("out", out, torch.float32, position.numel())
    if len({each.device for each in (input, grad_output, position, out)}) > 1:
        raise ValueError("input, grad_output, position and out must be on one device")

"""Arguments of `sampled_grad`, and checks of what it gives, for every backend alike."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import ModuleType

import torch
from op_cases import DTYPES, assert_as_exact, assert_same_bits, unaligned
from torch import Tensor


def contiguous(values: Tensor) -> Tensor:
    return values


def columns_of_wider(values: Tensor) -> Tensor:
    """As a slice of a matrix that has more columns, as of a fused projection."""
    wider = values.new_full((values.size(0), values.size(1) + 21), float("nan"))
    wider[:, 5 : 5 + values.size(1)] = values
    return wider[:, 5 : 5 + values.size(1)]


def every_second_row(values: Tensor) -> Tensor:
    return values.repeat_interleave(2, dim=0)[::2]


def column_major(values: Tensor) -> Tensor:
    return values.t().contiguous().t()


def every_second_column(values: Tensor) -> Tensor:
    """Rows that begin at multiples of 16 bytes all the same."""
    wider = values.new_full((values.size(0), (2 * values.size(1) + 15) // 16 * 16), float("nan"))
    columns = wider[:, : 2 * values.size(1) : 2]
    return columns.copy_(values)


def expanded(values: Tensor) -> Tensor:
    """The first token for all, with stride 0, as the gradient of a sum."""
    return values[:1].expand(values.shape)


LAYOUTS = (
    contiguous, unaligned, columns_of_wider, every_second_row, every_second_column, column_major,
    expanded,
)  # fmt: skip

# tokens, in, out, active entries: around 16 lanes, blocks of up to 256 tokens, warps, empty sizes
SIZES = (
    (0, 5, 7, 9),
    (1, 1, 1, 1),
    (1, 16, 16, 256),
    (15, 3, 40, 50),
    (16, 40, 3, 50),
    (17, 33, 18, 300),
    (64, 16, 48, 0),
    (65, 130, 20, 700),
    (257, 31, 65, 400),
    (300, 100, 17, 1700),
)
LARGE_SIZES = ((1030, 768, 260, 900), (4100, 40, 24, 200))


def on(values: Tensor, device: torch.device | str) -> Tensor:
    """The same values at the same offset and strides."""
    if values.device == torch.device(device):
        return values
    count = values.untyped_storage().nbytes() // values.itemsize
    whole = values.as_strided((count,), (1,), 0).to(device)
    return whole.as_strided(values.shape, values.stride(), values.storage_offset())


@dataclass
class SampledCase:
    """One call: input (T, in), grad_output (T, out), position, and what `out` holds before."""

    input: Tensor
    grad_output: Tensor
    position: Tensor
    transposed: bool
    out: Tensor

    def run(self, ops: ModuleType, device: torch.device | str = "cpu") -> Tensor:
        """What is in `out` afterwards, on the CPU."""
        input, grad_output = on(self.input, device), on(self.grad_output, device)
        out = self.out.clone().to(device)
        ops.sampled_grad(input, grad_output, self.position.to(device), self.transposed, out)
        return out.cpu()

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The same entries of the dense product in a dtype."""
        input, grad_output = self.input.to(dtype), self.grad_output.to(dtype)
        left, right = (input, grad_output) if self.transposed else (grad_output, input)
        product: Tensor = (left.t() @ right).reshape(-1)[self.position.long()]
        return product + self.out.to(dtype)

    def with_zero_tokens(self, count: int) -> SampledCase:
        """The same, with tokens at the end whose gradient is 0."""
        more = torch.randn(count, self.input.size(1)).to(self.input.dtype)
        input = torch.cat([self.input, more])
        zeros = self.grad_output.new_zeros(count, self.grad_output.size(1))
        grad_output = torch.cat([self.grad_output, zeros])
        return SampledCase(input, grad_output, self.position, self.transposed, self.out)


def make_sampled(
    tokens: int,
    inputs: int,
    outputs: int,
    active: int,
    *,
    dtype: torch.dtype = torch.float32,
    grad_dtype: torch.dtype | None = None,
    layout: Callable[[Tensor], Tensor] = contiguous,
    transposed: bool = False,
    crowded: bool = False,
    seed: int = 0,
) -> SampledCase:
    """A random call; `crowded` puts the entries into a few rows and columns of the weight."""
    generator = torch.Generator().manual_seed(seed)
    input = torch.randn(tokens, inputs, generator=generator).to(dtype)
    grad_output = torch.randn(tokens, outputs, generator=generator).to(grad_dtype or dtype)
    rows, columns = (inputs, outputs) if transposed else (outputs, inputs)
    allowed = torch.arange(rows * columns)
    if crowded:
        row, column = allowed // columns, allowed % columns
        allowed = allowed[(row % 7 == 2) | (column == columns - 1)]
    chosen = torch.randperm(allowed.numel(), generator=generator)[:active]
    position = allowed[chosen].sort().values.int()
    if tokens:
        input, grad_output = layout(input), layout(grad_output)
    out = torch.randn(position.numel(), generator=generator)
    return SampledCase(input, grad_output, position, transposed, out)


def all_cases(large: bool = True) -> Iterator[tuple[str, SampledCase]]:
    """Cases that together cover sizes, dtypes, layouts and both orders of the weight."""
    for number, size in enumerate((*SIZES, *(LARGE_SIZES if large else ()))):
        for dtype in DTYPES:
            for transposed in (False, True):
                layout = LAYOUTS[(number + transposed + DTYPES.index(dtype)) % len(LAYOUTS)]
                case = make_sampled(
                    *size, dtype=dtype, layout=layout, transposed=transposed, seed=number,
                    crowded=number % 3 == 1,
                )  # fmt: skip
                yield f"{size} {dtype} {layout.__name__} transposed={transposed}", case
    for layout in LAYOUTS:
        case = make_sampled(50, 37, 23, 90, layout=layout)
        yield layout.__name__, case
    mixed = make_sampled(70, 20, 30, 99, dtype=torch.bfloat16, grad_dtype=torch.float32)
    yield "mixed dtypes", mixed


def assert_close(got: Tensor, name: str, case: SampledCase) -> None:
    """By the tolerance rule."""
    assert_as_exact(got, case.dense(torch.float32), case.dense(torch.float64), name, scale=8.0)


def assert_sampled(
    ops: ModuleType, name: str, case: SampledCase, device: torch.device | str = "cpu"
) -> None:
    """The result is right, the same in a second call; tokens of zero gradient change no bit."""
    got = case.run(ops, device)
    assert_close(got, name, case)
    assert_same_bits(case.run(ops, device), got, name)
    for count in (1, 40, 300):
        longer = case.with_zero_tokens(count).run(ops, device)
        assert_same_bits(longer, got, f"{name} + {count} tokens")

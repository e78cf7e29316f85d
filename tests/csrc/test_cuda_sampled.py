"""sampled_grad by the CUDA kernels, run on the CPU by the emulator, against the dense product.

What the emulator can show, and what not: test_cuda_emulator.py.

Faults planted by hand, one at a time, and what caught them (sizes: sizes_dtypes_layouts):

    last chunk of tokens dropped                      sizes, 80 tests in all
    last tokens of a chunk dropped                    sizes, 56 in all
    stride of rows taken for the width                sizes (a crash)
    stride of columns left out, or not tested for 1   sizes, layout_changes_no_bit
    sums written, not added to `out`                  sizes, chunks_in_rounds
    only the last four tokens of a chunk summed       sizes, 76 in all
    only the last 16 chunks added                     sizes, larger_sizes
    sums of all chunks at the first one's place       sizes, 77 in all
    a barrier left out (four, one at a time)          sizes, 47 to 80 in all
    pieces not marked as needed                       sizes, 50 in all
    wrong column of a piece                           sizes, 70 in all
    last entry of a block missed                      sizes, 78 in all
    batch of entries passed over too early            sizes, 51 in all
    offsets in a row of outer always of 32 bits       columns_that_lie_far_apart
    positions beyond the weight not passed over       positions_outside_of_the_weight (a crash)
    no sum put for these                              positions_outside_of_the_weight

Not seen, as nothing wrong is added here: reads of shared memory and of the matrices beyond their
ends.
"""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import Any

import emulated_cuda
import pytest
import torch
from op_cases import DTYPES, assert_same_bits
from sampled_cases import all_cases, assert_close, assert_sampled, column_major, make_sampled

CASES = dict(all_cases(large=False))
LARGE = {name: case for name, case in all_cases() if name not in CASES}


def with_room_for(sums: int) -> Any:
    """The operations with scratch memory for so many sums of chunks."""
    limited = partial(emulated_cuda.sampled_grad, scratch_bytes=4 * sums)
    return SimpleNamespace(sampled_grad=limited)


@pytest.fixture(autouse=True)
def _device(cuda_emulator):
    emulated_cuda.configure(multiprocessors=1, seed=0)


@pytest.mark.parametrize("name", CASES)
def test_sizes_dtypes_layouts(name):
    assert_sampled(emulated_cuda, name, CASES[name])


@pytest.mark.parametrize("name", LARGE)
def test_larger_sizes(name):
    assert_close(LARGE[name].run(emulated_cuda), name, LARGE[name])


def test_a_hundred_thousand_tokens():
    case = make_sampled(100_000, 20, 30, 40, dtype=torch.bfloat16)
    assert_close(case.run(emulated_cuda), "1e5 tokens", case)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_several_blocks_of_entries_and_tiles_of_columns(dtype, transposed):
    """Three blocks of at most 4096 entries; 9000 columns are five tiles of float32."""
    widths = (3, 9000) if transposed else (9000, 3)
    case = make_sampled(70, *widths, 9500, dtype=dtype, transposed=transposed)
    assert_close(case.run(emulated_cuda), "wide", case)
    assert_close(case.run(with_room_for(0)), "wide, without scratch memory", case)


@pytest.mark.parametrize("slots", [0, 1, 3, 100])
def test_chunks_in_rounds(slots):
    """As many chunks of 64 tokens at once as scratch memory has room for, 11 in all."""
    case = make_sampled(700, 40, 24, 200, dtype=torch.bfloat16)
    assert_sampled(with_room_for(slots * 200), f"{slots} slots", case)


def test_order_of_threads_and_blocks_changes_no_bit():
    case = make_sampled(300, 90, 60, 5000)
    want = case.run(emulated_cuda)
    for seed in range(1, 4):
        emulated_cuda.configure(multiprocessors=seed, seed=seed)
        assert_same_bits(case.run(emulated_cuda), want)


def test_layout_changes_no_bit():
    case = make_sampled(70, 50, 40, 300)
    strided = make_sampled(70, 50, 40, 300, layout=column_major)
    assert_same_bits(strided.run(emulated_cuda), case.run(emulated_cuda))


def test_nan_stays_where_it_is():
    case = make_sampled(41, 20, 10, 100)
    case.grad_output[40, 3] = torch.nan
    case.input[7, 19] = torch.inf
    case.grad_output[7, :] = 1.0
    got, row, column = case.run(emulated_cuda), case.position // 20, case.position % 20
    assert torch.equal(got.isnan(), row == 3)
    assert torch.equal(got.isinf(), (row != 3) & (column == 19))


@pytest.mark.parametrize("slots", [0, 10])
def test_positions_outside_of_the_weight_keep_their_value(slots):
    case = make_sampled(100, 20, 10, 6)
    case.position = torch.tensor([-(2**31), -1, 5, 199, 200, 2**31 - 1], dtype=torch.int32)
    case.out[[0, 4]] = 0.0
    got = case.run(with_room_for(slots * 6))
    inside = torch.tensor([False, False, True, True, False, False])
    assert_same_bits(got[~inside], case.out[~inside])
    case.position, case.out = case.position[inside], case.out[inside]
    assert_close(got[inside], "inside", case)


@pytest.mark.parametrize("widths", [(0, 5), (5, 0)])
def test_weights_without_entries(widths):
    case = make_sampled(30, *widths, 0)
    case.position, case.out = torch.tensor([0, 3], dtype=torch.int32), torch.ones(2)
    assert case.run(emulated_cuda).tolist() == [1, 1]


def test_columns_that_lie_far_apart(tmp_path):
    """Offsets in a row of grad_output beyond 32 bits, in a file that is mostly a hole."""
    case = make_sampled(70, 40, 3, 100, dtype=torch.bfloat16)
    far = torch.from_file(
        str(tmp_path / "far"), shared=True, size=2**32 + 70, dtype=torch.bfloat16
    ).as_strided((70, 3), (1, 2**31))
    far.copy_(case.grad_output)
    want = case.run(emulated_cuda)
    case.grad_output = far
    assert_same_bits(case.run(emulated_cuda), want)

"""Sampled gradients by the Triton kernels, interpreted; run by test_interpreter.py.

Faults planted by hand, once each, and what failed (sizes: sizes_dtypes_layouts):
    last block of tokens dropped                    sizes, 23 tests in all
    last round of tokens dropped                    tokens_in_rounds
    stride of rows taken for the width              sizes, 10 tests
    stride of columns left out                      sizes, layout_changes_no_bit
    sums written, not added to `out`                sizes, 24 in all
    only the last block of tokens summed            sizes, 22 in all
    no zeros after the last token                   sizes, 26 in all
    a column of outer for that of inner             sizes, 22 in all
    last column not transposed                      sizes, 25 in all
    rounds that depend on the number of tokens      sizes, tokens_in_rounds
    positions beyond the weight not passed over     positions_outside_of_the_weight (a crash)
"""

from __future__ import annotations

import importlib
import os

import pytest
import torch
from op_cases import assert_same_bits
from sampled_cases import all_cases, assert_close, assert_sampled, column_major, make_sampled

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("run by test_interpreter.py", allow_module_level=True)
importlib.import_module("triton_interpreter").install()
kernels = importlib.import_module("sparse_optim.triton_kernels")

# Every fifth and the last ten: all sizes, dtypes, layouts and both orders of the weight.
ALL = list(all_cases(large=False))
CASES = dict(ALL[:-10:5] + ALL[-10:])


@pytest.fixture(autouse=True)
def _programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several blocks of tokens and tiles even in small cases; programs of many entries are few."""
    sizes = {"TOKENS": 64, "ENTRIES": 256, "TURN_TOKENS": 64, "TURN_COLUMNS": 64}
    module = importlib.import_module("sparse_optim.triton_kernels.sampled_grad")
    for name, value in sizes.items():
        monkeypatch.setattr(module, name, value)


@pytest.mark.parametrize("name", CASES)
def test_sizes_dtypes_layouts(name: str) -> None:
    assert_sampled(kernels, name, CASES[name])


def test_many_tokens() -> None:
    case = make_sampled(10_000, 20, 30, 40, dtype=torch.bfloat16)
    assert_close(case.run(kernels), "10,000 tokens", case)


def test_tokens_in_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 128 tokens, by the size of the wider matrix; the last one is short."""
    module = importlib.import_module("sparse_optim.triton_kernels.sampled_grad")
    monkeypatch.setattr(module, "ROUND_BYTES", 130 * 2 * 50)
    case = make_sampled(300, 50, 40, 200, dtype=torch.bfloat16)
    assert module._tokens_at_once(case.input, case.grad_output) == 128
    assert_sampled(kernels, "rounds", case)


def test_layout_changes_no_bit() -> None:
    case = make_sampled(70, 50, 40, 300)
    strided = make_sampled(70, 50, 40, 300, layout=column_major)
    assert_same_bits(strided.run(kernels), case.run(kernels))


def test_nan_stays_where_it_is() -> None:
    case = make_sampled(40, 20, 10, 100)
    case.grad_output[7, 3] = torch.nan
    assert torch.equal(case.run(kernels).isnan(), case.position // 20 == 3)


def test_positions_outside_of_the_weight_keep_their_value() -> None:
    case = make_sampled(100, 20, 10, 6)
    case.position = torch.tensor([-(2**31), -1, 5, 199, 200, 2**31 - 1], dtype=torch.int32)
    got = case.run(kernels)
    inside = torch.tensor([False, False, True, True, False, False])
    assert_same_bits(got[~inside], case.out[~inside])
    case.position, case.out = case.position[inside], case.out[inside]
    assert_close(got[inside], "inside", case)


@pytest.mark.parametrize("widths", [(0, 5), (5, 0)])
def test_weights_without_entries(widths: tuple[int, int]) -> None:
    case = make_sampled(30, *widths, 0)
    case.position, case.out = torch.tensor([0, 3], dtype=torch.int32), torch.ones(2)
    assert case.run(kernels).tolist() == [1, 1]


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("input", torch.Tensor.double, "input must be float32, .* got torch.float64"),
        ("input", lambda value: value[:29], r"got \(29, 20\) and \(30, 10\)"),
        ("grad_output", lambda value: value[None], r"got \(30, 20\) and \(1, 30, 10\)"),
        ("position", torch.Tensor.long, "position must hold 5 elements of torch.int32"),
        ("out", lambda value: value[:4], "out must hold 5 elements of torch.float32"),
        ("out", lambda value: value.repeat(2)[::2], r"out must be contiguous, got strides \(2,\)"),
        ("out", lambda value: value.to("meta"), "must be on one device"),
    ],
)
def test_arguments_that_do_not_fit(name: str, change: object, message: str) -> None:
    case = make_sampled(30, 20, 10, 5)
    arguments = {key: getattr(case, key) for key in ("input", "grad_output", "position", "out")}
    arguments[name] = change(arguments[name])  # type: ignore[operator]
    with pytest.raises(ValueError, match=message):
        kernels.sampled_grad(transposed=False, **arguments)

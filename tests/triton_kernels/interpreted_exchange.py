"""exchange by the Triton kernel, interpreted; run by test_interpreter.py.

Faults planted by hand, once each, and what failed (sizes: sizes_dtypes_views):
    sign of a 16-bit value carried into the upper half    sizes
    narrow entries stored as wide ones                    sizes (a crash)
    entries beyond the last tensor's exchanged            sizes (room behind the entries, a crash)
    positions outside of the tensor not passed over       positions_outside_of_their_tensor
"""

from __future__ import annotations

import importlib
import os

import pytest
import torch
from exchange_cases import assert_exchanged, bits_of, exchange_cases, make_exchange

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("run by test_interpreter.py", allow_module_level=True)
importlib.import_module("triton_interpreter").install()
kernels = importlib.import_module("sparse_optim.triton_kernels")

CASES = dict(exchange_cases())


@pytest.mark.parametrize("name", CASES)
def test_sizes_dtypes_views(name: str) -> None:
    assert_exchanged(kernels, name, CASES[name])


def test_positions_outside_of_their_tensor_are_left_out() -> None:
    case = make_exchange([40, 40], 1.0, [torch.bfloat16])
    wrong = case.copy()
    places = {3: -(2**31), 39: 40, 40: -1, 79: 2**31 - 1}
    for entry, place in places.items():
        wrong.position[entry] = place
    value, params = wrong.value.clone(), [param.clone() for param in wrong.params]
    read = wrong.copy()
    read.run(kernels, "gather")
    wrong.run(kernels)
    assert torch.equal(read.value, wrong.value)
    want = case.expected()
    for entry in range(80):
        tensor, at = divmod(entry, 40)
        outside = entry in places
        assert wrong.value[entry] == (value if outside else want.value)[entry]
        found = bits_of(wrong.params[tensor])[at]
        assert found == bits_of((params if outside else want.params)[tensor])[at]


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("position", torch.Tensor.long, "position must hold 110 elements of torch.int32"),
        ("value", lambda value: value[1:], "value must hold 110 elements of torch.int32"),
        ("offsets", torch.Tensor.int, "offsets must hold 3 elements of torch.int64"),
        ("value", lambda value: value.repeat(2)[::2], r"value must be contiguous"),
    ],
)
def test_arguments_that_do_not_fit(name: str, change: object, message: str) -> None:
    case = make_exchange([50, 60], 1.0)
    setattr(case, name, change(getattr(case, name)))  # type: ignore[operator]
    with pytest.raises(ValueError, match=message):
        case.run(kernels)

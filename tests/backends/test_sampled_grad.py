"""sampled_grad: weight gradients at active entries, against the dense product in float64.

That these tests can fail: faults that were planted by hand in csrc/cpu/sampled_grad.cpp, and a test
that saw each.

    last block of tokens dropped                          test_sizes_dtypes_layouts
    result written, not added                             test_sizes_dtypes_layouts
    stride of rows taken for the width                    test_sizes_dtypes_layouts
    lanes beyond the last token not cleared               test_sizes_dtypes_layouts
    only the last 16 tokens of a block summed             test_sizes_dtypes_layouts
    column of the wrong half of 16                        test_sizes_dtypes_layouts
    a position twice                                      test_positions_that_are_not_in_the_weight
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from op_cases import DTYPES, assert_same_bits
from sampled_cases import all_cases, assert_sampled, column_major, make_sampled

from sparse_optim.backends import reference
from sparse_optim.backends.registry import Backend, load

CASES = dict(all_cases())


@pytest.fixture(params=["reference", "cpp"])
def ops(request: pytest.FixtureRequest) -> Backend:
    if request.param == "cpp":
        pytest.importorskip("sparse_optim.backends.cpp", reason="the C++ extension is not built")
    return load(request.param)


@pytest.fixture
def cpp() -> Backend:
    pytest.importorskip("sparse_optim.backends.cpp", reason="the C++ extension is not built")
    return load("cpp")


@pytest.fixture
def _thread_count_as_it_was() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("name", CASES)
def test_sizes_dtypes_layouts(ops, name):
    assert_sampled(ops, name, CASES[name])


def test_a_hundred_thousand_tokens(cpp):
    """More blocks than are summed in one round."""
    case = make_sampled(100_000, 20, 30, 40, dtype=torch.bfloat16)
    assert_sampled(cpp, "1e5 tokens", case)


@pytest.mark.usefixtures("_thread_count_as_it_was")
@pytest.mark.parametrize("dtype", DTYPES)
def test_threads_change_no_bit(ops, dtype):
    case = make_sampled(700, 90, 200, 1500, dtype=dtype)
    results = []
    for count in (1, 2, 3, 5):
        torch.set_num_threads(count)
        results.append(case.run(ops))
    for result in results[1:]:
        assert_same_bits(result, results[0])


def test_layout_changes_no_bit(ops):
    """Strides are read as they are, with the same order of summation."""
    case = make_sampled(70, 50, 40, 300)
    strided = make_sampled(70, 50, 40, 300, layout=column_major)
    assert_same_bits(strided.run(ops), case.run(ops))


def test_results_are_added(ops):
    case = make_sampled(30, 20, 10, 60)
    whole = case.run(ops)
    case.out = torch.zeros_like(case.out)
    torch.testing.assert_close(whole, case.run(ops) + make_sampled(30, 20, 10, 60).out)


@pytest.mark.parametrize(
    "position",
    [[0, 5, 200], [3, 2], [4, 4], [-1, 3], [-(2**31), 2**31 - 1]],
    ids=["beyond", "descending", "twice", "negative", "far"],
)
def test_positions_that_are_not_in_the_weight(ops, position):
    case = make_sampled(30, 20, 10, 5)
    case.position = torch.tensor(position, dtype=torch.int32)
    case.out = torch.zeros(len(position))
    with pytest.raises((RuntimeError, ValueError), match="position does not ascend within the 200"):
        case.run(ops)
    assert not case.out.any()


def test_arguments_that_do_not_fit(cpp):
    case = make_sampled(30, 20, 10, 5)
    wrong = [
        ("input", case.input.double(), "input must be float32"),
        ("input", case.input[:29], "30 tokens|29"),
        ("input", case.input[0], "input must be .T, in."),
        ("grad_output", case.grad_output[None], "3 dimensions"),
        ("position", case.position.long(), "position has the wrong dtype"),
        ("out", case.out[:4], "out must hold 5"),
        ("out", case.out.double(), "out has the wrong dtype"),
    ]
    for name, value, message in wrong:
        changed = make_sampled(30, 20, 10, 5)
        setattr(changed, name, value)
        with pytest.raises((RuntimeError, NotImplementedError), match=message):
            changed.run(cpp)


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
def test_opcheck(cpp):
    case = make_sampled(30, 20, 10, 50, dtype=torch.bfloat16)
    arguments = (case.input, case.grad_output, case.position, case.transposed, case.out)
    operator = torch.ops.sparse_optim.sampled_grad.default
    results = torch.library.opcheck(operator, arguments)
    assert set(results.values()) == {"SUCCESS"}
    written = {arg.name for arg in operator._schema.arguments if arg.alias_info}
    assert written == {"out"}


def test_nan_stays_where_it_is(ops):
    case = make_sampled(40, 20, 10, 100)
    case.grad_output[7, 3] = torch.nan
    row = case.position // 20
    assert torch.equal(case.run(ops).isnan(), row == 3)


def test_reference_sums_in_parts(monkeypatch):
    """Its parts of entries and tokens change no bit."""
    case = make_sampled(150, 20, 30, 400)
    whole = case.run(reference)
    monkeypatch.setattr(reference, "SAMPLED_ENTRIES", 7)
    assert_same_bits(case.run(reference), whole)

"""exchange and gather: entries of the parameters swapped with values or read, bit by bit.

That these tests can fail: faults that were planted by hand in csrc/cpu/exchange.cpp, and a test
that saw each.

    sign of a 16-bit value carried into the upper half    test_sizes_dtypes_views
    last entry of a task missed                           test_sizes_dtypes_views
    values of the first task for all                      test_sizes_dtypes_views
    positions not checked before the first write          test_nothing_is_written.. (a crash)
"""

from __future__ import annotations

import pytest
import torch
from exchange_cases import assert_exchanged, bits_of, exchange_cases, make_exchange

from sparse_optim.backends.registry import Backend, load

CASES = dict(exchange_cases())


@pytest.fixture(params=["reference", "cpp"])
def ops(request: pytest.FixtureRequest) -> Backend:
    if request.param == "cpp":
        pytest.importorskip("sparse_optim.backends.cpp", reason="the C++ extension is not built")
    return load(request.param)


@pytest.fixture
def cpp() -> Backend:
    pytest.importorskip("sparse_optim.backends.cpp", reason="the C++ extension is not built")
    return load("cpp")


@pytest.mark.parametrize("name", CASES)
def test_sizes_dtypes_views(ops, name):
    assert_exchanged(ops, name, CASES[name])


@pytest.mark.parametrize("name", ["gather", "exchange"])
@pytest.mark.parametrize("place", [-(2**31), -1, 4100, 2**31 - 1])
def test_nothing_is_written_where_one_is_wrong(ops, place, name):
    """Also where positions do not ascend, so that the ends do not show it."""
    case = make_exchange([4100, 4100], 1.0)
    for entry in (8000, 8199):
        wrong = case.copy()
        wrong.position[entry] = place
        before = wrong.copy()
        with pytest.raises((RuntimeError, ValueError), match="position"):
            wrong.run(ops, name)
        assert torch.equal(wrong.value, before.value)
        for a, b in zip(wrong.params, before.params, strict=True):
            assert torch.equal(bits_of(a), bits_of(b))


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
@pytest.mark.parametrize("operator", ["gather", "exchange"])
@pytest.mark.parametrize("name", ["no tensors", "many tensors 0.3"])
def test_opcheck(cpp, name, operator):
    case, op = CASES[name].copy(), getattr(torch.ops.sparse_optim, operator).default
    table = torch.zeros(len(case.params), 4, dtype=torch.int64)
    bound = cpp.bind([param[:0] for param in case.params], case.params, table)
    args = (bound, case.position, case.offsets, case.value)
    results = torch.library.opcheck(op, args)
    assert set(results.values()) == {"SUCCESS"}
    meta = [arg.to("meta") for arg in args]
    assert op(*meta) is None
    assert [arg.name for arg in op._schema.arguments if arg.alias_info] == ["value"]


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("position", lambda x: x.long(), "position has the wrong dtype"),
        ("value", lambda x: x.view(torch.float32), "value has the wrong dtype"),
        ("value", lambda x: x[1:], "value must hold"),
        ("offsets", lambda x: x[1:], "offsets must hold 3 elements, got 2"),
        ("offsets", lambda x: x + 10**6, "offsets give tensor 0 of 50 entries"),
    ],
)
def test_wrong_arguments_are_named(cpp, name, change, message):
    case = make_exchange([50, 60], 0.5)
    setattr(case, name, change(getattr(case, name)))
    with pytest.raises(RuntimeError, match=message):
        case.run(cpp)

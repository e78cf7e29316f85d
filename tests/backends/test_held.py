"""What one call reads of parameters and their gradients is what `bind` reads of each.

Faults planted by hand, one at a time, and what caught them:

    a gradient of another shape read         gradients_of_another_shape_or_dtype
    strides not looked at                    gradients_that_do_not_fit, changed_parameters
    dtype not in the layouts                 changed_parameters
    rows not compared with the layouts       changed_parameters
    missing gradients not counted            missing_and_freed_gradients and others
    subclasses read                          gradients_that_do_not_fit
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import pytest
import torch
from op_cases import DTYPES
from torch.nn import Parameter
from torch.testing._internal.two_tensor import TwoTensor
from training import give_grads, new_params

from sparse_optim import D3, MaskedAdamW, Static
from sparse_optim.backends.held import Held, versions

cpp = pytest.importorskip(
    "sparse_optim.backends.cpp", reason="the C++ extension has not been built"
)


class Dispatched(torch.Tensor):
    """With memory of its own, which is not all that there is to it."""

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return super().__torch_dispatch__(function, types, args, kwargs or {})


def some(dtype: torch.dtype = torch.float32) -> list[Parameter]:
    """Of no, one and three dimensions, one empty, one a part of other memory."""
    shapes = ((), (7,), (2, 3, 4), (0, 5))
    whole = [torch.randn(shape).to(dtype) for shape in shapes]
    params = [Parameter(value) for value in (*whole, torch.randn(40).to(dtype)[3:12].view(3, 3))]
    for param in params:
        param.grad = torch.randn(param.shape).to(dtype)
    return params


def bound(params: list[Parameter], grads: list[torch.Tensor]) -> torch.Tensor:
    table = torch.full((len(params), 4), -1)
    return cpp.bind(grads, params, table)


def check(params: list[Parameter], held: Held) -> None:
    read = held.read()
    assert read is not None
    rows, grads = read
    expected = [torch.empty(0) if p.grad is None else p.grad for p in params]
    assert all(
        got is want for got, want, p in zip(grads, expected, params, strict=True) if p.grad is want
    )
    assert torch.equal(rows, bound(params, grads))
    table = torch.full((len(params), 4), -1)
    assert torch.equal(cpp.bind_rows(rows, table), rows)
    rows.zero_()
    assert table.any()  # a copy


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("grad_dtype", DTYPES)
def test_rows_are_those_of_bind(dtype: torch.dtype, grad_dtype: torch.dtype) -> None:
    params = some(dtype)
    held = Held(params)
    check(params, held)
    for param in params:  # autograd gives no other dtype, but others may
        param.grad.data = param.grad.to(grad_dtype)
    check(params, held)


def test_missing_and_freed_gradients() -> None:
    params = some()
    held = Held(params)
    check(params, held)
    params[1].grad = None
    params[2].grad.data = torch.empty(0)
    check(params, held)
    rows, grads = held.read()
    assert rows[1:3, 0].tolist() == [0, 0]
    assert [grads[1].numel(), grads[2].numel()] == [0, 0]


@pytest.mark.parametrize(
    "grad",
    [
        torch.randn(3, 2).t(),
        torch.randn(1, 3).expand(2, 3),
        torch.randn(2, 6)[:, ::2],
        torch.randn(2, 3).to_sparse(),
        TwoTensor(torch.randn(2, 3), torch.randn(2, 3)),
        torch.Tensor._make_subclass(Dispatched, torch.randn(2, 3)),
    ],
    ids=["transposed", "expanded", "strided", "sparse", "two tensors", "subclass"],
)
def test_gradients_that_do_not_fit_are_looked_at_more_closely(grad: torch.Tensor) -> None:
    params = [Parameter(torch.randn(2, 3)), Parameter(torch.randn(4))]
    held = Held(params)
    params[0].grad = grad
    assert held.read() is None
    params[0].grad = torch.randn(2, 3)
    check(params, held)


def test_gradients_of_another_shape_or_dtype_are_looked_at_more_closely() -> None:
    params = [Parameter(torch.randn(2, 3))]
    held = Held(params)
    for other in (torch.randn(3, 2), torch.randn(6), torch.randn(2, 3).double()):
        params[0].grad = torch.randn(2, 3)
        params[0].grad.data = other
        assert held.read() is None


CHANGES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "shape": lambda value: value.view(3, 2),
    "dtype": lambda value: value.bfloat16(),
    "strides": lambda value: value.t().contiguous().t(),
    "size": lambda value: value[:1],
    "nothing left": lambda value: torch.empty(0),
}


@pytest.mark.parametrize("name", CHANGES)
def test_changed_parameters_are_looked_at_more_closely(name: str) -> None:
    params = [Parameter(torch.randn(2, 3)), Parameter(torch.randn(4))]
    held = Held(params)
    check(params, held)
    value = params[0].data
    params[0].grad = None
    params[0].data = CHANGES[name](value)
    assert held.read() is None
    params[0].data = value.clone()  # as before, in other memory
    check(params, held)


def test_parameters_whose_memory_was_swapped_are_read_anew() -> None:
    params = some()
    held = Held(params)
    check(params, held)
    other = Parameter(torch.randn(7))
    torch.utils.swap_tensors(params[1], other)
    check(params, held)


def test_classes_that_torch_dispatches_to_are_not_read() -> None:
    inside = TwoTensor(torch.randn(2, 3), torch.randn(2, 3))
    assert Held([Parameter(torch.randn(3)), Parameter(inside)]).read() is None


def test_references_are_returned() -> None:
    params = some()
    params[1].grad = None
    held = Held(params)
    objects = (params[0], params[0].grad, None, held._layouts, held._rows)
    held.read()
    before = [sys.getrefcount(item) for item in objects]
    for _ in range(1000):
        held.read()
        params[2].data, old = params[2].data.view(24), params[2].data
        assert held.read() is None
        params[2].data = old
    after = [sys.getrefcount(item) for item in objects]
    assert all(abs(now - then) < 100 for now, then in zip(after, before, strict=True))


def test_rows_of_others_are_refused() -> None:
    params = some()
    rows, _ = Held(params).read()
    table = torch.zeros(len(params), 4, dtype=torch.int64)
    with pytest.raises(RuntimeError, match=r"rows must hold 20 elements, got 16"):
        cpp.bind_rows(rows[:4], table)
    rows[2, 0] += 4
    with pytest.raises(RuntimeError, match="row 2 is not what bind wrote"):
        cpp.bind_rows(rows, table)
    assert not table.any()


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
def test_opcheck() -> None:
    params = some()
    rows, _ = Held(params).read()
    operator = torch.ops.sparse_optim.bind_rows.default
    results = torch.library.opcheck(operator, (rows, torch.zeros_like(rows)))
    assert set(results.values()) == {"SUCCESS"}
    assert [bool(arg.alias_info) for arg in operator._schema.arguments] == [False, True]


@pytest.mark.parametrize("dtype", DTYPES)
def test_parameters_stand_for_gradients(dtype: torch.dtype) -> None:
    params = some(dtype)
    params[3].requires_grad_(False)
    present = [True, False, True, True, False]
    rows, grads = Held(params).read(present)
    standing = [
        p.detach() if there else p.new_empty(0) for p, there in zip(params, present, strict=True)
    ]
    assert torch.equal(rows, bound(params, standing))
    assert [g.data_ptr() for g in grads] == [g.data_ptr() for g in standing]
    with pytest.raises(ValueError, match="present must be a list of a bool for each"):
        Held(params).read(present[:4])


def test_versions_are_those_that_autograd_counts() -> None:
    params = tuple(some())
    with torch.no_grad():
        for number, param in enumerate(params):
            for _ in range(number):
                param.add_(1.0)
    assert versions(params) == [0, 1, 2, 3, 4]
    assert versions(params, 2) == [-2, -1, 0, 1, 2]


def test_a_step_looks_at_each_tensor_once(monkeypatch: pytest.MonkeyPatch) -> None:
    params = new_params((40, 5), (30,))
    optimizer = MaskedAdamW(params, importance=D3(), selection=Static(60), backend="cpp")
    give_grads(params, "normal", torch.Generator())
    monkeypatch.setattr(cpp, "bind", lambda *a: pytest.fail("bound again"))
    optimizer.step()
    assert optimizer.metrics()["active"] == 60

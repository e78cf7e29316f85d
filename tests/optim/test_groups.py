"""What is refused, in which words, and that a refusal leaves the optimizer as it was."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from op_cases import assert_same_bits
from oracle_checks import assert_matches, rank_oracles
from torch import Tensor
from torch.nn import Parameter
from training import active_of, everything, give_grads, new_params, set_grads

from sparse_optim import D3, Increment, IncrementalMaskedAdamW, MaskedAdamW, Static


class Params4bit(Parameter):
    """Named as bitsandbytes names its quantized weights."""


class Int8Params(Parameter):
    """Named as bitsandbytes names its quantized weights."""


def four_bit(dtype: torch.dtype = torch.uint8) -> Parameter:
    return Params4bit(torch.zeros(8, 1, dtype=dtype), requires_grad=False)


def int8() -> Parameter:
    return Int8Params(torch.zeros(4, dtype=torch.int8), requires_grad=False)


def build(params: Any, **options: Any) -> MaskedAdamW:
    options = {"budget": 2, "total_steps": 2, **options}
    return IncrementalMaskedAdamW(params, **options, unmask_steps=1.0)


REFUSED_PARAMS = {
    "4 bit": (four_bit, TypeError, r"quantized \(Params4bit, torch.uint8\).*bfloat16.*adapters"),
    "4 bit stored as bfloat16": (lambda: four_bit(torch.bfloat16), TypeError, "is quantized"),
    "8 bit": (int8, TypeError, r"quantized \(Int8Params, torch.int8\)"),
    "bare codes": (lambda: torch.zeros(4, dtype=torch.uint8), TypeError, "is quantized"),
    "float64": (
        lambda: Parameter(torch.zeros(4).double()),
        TypeError,
        "is torch.float64; expected",
    ),
    "complex": (lambda: Parameter(torch.zeros(4) + 0j), TypeError, "is torch.complex64; expected"),
    "meta": (lambda: Parameter(torch.zeros(4, device="meta")), ValueError, "meta device"),
    "sparse": (lambda: Parameter(torch.eye(3).to_sparse()), TypeError, "layout torch.sparse_coo"),
    "transposed": (lambda: Parameter(torch.zeros(3, 4).t()), ValueError, r"strides \(1, 4\)"),
}


@pytest.mark.parametrize("case", REFUSED_PARAMS)
def test_parameters_are_refused_by_name(case):
    make, error, message = REFUSED_PARAMS[case]
    with pytest.raises(error, match=f"layer.weight .*{message}"):
        build([("first", Parameter(torch.zeros(3))), ("layer.weight", make())])


def test_a_quantized_base_may_stay_frozen_beside_its_adapters():
    base, adapter = four_bit(), Parameter(torch.zeros(6))
    with pytest.raises(TypeError, match="quantized"):
        build([{"params": [base], "unmask": "none"}, {"params": [adapter]}])
    optimizer = build([adapter])
    set_grads([adapter], 1.0)
    optimizer.step()
    assert optimizer.metrics()["active"] == 1


@pytest.mark.parametrize("mode", ["all", "rank"])
def test_parameters_with_gaps_are_refused(mode):
    """Fused kernels walk by address: a strided view would have its neighbours overwritten."""
    whole = torch.zeros(10)
    with pytest.raises(ValueError, match="strides"):
        build([{"params": [Parameter(whole[::2])], "unmask": mode}])


REFUSED_OPTIONS = [
    ({"lr": -1.0}, "lr must be at least 0, got -1.0"),
    ({"lr": math.nan}, "lr must be at least 0, got nan"),
    ({"lr": torch.tensor([1.0, 2.0])}, r"lr: a tensor must hold one element, got shape \(2,\)"),
    ({"betas": (0.9, 1.0)}, "betas must be two numbers"),
    ({"betas": (-0.1, 0.9)}, "betas must be two numbers"),
    ({"betas": (0.9,)}, "betas must be two numbers"),
    ({"eps": -1e-8}, "eps must be at least 0"),
    ({"weight_decay": -0.1}, "weight_decay must be at least 0"),
    ({"amsgrad": True}, "amsgrad=True is not supported"),
    ({"differentiable": True}, "differentiable=True is not supported"),
    ({"capturable": True}, "capturable=True is for CUDA graphs"),
    ({"max_grad_norm": 0.0}, "max_grad_norm must be above 0"),
    ({"max_grad_norm": math.nan}, "max_grad_norm must be above 0"),
    ({"bias_correction": "none"}, "bias_correction must be one of"),
    ({"importance": 1.0}, "importance must be D3"),
    ({"importance": D3}, "importance must be D3"),
    ({"budget": 0}, "budget must be 1 to 4"),
    ({"budget": 5}, "budget must be 1 to 4"),
    ({"total_steps": 0}, "total_steps must be at least 1"),
]


@pytest.mark.parametrize(("options", "message"), REFUSED_OPTIONS)
def test_options_are_refused_in_words(options, message):
    with pytest.raises(ValueError, match=message):
        build([Parameter(torch.zeros(4))], **options)


def test_a_selection_must_be_one():
    with pytest.raises(ValueError, match="selection must be Increment"):
        MaskedAdamW([Parameter(torch.zeros(4))], importance=D3(), selection=3)


def test_signature_begins_as_adamws():
    """Positional arguments mean what they mean to torch.optim.AdamW."""
    param = Parameter(torch.zeros(4))
    optimizer = IncrementalMaskedAdamW(
        [param],
        0.5,
        (0.1, 0.2),
        1e-3,
        0.25,
        False,
        budget=1,
        total_steps=1,
        foreach=True,
        fused=True,
        unmask_steps=1.0,
    )
    group = optimizer.param_groups[0]
    wanted = {"lr": 0.5, "betas": (0.1, 0.2), "eps": 1e-3, "weight_decay": 0.25, "amsgrad": False}
    assert {name: group[name] for name in wanted} == wanted


def test_an_empty_pool_is_refused():
    with pytest.raises(ValueError, match="the pool is empty"):
        build([Parameter(torch.zeros(0))])
    with pytest.raises(ValueError, match="empty parameter list"):
        build([])
    with pytest.raises(TypeError, match="pass a list, not a set"):
        build([{"params": {Parameter(torch.zeros(3))}}])


def test_tied_weights_count_once():
    """A weight listed under two names is one tensor of the pool, updated once a step."""
    tied, alone = new_params((50,), (50,))
    optimizer = build([("in", tied), ("out", tied), ("other", alone)], budget=1.0, total_steps=1)
    assert optimizer.metrics()["budget"] == 100
    assert [name for name in optimizer.active_entries()] == ["in", "other"]
    exact, same = rank_oracles(optimizer)
    grads = give_grads([tied, alone], "normal", torch.Generator().manual_seed(0))
    optimizer.step()
    exact.step(grads)
    same.step(grads)
    assert_matches(optimizer, exact, same)


def test_one_parameter_in_two_groups_is_torchs_error():
    param = Parameter(torch.zeros(4))
    with pytest.raises(ValueError, match="more than one parameter group"):
        build([{"params": [param]}, {"params": [param]}])


@pytest.mark.parametrize("second", ["all", "rank"])
def test_shared_memory_is_refused(second):
    whole = torch.zeros(100)
    params = [("left", Parameter(whole[:60])), ("right", Parameter(whole[59:]))]
    with pytest.raises(ValueError, match="left and right share memory"):
        build([{"params": params[:1]}, {"params": params[1:], "unmask": second}])
    neighbours = [Parameter(whole[:60]), Parameter(whole[60:])]
    assert build(neighbours).metrics()["active"] == 0


def grad_of(param: Tensor, kind: str) -> Tensor:
    return {
        "sparse": lambda: torch.eye(4).to_sparse(),
        "shape": lambda: torch.ones(16),
        "float64": lambda: torch.ones(4, 4).double(),
        "complex": lambda: torch.ones(4, 4) + 0j,
    }[kind]()


@pytest.mark.parametrize("mode", ["rank", "all"])
@pytest.mark.parametrize(
    ("kind", "error", "message"),
    [
        ("sparse", TypeError, "gradient of weight is sparse .*sparse=False"),
        ("shape", ValueError, r"gradient of weight \(4, 4\) on cpu has shape \(16,\)"),
        ("float64", TypeError, "gradient of weight is torch.float64; expected"),
        ("complex", TypeError, "gradient of weight is torch.complex64; expected"),
    ],
)
def test_gradients_are_refused_before_anything_moves(kind, error, message, mode):
    """torch lets few such gradients be assigned; hooks and wrappers make them."""
    fine, weight = new_params((30,), (4, 4))
    optimizer = build(
        [{"params": [("fine", fine)]}, {"params": [("weight", weight)], "unmask": mode}], budget=20
    )
    set_grads([fine, weight], 1.0)
    optimizer.step()
    before = everything(optimizer)
    given = grad_of(weight, kind)

    class Held(Parameter):
        grad = property(lambda self: given)

    weight.__class__ = Held
    with pytest.raises(error, match=message):
        optimizer.step()
    for got, expected in zip(everything(optimizer), before, strict=True):
        assert_same_bits(got, expected)


def test_gradients_of_another_precision_than_the_parameter(backend):
    """float32 gradients of a bfloat16 parameter, as torch.Tensor.grad_dtype allows."""
    param = Parameter(torch.randn(600, generator=torch.Generator().manual_seed(0)).bfloat16())
    param.grad_dtype = torch.float32
    optimizer = build([param], budget=100, total_steps=1, backend=backend)
    exact, same = rank_oracles(optimizer)
    param.grad = torch.randn(600, generator=torch.Generator().manual_seed(1))
    optimizer.step()
    for oracle in (exact, same):
        oracle.step([param.grad])
    assert_matches(optimizer, exact, same)


# add_param_group


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_groups_may_be_added_in_mid_run(dtype, backend):
    """New entries join behind the old ones; a bfloat16 group brings master values for all."""
    first = new_params((300,))
    added = new_params((40, 10), (5,), dtype=dtype, seed=1)
    optimizer = build(
        [("first", first[0])], budget=250, total_steps=5, lr=0.1, backend=backend,
        importance=D3(-1.0, 0.5),
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    for _ in range(2):
        give_grads(first, "normal", generator)
        optimizer.step()
    kept = active_of(optimizer)
    values = optimizer.engine.active.segment(0)["exp_avg"].clone()
    optimizer.add_param_group({"params": [("w", added[0]), ("b", added[1])], "lr": 0.01})
    assert active_of(optimizer) == kept
    assert_same_bits(optimizer.engine.active.segment(0)["exp_avg"], values)
    initial = [param.detach().clone() for param in added]
    for _ in range(3):
        give_grads(first + added, "normal", generator)
        optimizer.step()
    assert kept < active_of(optimizer)
    assert optimizer.metrics()["active"] == 250
    assert {name for name, _ in active_of(optimizer)} == {"first", "w", "b"}
    for name, param, before in zip(("w", "b"), added, initial, strict=True):
        position = optimizer.active_entries()[name]
        frozen = torch.ones(param.numel(), dtype=torch.bool)
        frozen[position] = False
        assert_same_bits(param.detach().view(-1)[frozen], before.view(-1)[frozen])
        assert (param.detach().view(-1)[position] != before.view(-1)[position]).any()
        index = optimizer.engine.pool.names.index(name)
        if dtype != torch.float32:
            master = optimizer.engine.active.segment(index)["master"]
            assert_same_bits(param.detach().view(-1)[position], master.to(dtype))
    again = build([("first", first[0])], budget=250, total_steps=5, importance=D3(-1.0, 0.5))
    again.add_param_group({"params": [("w", added[0]), ("b", added[1])]})
    again.load_state_dict(optimizer.state_dict())
    assert active_of(again) == active_of(optimizer)


def test_a_fresh_head_may_be_added_in_mid_run():
    body, head = new_params((300,), (20,))
    optimizer = build([body], budget=100, total_steps=4)
    set_grads([body, head], 1.0)
    optimizer.step()
    optimizer.add_param_group({"params": [head], "unmask": "all"})
    before = head.detach().clone()
    optimizer.step()
    assert (head.detach() != before).all()
    assert optimizer.metrics()["active"] == 50


REFUSED_GROUPS = {
    "no dict": (lambda p: [p], TypeError, "param_group must be a dict"),
    "no params": (lambda p: {"lr": 1.0}, ValueError, "has no 'params'"),
    "mode": (lambda p: {"params": [p], "unmask": "some"}, ValueError, "unmask must be one of"),
    "lr": (lambda p: {"params": [p], "lr": -1.0}, ValueError, "lr must be at least 0"),
    "dtype": (
        lambda p: {"params": [p, Parameter(torch.zeros(3).double())]},
        TypeError,
        "parameter 1 .*float64",
    ),
    "4 bit": (lambda p: {"params": [four_bit()]}, TypeError, "quantized"),
    "held": (lambda p: {"params": [p, HELD]}, ValueError, "more than one parameter group"),
    "aliases": (
        lambda p: {"params": [p, Parameter(HELD.data[3:])]},
        ValueError,
        "share memory",
    ),
    "meta": (
        lambda p: {"params": [Parameter(torch.zeros(3, device="meta"))]},
        ValueError,
        "meta device",
    ),
}
HELD = Parameter(torch.zeros(300))


@pytest.mark.parametrize("case", REFUSED_GROUPS)
def test_a_refused_group_leaves_the_optimizer_unchanged(case):
    make, error, message = REFUSED_GROUPS[case]
    optimizer = build([HELD], budget=100, total_steps=10)
    set_grads([HELD], 1.0)
    optimizer.step()
    before, groups = everything(optimizer), copy.deepcopy(optimizer.state_dict()["param_groups"])
    with pytest.raises(error, match=message):
        optimizer.add_param_group(make(Parameter(torch.zeros(5))))
    for got, expected in zip(everything(optimizer), before, strict=True):
        assert_same_bits(got, expected)
    assert optimizer.state_dict()["param_groups"] == groups
    assert len(optimizer.engine.pool.params) == 1
    optimizer.step()
    assert optimizer.metrics()["active"] == 20


def test_the_constructor_takes_static_and_increment_alike():
    """One step of Increment with T = 1 is Static."""
    pair = new_params((300,)), new_params((300,))
    selections = Static(0.1), Increment(0.1, 1)
    for params, selection in zip(pair, selections, strict=True):
        optimizer = MaskedAdamW(params, importance=D3(), selection=selection)
        for step in range(3):
            give_grads(params, "normal", torch.Generator().manual_seed(step))
            optimizer.step()
        assert optimizer.metrics()["active"] == 30
    assert_same_bits(pair[0][0].detach(), pair[1][0].detach())

"""torch's own database of optimizers (`OptimizerInfo`), with our class in it.

The inputs are torch's; the cases are those of its test suite that apply, written anew. Each runs
with every parameter trained densely and with every parameter ranked, beside torch.optim.AdamW.
docs/compatibility.md names what we refuse.
"""

from __future__ import annotations

import copy
import io
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from op_cases import assert_same_bits
from torch import Tensor, nn
from torch.nn import Parameter
from torch.optim import lr_scheduler
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from sparse_optim import D3, MaskedAdamW, Static

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # torch's own, of what its test modules import
    from torch.testing._internal.common_optimizers import (
        OptimizerInfo,
        optim_error_inputs_func_adamw,
        optim_inputs_func_adamw,
    )


def dense(params: Any, **options: Any) -> torch.optim.Optimizer:
    """All of it trained densely, as torch.optim.AdamW does."""
    groups = list(params)
    if not isinstance(groups[0], dict):
        groups = [{"params": groups}]
    groups = [{**group, "unmask": "all"} for group in groups]
    return MaskedAdamW(groups, importance=D3(), selection=Static(1), **options)


def ranked(params: Any, **options: Any) -> torch.optim.Optimizer:
    """All of it in the pool, and unmasked at once."""
    return MaskedAdamW(params, importance=D3(), selection=Static(1.0), **options)


def adamw(params: Any, **options: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, **options)


INFO = OptimizerInfo(
    MaskedAdamW,
    optim_inputs_func=optim_inputs_func_adamw,
    optim_error_inputs_func=optim_error_inputs_func_adamw,
    scheduler_inputs=(
        [lambda optimizer: lr_scheduler.StepLR(optimizer, gamma=0.9, step_size=10)],
        [
            lambda optimizer: lr_scheduler.StepLR(optimizer, gamma=0.9, step_size=10),
            lambda optimizer: lr_scheduler.ReduceLROnPlateau(optimizer),
        ],
        [lambda optimizer: lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=41)],
    ),
    supported_impls=("foreach", "fused"),
    has_capturable_arg=True,
    supports_complex=False,
    supports_multiple_devices=False,
)
INPUTS = {each.desc: each.kwargs for each in INFO.optim_inputs_func("cpu")}
TAKEN = {name: options for name, options in INPUTS.items() if "amsgrad" not in options}
KINDS = pytest.mark.parametrize("make", [dense, ranked, adamw])
GIVEN = pytest.mark.parametrize("options", TAKEN.values(), ids=TAKEN)
Make = Callable[..., torch.optim.Optimizer]


def problem(seed: int = 0) -> tuple[list[Parameter], Callable[[], Tensor]]:
    """A weight and a bias, and their squared error."""
    generator = torch.Generator().manual_seed(seed)
    weight, bias = (Parameter(torch.randn(shape, generator=generator)) for shape in ((10, 5), 10))
    data = torch.randn(5, generator=torch.Generator().manual_seed(1))

    def loss() -> Tensor:
        weight.grad = bias.grad = None
        value = (weight.mv(data) + bias).square().sum()
        value.backward()
        return value.detach()

    return [weight, bias], loss


def run(make: Make, steps: int, **options: Any) -> tuple[list[Parameter], torch.optim.Optimizer]:
    params, loss = problem()
    optimizer = make(params, **options)
    for _ in range(steps):
        optimizer.step(loss)
    return params, optimizer


@KINDS
@GIVEN
@pytest.mark.parametrize("schedulers", [[], *INFO.scheduler_inputs])
def test_it_goes_in_the_right_direction(make, options, schedulers):
    params, loss = problem()
    optimizer = make(params, **options)
    made = [scheduler(optimizer) for scheduler in schedulers]
    first = float(loss())
    for _ in range(40):
        value = optimizer.step(loss)
        for scheduler in made:
            is_plateau = isinstance(scheduler, lr_scheduler.ReduceLROnPlateau)
            scheduler.step(*[value] * is_plateau)
    last = float(loss())
    assert last > first if options.get("maximize") else last < first


@GIVEN
def test_the_steps_are_those_of_adamw(options):
    expected, _ = run(adamw, 20, **options)
    for make in (dense, ranked):
        for got, value in zip(run(make, 20, **options)[0], expected, strict=True):
            torch.testing.assert_close(got, value)


@KINDS
@pytest.mark.parametrize("lr", [0.01, 0.0])
def test_a_tensor_is_the_lr_that_it_holds(make, lr):
    if make is adamw:
        expected = run(make, 5, lr=lr, foreach=False)[0]
        got = run(make, 5, lr=torch.tensor(lr), foreach=False)[0]
    else:
        expected, got = (run(make, 5, lr=given)[0] for given in (lr, torch.tensor(lr)))
    for ours, value in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, value)


@KINDS
def test_a_step_without_gradients_does_nothing(make):
    params, _ = problem()
    before = [param.detach().clone() for param in params]
    make(params, weight_decay=0.5).step()
    for param, value in zip(params, before, strict=True):
        assert_same_bits(param.detach(), value)


@KINDS
def test_a_step_of_zero_gradients_without_decay_does_nothing(make):
    params, _ = problem()
    before = [param.detach().clone() for param in params]
    for param in params:
        param.grad = torch.zeros_like(param)
    make(params, weight_decay=0.0).step()
    for param, value in zip(params, before, strict=True):
        assert_same_bits(param.detach(), value)


@KINDS
@GIVEN
def test_it_can_be_printed(make, options):
    text = repr(make(problem()[0], **options))
    assert "Parameter Group 0" in text
    assert "lr: " in text


@KINDS
@GIVEN
def test_a_loaded_state_goes_on_alike_and_stays_as_it_was(make, options):
    params, optimizer = run(make, 5, **options)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    kept = copy.deepcopy(state)
    others, loss = problem()
    for param, value in zip(others, params, strict=True):
        param.data = value.detach().clone()
    other = make(others, **options)
    other.load_state_dict(copy.deepcopy(state))
    assert repr(other.state_dict()) == repr(state)
    weight, bias = params
    data = torch.randn(5, generator=torch.Generator().manual_seed(1))
    for _ in range(5):
        weight.grad = bias.grad = None
        (weight.mv(data) + bias).square().sum().backward()
        optimizer.step()
        other.step(loss)
    for param, value in zip(others, params, strict=True):
        assert_same_bits(param.detach(), value.detach())
    assert repr(kept) == repr(state)


@KINDS
@pytest.mark.parametrize("missing", ["maximize", "foreach", "fused", "capturable", "amsgrad"])
def test_states_of_older_versions_load(make, missing):
    params, optimizer = run(make, 2)
    state = copy.deepcopy(optimizer.state_dict())
    for group in state["param_groups"]:
        group.pop(missing, None)
    optimizer.load_state_dict(state)
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer.step()


@pytest.mark.parametrize("make", [dense, adamw])
def test_a_step_count_that_is_a_number_loads(make):
    params, optimizer = run(make, 2)
    state = copy.deepcopy(optimizer.state_dict())
    for each in state["state"].values():
        each["step"] = each["step"].item()
    optimizer.load_state_dict(state)
    assert all(torch.is_tensor(optimizer.state[param]["step"]) for param in params)


@KINDS
def test_each_parameter_has_a_state(make):
    params, optimizer = run(make, 1)
    assert all(optimizer.state[param] for param in params)
    assert all(torch.is_tensor(v) for each in optimizer.state.values() for v in each.values())


@KINDS
def test_a_deep_copy_has_all_public_attributes(make):
    _, optimizer = run(make, 1)

    def public(each: object) -> set[str]:
        return {name for name in vars(each) if not name.startswith("_")}

    assert public(copy.deepcopy(optimizer)) == public(optimizer)


@KINDS
def test_hooks_run_in_order(make):
    seen: list[str] = []

    def note(name: str) -> Callable[..., None]:
        return lambda *_: seen.append(name)

    params, loss = problem()
    optimizer = make(params)
    handles = [
        register_optimizer_step_pre_hook(note("global pre")),
        register_optimizer_step_post_hook(note("global post")),
        optimizer.register_step_pre_hook(note("pre")),
        optimizer.register_step_post_hook(note("post")),
        optimizer.register_state_dict_pre_hook(note("state pre")),
        optimizer.register_state_dict_post_hook(note("state post")),
        optimizer.register_load_state_dict_pre_hook(note("load pre")),
        optimizer.register_load_state_dict_post_hook(note("load post")),
    ]
    try:
        optimizer.step(loss)
        assert seen == ["global pre", "pre", "post", "global post"]
        seen.clear()
        optimizer.load_state_dict(optimizer.state_dict())
        assert seen == ["state pre", "state post", "load pre", "load post"]
    finally:
        for handle in handles:
            handle.remove()
    seen.clear()
    optimizer.step(loss)
    assert not seen


@KINDS
def test_names_are_kept_and_may_be_missing_in_a_state(make):
    params, _ = problem()
    optimizer = make([("weight", params[0]), ("bias", params[1])])
    state = copy.deepcopy(optimizer.state_dict())
    assert state["param_groups"][0]["param_names"] == ["weight", "bias"]
    del state["param_groups"][0]["param_names"]
    optimizer.load_state_dict(state)
    assert optimizer.param_groups[0]["param_names"] == ["weight", "bias"]


@KINDS
def test_groups_have_their_own_options(make):
    params, loss = problem()
    still = params[1].detach().clone()
    optimizer = make([{"params": params[:1]}, {"params": params[1:], "lr": 0.0}], lr=0.1)
    optimizer.step(loss)
    assert_same_bits(params[1].detach(), still)
    assert optimizer.param_groups[1]["lr"] == 0.0


@KINDS
def test_the_default_dtype_of_torch_does_not_matter(make):
    expected, _ = run(make, 5)
    initial = [param.detach().clone() for param in problem()[0]]
    params = [Parameter(value) for value in initial]
    data = torch.randn(5, generator=torch.Generator().manual_seed(1))
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        optimizer = make(params)
        for _ in range(5):
            optimizer.zero_grad()
            (params[0].mv(data) + params[1]).square().sum().backward()
            optimizer.step()
    finally:
        torch.set_default_dtype(before)
    for param, value in zip(params, expected, strict=True):
        assert_same_bits(param.detach(), value.detach())


@KINDS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dtypes_may_be_mixed(make, dtype):
    """Each tensor moves as it would alone."""

    def steps(params: list[Parameter]) -> list[Tensor]:
        optimizer = make(params, lr=0.01)
        for step in range(3):
            for index, param in enumerate(params):
                generator = torch.Generator().manual_seed(10 * step + index)
                param.grad = torch.randn(param.shape, generator=generator).to(param.dtype)
            optimizer.step()
        return [param.detach() for param in params]

    def fresh() -> list[Parameter]:
        return [Parameter(torch.ones(20)), Parameter(torch.ones(20, dtype=dtype))]

    together = steps(fresh())
    assert_same_bits(together[0], steps(fresh()[:1])[0])
    assert together[1].dtype == dtype


@pytest.mark.parametrize("make", [dense, ranked])
def test_a_found_infinity_skips_the_step(make):
    params, loss = problem()
    optimizer = make(params)
    before = [param.detach().clone() for param in params]
    loss()
    optimizer.found_inf, optimizer.grad_scale = torch.ones(()), torch.ones(())
    optimizer.step()
    for param, value in zip(params, before, strict=True):
        assert_same_bits(param.detach(), value)


ERRORS = list(INFO.optim_error_inputs_func("cpu", torch.float32))
# What torch refuses or warns of, and we take: a parameter given twice counts once, foreach is
# ignored (the step is always fused).
TAKEN_BY_US = {
    "a param group cannot have duplicate parameters",
    "lr as Tensor doesn't work with foreach & not capturable",
    r"betas\[0\] as a Tensor is not supported for capturable=False and foreach=True",
    "betas must be either both floats or both Tensors",
}


@pytest.mark.parametrize("make", [dense, ranked])
@pytest.mark.parametrize("case", ERRORS, ids=[each.optimizer_error_input.desc for each in ERRORS])
def test_errors_are_of_torchs_kind(make, case):
    given = case.optimizer_error_input
    params = given.params if given.params is not None else [Parameter(torch.randn(2, 3))]
    if given.desc in TAKEN_BY_US:
        optimizer = make(params, **given.kwargs)
        for param in optimizer.param_groups[0]["params"]:
            param.grad = torch.ones_like(param)
        optimizer.step()
        return
    with pytest.raises(case.error_type):
        MaskedAdamW(params, importance=D3(), selection=Static(1.0), **given.kwargs)


def sparse_gradient() -> Iterator[Parameter]:
    layer = nn.Embedding(10, 3, sparse=True)
    layer(torch.tensor([1, 2])).sum().backward()
    yield layer.weight


@pytest.mark.parametrize("make", [dense, ranked])
@pytest.mark.parametrize(
    ("params", "options", "message"),
    [
        (lambda: [Parameter(torch.zeros(3, dtype=torch.complex64))], {}, "is torch.complex64; exp"),
        (
            lambda: [Parameter(torch.zeros(3, dtype=torch.float64))],
            {},
            "is torch.float64; expected",
        ),
        (lambda: [Parameter(torch.zeros(3))], {"amsgrad": True}, "amsgrad=True is not supported"),
        (lambda: [Parameter(torch.zeros(3))], {"differentiable": True}, "differentiable=True is"),
        (lambda: [Parameter(torch.zeros(3))], {"capturable": True}, "capturable=True is for CUDA"),
        (lambda: list(sparse_gradient()), {}, "is sparse .*build the layer with sparse=False"),
    ],
    ids=["complex", "float64", "amsgrad", "differentiable", "capturable", "sparse gradient"],
)
def test_what_is_refused_is_named(make, params, options, message):
    with pytest.raises((TypeError, ValueError), match=message):
        make(params(), **options).step()

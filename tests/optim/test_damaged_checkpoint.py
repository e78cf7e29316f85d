"""Checkpoints that were damaged: one ValueError that says what is wrong, the optimizer unchanged.

Kernels index tables by what a checkpoint says: some of these ended the process.
"""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import Parameter
from training import give_grads

from sparse_optim import D3, IncrementalMaskedAdamW

State = dict[str, Any]
DTYPE = torch.bfloat16


def build() -> tuple[list[Parameter], IncrementalMaskedAdamW]:
    generator = torch.Generator().manual_seed(0)
    params = [Parameter(torch.randn(size, generator=generator).to(DTYPE)) for size in (700, 50, 20)]
    groups = [
        {"params": [("p", params[0]), ("q", params[1])]},
        {"params": [("head", params[2])], "unmask": "all"},
    ]
    return params, IncrementalMaskedAdamW(
        groups, budget=100, total_steps=10, importance=D3(1.0), unmask_steps=1.0
    )


def train(params: list[Parameter], optimizer: IncrementalMaskedAdamW, steps: range) -> None:
    for step in steps:
        give_grads(params, "normal", torch.Generator().manual_seed(step))
        optimizer.step()


@pytest.fixture(scope="module")
def checkpoint() -> State:
    params, optimizer = build()
    train(params, optimizer, range(4))
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def of_pool(name: str, value: Any) -> Callable[[State], None]:
    """Replace a tensor of the pool's, or change a number of it: (index, number)."""

    def apply(state: State) -> None:
        pool, key = state["state"][0], f"pool_{name}"
        if isinstance(value, tuple):
            pool[key][value[0]] = value[1]
        elif not callable(value):
            pool[key] = value
        elif (changed := value(pool[key])) is not None:
            pool[key] = changed

    return apply


def of_group(name: str, value: Any) -> Callable[[State], None]:
    return lambda state: state["param_groups"][0].__setitem__(name, value)


def of_head(name: str, value: Any) -> Callable[[State], None]:
    return lambda state: state["state"][2].__setitem__(name, value)


# fmt: off
DAMAGE: dict[str, tuple[Callable[[State], Any], str]] = {
    "unmask_step above": (of_pool("unmask_step", (0, 1000)), "unmasked outside of steps 1 to 4"),
    "unmask_step huge": (of_pool("unmask_step", lambda t: t.fill_(2**31 - 1)), "outside of steps"),
    "unmask_step zero": (of_pool("unmask_step", lambda t: t.fill_(0)), "outside of steps 1 to 4"),
    "unmask_step float": (of_pool("unmask_step", lambda t: t.float()), "unmask_step must be"),
    "position reversed": (of_pool("position", lambda t: t.flip(0)), "positions are not ascending"),
    "position beyond": (of_pool("position", (0, 700)), r"not ascending within 0\.\.699"),
    "position negative": (of_pool("position", (0, -(2**31))), "positions are not ascending"),
    "position a list": (of_pool("position", lambda t: [1, 2]), "position must be torch.int32"),
    "exp_avg NaN": (of_pool("exp_avg", (0, float("nan"))), "exp_avg of p is not finite"),
    "exp_avg_sq negative": (of_pool("exp_avg_sq", (0, -1.0)), "exp_avg_sq of p is negative or"),
    "exp_avg float64": (of_pool("exp_avg", torch.Tensor.double), "exp_avg must be torch.float32"),
    "exp_avg two-dimensional": (of_pool("exp_avg", lambda t: t[:, None]), "with 1 dimensions"),
    "exp_avg shorter": (of_pool("exp_avg", lambda t: t[:9]), "do not rise from 0 to at most 9"),
    "master float64": (of_pool("master", lambda t: t.double()), "master must be torch.float32"),
    "step negative": (of_pool("progress", (0, -1)), "it counts -1 applied"),
    "step huge": (of_pool("progress", (0, 2**63 - 1)), "it counts 9223372036854775807 applied"),
    "skipped negative": (of_pool("progress", (2, -5)), "and -5 skipped steps"),
    "progress float": (of_pool("progress", torch.Tensor.float), "progress must be torch.int64"),
    "progress longer": (of_pool("progress", torch.zeros(4).long()), "has 4 numbers, expected 3"),
    "targets int32": (of_pool("targets", torch.Tensor.int), "targets must be torch.int64"),
    "targets from 5": (of_pool("targets", (0, 5)), "targets do not rise from 0"),
    "targets fall": (of_pool("targets", (3, 0)), "targets do not rise from 0"),
    "budget above the pool": (of_pool("targets", (-1, 10**6)), "at most 750 entries"),
    "threshold NaN": (of_pool("threshold", lambda t: t.fill_(float("nan"))), "threshold is nan"),
    "threshold int": (of_pool("threshold", torch.tensor(3)), "threshold must be torch.float32"),
    "offsets fall": (of_pool("offsets", (1, 1000)), "offsets do not rise from 0"),
    "offsets negative": (of_pool("offsets", (0, -1)), "offsets do not rise from 0"),
    "one tensor": (of_pool("offsets", lambda t: t[:2]), "it is for 1 tensors, expected 2"),
    "fingerprints numbers": (of_pool("base", [1, 2]), "expected 2 fingerprints"),
    "fingerprints None": (of_pool("base", None), "expected 2 fingerprints"),
    "places": (of_pool("index", 1), "p was at place 1 of the pool, not 0"),
    "no place": (lambda state: state["state"].pop(1), "the state of q is missing"),
    "a state that is none": (lambda state: state["state"].__setitem__(1, None), "is a NoneType"),
    "place infinite": (of_pool("index", torch.tensor(float("inf"))), "the place of p is tensor"),
    "written empty": (of_pool("written", lambda t: t.view(-1)[:0]), "written has 0 numbers"),
    "written of two": (of_pool("written", torch.zeros(2)), "written has 2 numbers"),
    "no params": (lambda state: state["param_groups"][0].pop("params"), "a group has no 'params'"),
    "place None": (of_pool("index", None), "the place of p is None"),
    "place of two": (of_pool("index", torch.zeros(2)), "the place of p is tensor"),
    "step None": (of_head("step", None), "step of a dense parameter"),
    "step a text": (of_head("step", "x"), "step of a dense parameter"),
    "moment on meta": (of_head("exp_avg", torch.zeros(20, device="meta")), "has another shape or"),
    "moment sparse": (of_head("exp_avg", torch.zeros(20).to_sparse()), "has another shape or"),
    "pool on meta": (of_pool("exp_avg", lambda t: t.to("meta")), "exp_avg must be torch.float32"),
    "two pools": (
        lambda state: state["state"][1].update(state["state"][0]),
        "2 parameters hold the pool's state",
    ),
    "lr a text": (of_group("lr", "x"), "param_groups: "),
    "lr NaN": (of_group("lr", float("nan")), "lr must be at least 0, got nan"),
    "betas": (of_group("betas", (2.0, 3.0)), "betas must be two numbers"),
    "dense shape": (of_head("exp_avg", torch.zeros(3)), r"exp_avg of .* has another shape"),
    "dense step": (of_head("step", torch.tensor(-1.0)), "step of a dense parameter"),
    "dense moment": (lambda state: state["state"][2].pop("exp_avg_sq"), "exp_avg_sq .* is missing"),
    "dense state": (lambda state: state["state"].pop(2), "state of a dense parameter is missing"),
    "no groups": (lambda state: state.pop("param_groups"), "not a state_dict of an optimizer"),
    "nothing": (lambda state: state.clear(), "not a state_dict of an optimizer"),
}
# fmt: on


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_named_and_changes_nothing(checkpoint, name):
    damage, message = DAMAGE[name]
    state = copy.deepcopy(checkpoint)
    damage(state)
    _, optimizer = build()
    before = repr(optimizer.state_dict())
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(state)
    assert repr(optimizer.state_dict()) == before


def test_what_is_whole_loads(checkpoint):
    params, optimizer = build()
    optimizer.load_state_dict(checkpoint)
    train(params, optimizer, range(4, 12))
    assert optimizer.metrics()["active"] == 100


def test_options_that_an_older_version_did_not_have_take_the_optimizers(checkpoint):
    state = copy.deepcopy(checkpoint)
    for group in state["param_groups"]:
        del group["maximize"], group["amsgrad"]
    params, optimizer = build()
    optimizer.load_state_dict(state)
    train(params, optimizer, range(4, 6))
    assert optimizer.param_groups[0]["maximize"] is False


def test_a_dense_step_that_is_a_number_becomes_a_tensor(checkpoint):
    """As torch.optim's own loader has it."""
    state = copy.deepcopy(checkpoint)
    state["state"][2]["step"] = 4.0
    params, optimizer = build()
    optimizer.load_state_dict(state)
    train(params, optimizer, range(4, 6))
    assert float(optimizer.state[params[2]]["step"]) == 6


def test_parameters_in_another_order_are_refused_and_other_names_load(checkpoint):
    """State is matched by place: it went to the wrong layers."""
    state = copy.deepcopy(checkpoint)
    state["param_groups"][0]["param_names"] = ["q", "p"]
    params, optimizer = build()
    with pytest.raises(ValueError, match="'q' is where the optimizer has 'p'"):
        optimizer.load_state_dict(state)
    state["param_groups"][0]["param_names"] = ["module.p", "module.q"]
    optimizer.load_state_dict(state)
    train(params, optimizer, range(4, 6))
    assert optimizer.metrics()["step"] == 6

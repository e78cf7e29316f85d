"""state_dict, load_state_dict, extend, deepcopy and pickle: a run goes on as if never stopped.

Faults that were planted by hand, and what saw both (test_resume_is_bit_for_bit): moments cast to
the parameter's dtype on loading; master values taken from a model that is loaded only later.
"""

from __future__ import annotations

import copy
import io
import logging
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from op_cases import DTYPES, assert_same_bits
from torch.nn import Parameter
from training import active_of, everything, give_grads, new_params, set_grads, trained_params

from sparse_optim import D3, Increment, IncrementalMaskedAdamW, Linear, MaskedAdamW, Static

SHAPES = ((30, 20), (0,), (1,), (513,))


def through_file(value: Any, weights_only: bool = True) -> Any:
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=weights_only)


def build(params: list[Parameter], budget: int = 300, total_steps: int = 8, **options: Any):
    return IncrementalMaskedAdamW(
        [{"params": params[:-1], "weight_decay": 0.1}, {"params": params[-1:], "lr": 0.05},
         {"params": new_params((17,), dtype=params[0].dtype, seed=9), "unmask": "all"}],
        lr=0.02, budget=budget, total_steps=total_steps, importance=D3(-1.0, 0.5),
        unmask_steps=1.0, **options,
    )  # fmt: skip


def train(optimizer: MaskedAdamW, first: int, last: int) -> None:
    """Steps first..last-1; gradients depend on the number of the step alone."""
    params = [param for group in optimizer.param_groups for param in group["params"]]
    for step in range(first, last):
        generator = torch.Generator().manual_seed(step)
        give_grads(params, ["normal", "ties", "zeros"][step % 3], generator, missing=0.1)
        if step == 4:
            params[0].grad = torch.full_like(params[0], torch.inf)
        optimizer.step()


def assert_same_state(got: MaskedAdamW, expected: MaskedAdamW) -> None:
    total = int(expected.engine.active.progress[1])
    assert_same_bits(got.engine.active.progress, expected.engine.active.progress, "progress")
    assert_same_bits(got.engine.active.offsets, expected.engine.active.offsets, "offsets")
    for name in ("position", "exp_avg", "exp_avg_sq", "unmask_step", "master"):
        ours, theirs = (getattr(each.engine.active, name) for each in (got, expected))
        assert_same_bits(ours[:total], theirs[:total], name)
    assert_same_bits(got.engine.targets, expected.engine.targets, "targets")
    for a, b in zip(trained_params(got), trained_params(expected), strict=True):
        assert_same_bits(a.detach(), b.detach(), "params")
        if "step" in expected.state[b]:
            for name in ("step", "exp_avg", "exp_avg_sq"):
                assert_same_bits(got.state[a][name], expected.state[b][name], name)
    assert fingerprints_of(got) == fingerprints_of(expected)


def fingerprints_of(optimizer: MaskedAdamW) -> list[list[int]]:
    return optimizer.state_dict()["state"][0]["pool_base"].tolist()


def values_of(optimizer: MaskedAdamW) -> list[torch.Tensor]:
    held = [param for group in optimizer.param_groups for param in group["params"]]
    return [param.detach().clone() for param in held]


def write_values(optimizer: MaskedAdamW, values: list[torch.Tensor]) -> None:
    held = [param for group in optimizer.param_groups for param in group["params"]]
    with torch.no_grad():
        for param, value in zip(held, values, strict=True):
            param.copy_(value)


@pytest.mark.parametrize("model_first", [True, False], ids=["model first", "optimizer first"])
@pytest.mark.parametrize("stop", [0, 1, 4, 5, 9])
@pytest.mark.parametrize("dtype", DTYPES)
def test_resume_is_bit_for_bit(dtype, stop, model_first, backend):
    """Before, in the middle of and after the unmasking; whichever of the two is loaded first."""
    straight = build(new_params(*SHAPES, dtype=dtype), backend=backend)
    train(straight, 0, stop)
    saved = through_file({"optimizer": straight.state_dict(), "model": values_of(straight)})
    train(straight, stop, 11)
    resumed = build(new_params(*SHAPES, dtype=dtype, seed=5), backend=backend)
    if model_first:
        write_values(resumed, saved["model"])
    resumed.load_state_dict(saved["optimizer"])
    if not model_first:
        write_values(resumed, saved["model"])
    train(resumed, stop, 11)
    assert_same_state(resumed, straight)


@given(stops=st.lists(st.integers(0, 10), max_size=3), seed=st.integers(0, 20))
@settings(max_examples=12)
def test_resuming_again_and_again(stops, seed):
    straight = build(new_params(*SHAPES, dtype=torch.bfloat16, seed=seed))
    train(straight, 0, 11)
    resumed, done = build(new_params(*SHAPES, dtype=torch.bfloat16, seed=seed)), 0
    for stop in [*sorted(stops), 11]:
        train(resumed, done, stop)
        done, values, state = stop, values_of(resumed), through_file(resumed.state_dict())
        resumed = build(new_params(*SHAPES, dtype=torch.bfloat16, seed=seed))
        write_values(resumed, values)
        resumed.load_state_dict(state)
    assert_same_state(resumed, straight)


def test_a_loaded_state_without_the_model_takes_the_parameters_as_they_are():
    """Master values of other weights than the checkpoint's are not written over them."""
    straight = build(new_params(*SHAPES, dtype=torch.bfloat16))
    train(straight, 0, 3)
    other = build(new_params(*SHAPES, dtype=torch.bfloat16, seed=5))
    for group in other.param_groups:
        group["lr"] = 0.0
    before = values_of(other)
    other.load_state_dict(straight.state_dict())
    for group in other.param_groups:
        group["lr"] = group["weight_decay"] = 0.0
    train(other, 3, 4)
    ranked = [param.numel() for param in other.engine.pool.params]
    for got, expected in zip(values_of(other)[: len(ranked)], before, strict=False):
        assert_same_bits(got, expected)


def test_state_dict_has_torchs_form():
    optimizer = build(new_params(*SHAPES, dtype=torch.bfloat16))
    train(optimizer, 0, 3)
    state = optimizer.state_dict()
    assert set(state) == {"state", "param_groups"}
    assert [group["params"] for group in state["param_groups"]] == [[0, 1, 2], [3], [4]]
    assert set(state["state"]) == {0, 1, 2, 3, 4}
    for place in range(4):
        assert state["state"][place]["pool_index"] == place
    assert set(state["state"][4]) == {"step", "exp_avg", "exp_avg_sq"}
    first = state["state"][0]
    assert first["pool_position"].dtype == first["pool_unmask_step"].dtype == torch.int32
    assert first["pool_exp_avg"].dtype == first["pool_master"].dtype == torch.float32
    assert first["pool_position"].shape == first["pool_exp_avg_sq"].shape == (300,)
    assert int(first["pool_offsets"][-1]) == optimizer.metrics()["active"]
    assert set(optimizer.state) == set(trained_params(optimizer))


def test_state_dict_is_a_copy():
    optimizer = build(new_params(*SHAPES))
    train(optimizer, 0, 3)
    state = optimizer.state_dict()
    kept = copy.deepcopy(state)
    train(optimizer, 3, 6)
    for key in (0, 3):
        for name, value in kept["state"][key].items():
            assert_same_bits(state["state"][key][name], value, name)


def test_loading_does_not_share_memory_with_the_checkpoint():
    optimizer = build(new_params(*SHAPES))
    train(optimizer, 0, 3)
    state = optimizer.state_dict()
    kept = copy.deepcopy(state)
    optimizer.load_state_dict(state)
    train(optimizer, 3, 6)
    for name, value in kept["state"][0].items():
        assert_same_bits(state["state"][0][name], value, name)


def test_the_checkpoints_schedule_wins_and_extend_changes_it(caplog):
    straight = build(new_params(*SHAPES), budget=80, total_steps=8)
    train(straight, 0, 4)
    other = build(new_params(*SHAPES), budget=400, total_steps=100)
    write_values(other, values_of(straight))
    with caplog.at_level(logging.WARNING, "sparse_optim"):
        other.load_state_dict(through_file(straight.state_dict()))
    assert "replaces the constructor's" in caplog.text
    assert other.metrics()["budget"] == 80
    assert other.engine.targets.tolist() == straight.engine.targets.tolist()
    for optimizer in (straight, other):
        optimizer.extend(total_steps=20)
        assert optimizer.engine.targets.tolist() == [80 * t // 20 for t in range(21)]
        optimizer.extend(budget=200)
        assert optimizer.engine.targets.tolist() == [200 * t // 20 for t in range(21)]
        train(optimizer, 4, 9)
    assert_same_state(other, straight)


def test_extend_keeps_what_is_active():
    params = new_params((500,))
    optimizer = IncrementalMaskedAdamW(
        params, budget=100, total_steps=4, schedule=Linear(), unmask_steps=1.0
    )
    set_grads(params, 1.0)
    optimizer.step()
    before, positions = optimizer.engine.active.segment(0)["exp_avg"].clone(), active_of(optimizer)
    assert len(positions) == 43
    optimizer.extend(budget=400, total_steps=40)
    assert active_of(optimizer) == positions
    assert_same_bits(optimizer.engine.active.segment(0)["exp_avg"], before)
    for _ in range(39):
        optimizer.step()
    assert optimizer.metrics()["active"] == 400


@pytest.mark.parametrize(
    "change",
    [
        lambda optimizer: optimizer.extend(budget=200),
        lambda optimizer: optimizer.add_param_group({"params": new_params((30,))}),
    ],
    ids=["extend", "add_param_group"],
)
def test_a_change_without_memory_leaves_the_optimizer_as_it_was(monkeypatch, change):
    straight, broken = (build(new_params(*SHAPES), budget=80, total_steps=8) for _ in range(2))
    for optimizer in (straight, broken):
        train(optimizer, 0, 4)

    def no_memory(*args, **kwargs):
        raise torch.OutOfMemoryError("made up")

    with monkeypatch.context() as patch:
        patch.setattr("sparse_optim.engine.engine.WorkSpace.empty", no_memory)
        with pytest.raises(torch.OutOfMemoryError):
            change(broken)
    for optimizer in (straight, broken):
        train(optimizer, 4, 8)
    assert len(broken.param_groups) == len(straight.param_groups)
    assert_same_state(broken, straight)


def test_extend_refuses_what_cannot_be():
    params = new_params((500,))
    optimizer = IncrementalMaskedAdamW(params, budget=100, total_steps=1, unmask_steps=1.0)
    set_grads(params, 1.0)
    optimizer.step()
    before = optimizer.engine.targets.clone()
    for wrong, message in [
        ({"budget": 99}, "budget 99 is below the 100 entries already active"),
        ({"budget": 501}, "budget must be 1 to 500"),
        ({"budget": 0.0001}, "budget 1 is below the 100"),
        ({"total_steps": -1}, "total_steps must be at least 1"),
        ({"total_steps": 0}, "total_steps must be at least 1"),
    ]:
        with pytest.raises(ValueError, match=message):
            optimizer.extend(**wrong)
        assert_same_bits(optimizer.engine.targets, before)
        assert optimizer.selection == Increment(100, 1)
    static = MaskedAdamW(new_params((50,)), importance=D3(), selection=Static(5))
    with pytest.raises(ValueError, match="static selection has no total_steps"):
        static.extend(total_steps=3)
    static.extend(budget=7)
    set_grads(static.engine.pool.params, 1.0)
    static.step()
    assert static.metrics()["active"] == 7


def _adamw_checkpoint() -> dict[str, Any]:
    params = new_params((600,), (1,))
    adam = torch.optim.AdamW([{"params": params[:1]}, {"params": params[1:]}])
    set_grads(params, 1.0)
    adam.step()
    return adam.state_dict()


def _sparse_checkpoint(shape: tuple[int, ...] = (600,), **changes: Any) -> dict[str, Any]:
    params = new_params(shape, (1,), dtype=changes.pop("dtype", torch.float32))
    mode = changes.pop("unmask", "all")
    optimizer = IncrementalMaskedAdamW(
        [{"params": params[:1]}, {"params": params[1:], "unmask": mode}],
        budget=90,
        total_steps=3,
        unmask_steps=1.0,
    )
    for _ in range(2):
        give_grads(params, "normal", torch.Generator().manual_seed(0))
        optimizer.step()
    state = optimizer.state_dict()
    for path, value in changes.items():
        name, target = f"pool_{path}", state["state"][0]
        if value is None:
            del target[name]
        else:
            target[name] = value(target[name])
    return state


def _fewer_params() -> dict[str, Any]:
    params = new_params((600,))
    return IncrementalMaskedAdamW(params, budget=9, total_steps=3, unmask_steps=1.0).state_dict()


FOREIGN = {
    "dense AdamW": (_adamw_checkpoint, "not one of MaskedAdamW"),
    "other groups": (_fewer_params, "parameter groups do not match"),
    "other modes": (lambda: _sparse_checkpoint(unmask="rank"), "unmask="),
    "larger model": (lambda: _sparse_checkpoint((9000,)), "is this the same model"),
    "no moments": (lambda: _sparse_checkpoint(exp_avg=None), "lacks .'exp_avg'"),
    "cut": (lambda: _sparse_checkpoint(exp_avg=lambda v: v[:59]), "do not rise from 0 to at most"),
    "flipped": (lambda: _sparse_checkpoint(position=lambda v: v.flip(0)), "ascending"),
    "doubled": (lambda: _sparse_checkpoint(position=lambda v: v * 0), "ascending"),
    "negative": (lambda: _sparse_checkpoint(position=lambda v: v - 600), "ascending"),
    "count": (lambda: _sparse_checkpoint(progress=lambda v: v + 1), "active entries"),
    "no progress": (lambda: _sparse_checkpoint(progress=None), "the pool's state is missing"),
    "no fingerprints": (lambda: _sparse_checkpoint(base=None), "lacks .'base'"),
    "overspent": (lambda: _sparse_checkpoint(targets=lambda v: v // 2), "of a budget of"),
    "progress of another shape": (lambda: _sparse_checkpoint(progress=lambda v: v[:2]), "progress"),
    "falling targets": (lambda: _sparse_checkpoint(targets=lambda v: v.flip(0)), "targets do not"),
    "beyond the pool": (lambda: _sparse_checkpoint(targets=lambda v: v * 1000), "targets do not"),
    "positions of another dtype": (
        lambda: _sparse_checkpoint(position=lambda v: v.float() + 0.5), "position"),
    "fingerprints of more tensors": (
        lambda: _sparse_checkpoint(base=lambda v: torch.cat([v, v])), "expected 1 fingerprints"),
}  # fmt: skip


@pytest.mark.parametrize("case", FOREIGN)
def test_foreign_checkpoints_are_refused_and_change_nothing(case):
    make, message = FOREIGN[case]
    params = new_params((600,), (1,), seed=3)
    optimizer = IncrementalMaskedAdamW(
        [{"params": params[:1]}, {"params": params[1:], "unmask": "all"}],
        budget=90,
        total_steps=3,
        unmask_steps=1.0,
    )
    give_grads(params, "normal", torch.Generator().manual_seed(0))
    optimizer.step()
    before, groups = everything(optimizer), copy.deepcopy(optimizer.state_dict()["param_groups"])
    targets, names = optimizer.engine.targets.clone(), fingerprints_of(optimizer)
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(make())
    for got, expected in zip(everything(optimizer), before, strict=True):
        assert_same_bits(got, expected)
    assert optimizer.state_dict()["param_groups"] == groups
    assert_same_bits(optimizer.engine.targets, targets)
    assert fingerprints_of(optimizer) == names
    optimizer.step()
    assert optimizer.metrics()["active"] == 60


def test_a_float32_checkpoint_does_not_fit_a_bfloat16_model():
    params = new_params((600,), (1,), dtype=torch.bfloat16)
    optimizer = IncrementalMaskedAdamW(
        [{"params": params[:1]}, {"params": params[1:], "unmask": "all"}],
        budget=90,
        total_steps=3,
        unmask_steps=1.0,
    )
    with pytest.raises(ValueError, match="master"):
        optimizer.load_state_dict(_sparse_checkpoint())
    assert optimizer.metrics()["active"] == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_of_model_and_optimizer_go_on_alike(how, dtype):
    """Copied together, as one object graph: the copy's optimizer trains the copy's parameters."""
    pair = (new_params(*SHAPES, dtype=dtype), None)
    pair = (pair[0], build(pair[0]))
    scheduler = torch.optim.lr_scheduler.StepLR(pair[1], 2)
    train(pair[1], 0, 4)
    scheduler.step()
    twin = copy.deepcopy(pair) if how == "deepcopy" else through_file(pair, weights_only=False)
    for param, other in zip(twin[0], pair[0], strict=True):
        assert param is not other
    held = {id(param) for group in twin[1].param_groups for param in group["params"]}
    assert {id(param) for param in twin[0]} < held
    assert [id(p) for p in twin[1].engine.pool.params] == [id(p) for p in twin[0]]
    frozen = [param.detach().clone() for param in pair[0]]
    train(twin[1], 4, 9)
    for param, value in zip(pair[0], frozen, strict=True):
        assert_same_bits(param.detach(), value, "the original is left alone")
    train(pair[1], 4, 9)
    assert_same_state(twin[1], pair[1])


def test_writes_to_a_copy_are_noticed():
    """A copy's version counters start anew: as many writes as the original had must not hide."""
    params = new_params((600,), dtype=torch.bfloat16)
    optimizer = MaskedAdamW(params, lr=0.0, importance=D3(), selection=Static(600), weight_decay=0)
    set_grads(params, 1.0)
    for _ in range(3):
        optimizer.step()
    (param,), twin = copy.deepcopy((params, optimizer))
    while param._version < params[0]._version:
        with torch.no_grad():
            param.fill_(5.0)
    set_grads([param], 1.0)
    twin.step()
    assert (param == 5).all()

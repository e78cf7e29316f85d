"""Snapshots of the optimizer: none changes a bit of the run, and each one resumes it bit for bit.

torch.distributed.checkpoint (DCP) takes a step with an optimizer whose `state` is empty, finds
parameters by the keys of `state`, and loads in place, into tensors of the size that was saved.
"""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from op_cases import assert_same_bits
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)
from torch.distributed.checkpoint.stateful import Stateful

from sparse_optim import D3, Increment, MaskedAdamW, Repeat

Pair = tuple[nn.Module, MaskedAdamW]
FORMAT_1 = Path(__file__).parent / "data" / "state_format_1.pt"
FORMS = ["increment", "increment bf16", "repeat", "all dense", "fuse_backward"]


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """DCP's own warnings: of a process without a group, and of functions to come."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"torch\..*")
        yield


def build(form: str = "increment", seed: int = 0) -> Pair:
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 6), nn.Linear(6, 4))
    net[2].weight.requires_grad_(False)
    net.to(torch.bfloat16 if form.endswith("bf16") else torch.float32)
    named = list(net.named_parameters())
    body = "all" if form == "all dense" else "rank"
    optimizer = MaskedAdamW(
        [
            {"params": named[:3], "unmask": body},
            {"params": named[3:4], "lr": 0.05, "unmask": body},
            {"params": named[4:5], "unmask": "all"},
            {"params": named[5:], "unmask": "none"},
        ],
        lr=1e-2, importance=D3(), max_grad_norm=1.0, fuse_backward=form == "fuse_backward",
        selection=Repeat(20) if form == "repeat" else Increment(40, 8),
    )  # fmt: skip
    return net, optimizer


def train(pair: Pair, first: int, last: int) -> None:
    net, optimizer = pair
    for step in range(first, last):
        data = torch.randn(4, 8, generator=torch.Generator().manual_seed(step))
        net(data.to(net[0].weight.dtype)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def everything(pair: Pair) -> dict[str, Tensor]:
    net, optimizer = pair
    state = optimizer.state_dict()["state"]
    held = {f"{key} {name}": value for key, each in state.items() for name, value in each.items()}
    return {name: value.clone() for name, value in {**held, **net.state_dict()}.items()}


def assert_equal_runs(got: Pair, expected: Pair) -> None:
    ours, theirs = everything(got), everything(expected)
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert_same_bits(ours[name], value, name)


SNAPSHOTS: dict[str, Callable[[nn.Module, MaskedAdamW], Any]] = {
    "state_dict": lambda net, optimizer: optimizer.state_dict(),
    "get_optimizer_state_dict": get_optimizer_state_dict,
    "get_state_dict": get_state_dict,
    "flat": lambda net, optimizer: get_optimizer_state_dict(
        net, optimizer, options=StateDictOptions(flatten_optimizer_state_dict=True)
    ),
    "deepcopy": lambda net, optimizer: copy.deepcopy((net, optimizer)),
    "pickle": lambda net, optimizer: pickle.dumps((net, optimizer)),
    "torch.save": lambda net, optimizer: torch.save(optimizer.state_dict(), io.BytesIO()),
    "delta": lambda net, optimizer: optimizer.delta(net),
    "metrics": lambda net, optimizer: (optimizer.metrics(), optimizer.active_entries()),
    "repr": lambda net, optimizer: repr(optimizer),
}


@pytest.mark.parametrize("taken", [0, 3, 8])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", SNAPSHOTS)
def test_a_snapshot_changes_no_bit_of_the_run(kind, form, taken):
    watched, straight = build(form), build(form)
    for pair in (watched, straight):
        train(pair, 0, taken)
    SNAPSHOTS[kind](*watched)
    assert_equal_runs(watched, straight)
    for pair in (watched, straight):
        train(pair, taken, 10)
    assert_equal_runs(watched, straight)


class Job(Stateful):
    """As in DCP's tutorial."""

    def __init__(self, net: nn.Module, optimizer: MaskedAdamW) -> None:
        self.pair = net, optimizer

    def state_dict(self) -> dict[str, Any]:
        model, optimizer = get_state_dict(*self.pair)
        return {"model": model, "optimizer": optimizer}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        set_state_dict(
            *self.pair, model_state_dict=state["model"], optim_state_dict=state["optimizer"]
        )


def through_stateful(saved: Pair, loaded: Pair, folder: Path) -> None:
    dcp.save({"job": Job(*saved)}, checkpoint_id=folder, no_dist=True)
    dcp.load({"job": Job(*loaded)}, checkpoint_id=folder, no_dist=True)


def through_raw(saved: Pair, loaded: Pair, folder: Path) -> None:
    net, optimizer = saved
    state = {"model": net.state_dict(), "optimizer": optimizer.state_dict()}
    dcp.save(state, checkpoint_id=folder, no_dist=True)
    net, optimizer = loaded
    state = {"model": net.state_dict(), "optimizer": optimizer.state_dict()}
    dcp.load(state, checkpoint_id=folder, no_dist=True)
    net.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])


def through_get_and_set(**options: bool) -> Callable[[Pair, Pair, Path], None]:
    def through(saved: Pair, loaded: Pair, folder: Path) -> None:
        chosen = StateDictOptions(**options)
        # torch's loader shares the memory of dense moments with what it loads.
        state = copy.deepcopy(get_optimizer_state_dict(*saved, options=chosen))
        loaded[0].load_state_dict(saved[0].state_dict())
        set_optimizer_state_dict(*loaded, state, options=chosen)

    return through


ROUTES = {
    "Stateful": through_stateful,
    "raw": through_raw,
    "get and set": through_get_and_set(),
    "full_state_dict": through_get_and_set(full_state_dict=True),
    "cpu_offload": through_get_and_set(full_state_dict=True, cpu_offload=True),
    "flat": through_get_and_set(flatten_optimizer_state_dict=True),
}


@pytest.mark.parametrize("taken", [0, 4])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("route", ROUTES)
def test_distributed_checkpoints_resume_bit_for_bit(route, form, taken, tmp_path):
    straight = build(form)
    train(straight, 0, taken)
    resumed = build(form, seed=1)
    ROUTES[route](straight, resumed, tmp_path / "checkpoint")
    assert_equal_runs(resumed, straight)
    for pair in (straight, resumed):
        train(pair, taken, 10)
    assert_equal_runs(resumed, straight)


def test_async_save_loads(tmp_path):
    straight, resumed = build(), build(seed=1)
    train(straight, 0, 4)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    try:
        state = {"optimizer": straight[1].state_dict()}
        dcp.async_save(state, checkpoint_id=tmp_path / "checkpoint").result()
        loaded = {"optimizer": resumed[1].state_dict()}
        dcp.load(loaded, checkpoint_id=tmp_path / "checkpoint")
    finally:
        dist.destroy_process_group()
    resumed[1].load_state_dict(loaded["optimizer"])
    resumed[0].load_state_dict(straight[0].state_dict())
    assert_equal_runs(resumed, straight)


def test_another_order_of_the_parameters_is_refused():
    """get_optimizer_state_dict matches by name, the pool's positions are those of the order."""
    saved, loaded = build(), build()
    train(saved, 0, 4)
    named = list(loaded[0].named_parameters())
    optimizer = MaskedAdamW(
        [
            {"params": [named[1], named[0], named[2]]},
            {"params": named[3:4]},
            {"params": named[4:5], "unmask": "all"},
            {"params": named[5:], "unmask": "none"},
        ],
        importance=D3(), selection=Increment(40, 8),
    )  # fmt: skip
    state = get_optimizer_state_dict(*saved)
    before = optimizer.state_dict()
    with pytest.raises(ValueError, match="in another order"):
        set_optimizer_state_dict(loaded[0], optimizer, state)
    assert repr(optimizer.state_dict()) == repr(before)


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("when", ["saving", "loading"])
def test_other_frozen_parameters_than_at_saving_are_named(when, flat):
    """torch leaves out the state of frozen parameters, and with it the pool's."""
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    saved, loaded = build(), build(seed=1)
    train(saved, 0, 4)
    frozen = saved if when == "saving" else loaded
    frozen[0][0].weight.requires_grad_(False)
    if when == "saving":
        saved[1].state_dict()
    state = copy.deepcopy(get_optimizer_state_dict(*saved, options=options))
    if when == "saving" and not flat:  # nothing is left out
        set_optimizer_state_dict(*loaded, state, options=options)
        assert loaded[1].metrics()["step"] == 4
        return
    before = repr(loaded[1].state_dict())
    with pytest.raises((ValueError, KeyError), match=r"frozen|param_groups"):
        set_optimizer_state_dict(*loaded, state, options=options)
    assert repr(loaded[1].state_dict()) == before
    loaded[1].load_state_dict(saved[1].state_dict())


def test_hooks_see_the_whole_state():
    """A pre-hook may still change what is loaded; a post-hook finds it loaded."""
    saved, loaded = build(), build()
    train(saved, 0, 4)
    seen: list[int] = []

    def add_prefix_free_state(optimizer: MaskedAdamW, state: dict[str, Any]) -> dict[str, Any]:
        return {**state["wrapped"]}

    def count(optimizer: MaskedAdamW) -> None:
        seen.append(int(optimizer.metrics()["active"]))

    for _ in range(2):  # hooks stay registered
        handles = [
            loaded[1].register_load_state_dict_pre_hook(add_prefix_free_state),
            loaded[1].register_load_state_dict_post_hook(count),
        ]
        loaded[1].load_state_dict({"wrapped": saved[1].state_dict()})
        for handle in handles:
            handle.remove()
    assert seen == [20, 20]
    with pytest.raises(ValueError, match="not a state_dict"):
        loaded[1].load_state_dict({"wrapped": saved[1].state_dict()})


@pytest.mark.parametrize("how", [dict.clear, lambda state: state.pop(next(iter(state)))])
def test_a_cleared_state_is_named_before_anything_moves(how):
    """Clearing `state` resets Adam in torch.optim; here it would change nothing, silently."""
    pair, straight = build(), build()
    for each in (pair, straight):
        train(each, 0, 3)
    how(pair[1].state)
    before = [param.detach().clone() for param in pair[0].parameters()]
    with pytest.raises(RuntimeError, match=r"optimizer\.state was cleared or replaced"):
        train(pair, 3, 4)
    for param, value in zip(pair[0].parameters(), before, strict=True):
        assert_same_bits(param.detach(), value)


@pytest.mark.parametrize("kind", ["increment", "repeat"])
def test_files_of_format_1_resume_bit_for_bit(kind, backend):
    """Written by the version before format 2, with the reference backend."""
    file = torch.load(FORMAT_1, weights_only=True)[kind]
    params = [nn.Parameter(value.clone()) for value in file["params"]]
    optimizer = MaskedAdamW(
        [
            {"params": [("a", params[0]), ("b", params[1])]},
            {"params": [("head", params[2])], "unmask": "all"},
        ],
        lr=0.02, importance=D3(1.0), max_grad_norm=1.0, backend=backend,
        selection=Increment(20, 8) if kind == "increment" else Repeat(12),
    )  # fmt: skip
    optimizer.load_state_dict(file["optimizer"])
    again = copy.deepcopy(optimizer.state_dict())
    for step in range(5, 9):
        generator = torch.Generator().manual_seed(step)
        for param in params:
            param.grad = torch.randn(param.shape, generator=generator).to(param.dtype)
        optimizer.step()
    for param, value in zip(params, file["end"], strict=True):
        if backend == "reference":
            assert_same_bits(param.detach(), value)
        else:
            torch.testing.assert_close(param.detach(), value)
    optimizer.load_state_dict(again)
    assert optimizer.metrics()["step"] == 5
    if kind == "repeat":
        old = file["optimizer"]["state"]["unmask"]["touched"]
        assert optimizer.engine.touched.index().tolist() == old.tolist()

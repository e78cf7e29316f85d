"""Numbers of a step reach the device only when they change; captures that cannot be replayed.

No GPU is needed: copies are counted, and the question whether a graph is captured is answered here.
"""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from training import new_params, set_grads

from sparse_optim import D3, MaskedAdamW, Static
from sparse_optim.engine import scalars
from sparse_optim.optim.groups import check_rejected


def groups(**options):
    usual = {"lr": 0.1, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.5, "maximize": False}
    return [{**usual, **options}]


@pytest.fixture
def copies(monkeypatch):
    """Rows that each step sent to the device."""
    sent = []
    write = scalars.write_hyper
    monkeypatch.setattr(
        "sparse_optim.engine.engine.write_hyper",
        lambda hyper, groups, rows: (sent.append(rows), write(hyper, groups, rows)),
    )
    return sent


def test_rows_are_copied_once_and_again_after_each_change(copies):
    params = new_params((20,))
    optimizer = MaskedAdamW(params, lr=0.1, importance=D3(), selection=Static(20))
    set_grads(params, 1.0)
    for lr in (0.1, 0.1, 0.2, 0.2):
        optimizer.param_groups[0]["lr"] = lr
        optimizer.step()
        assert optimizer.engine.work.scalars.hyper[0, 0] == lr
    assert [rows is not None for rows in copies] == [True, False, True, False]


@pytest.mark.parametrize("renew", ["extend", "load_state_dict", "deepcopy"])
def test_new_buffers_get_the_rows_again(renew):
    params = new_params((20,))
    optimizer = MaskedAdamW(params, lr=0.3, importance=D3(), selection=Static(9))
    set_grads(params, 1.0)
    optimizer.step()
    if renew == "extend":
        optimizer.extend(budget=12)
    elif renew == "load_state_dict":
        optimizer.load_state_dict(optimizer.state_dict())
    else:
        optimizer = copy.deepcopy(optimizer)
        set_grads(optimizer.engine.pool.params, 1.0)
    optimizer.step()
    assert optimizer.engine.work.scalars.hyper[0].tolist() == [0.3, 0.9, 0.999, 1e-8, 0.01, 1.0]


def test_hyper_rows_hold_every_number():
    rows = scalars.hyper_rows(groups(maximize=True) + groups(lr=torch.tensor([0.25])))
    assert rows == [[0.1, 0.9, 0.99, 1e-8, 0.5, -1.0], [0.25, 0.9, 0.99, 1e-8, 0.5, 1.0]]


def test_the_host_does_not_read_an_lr_that_the_device_holds():
    """A meta tensor has no value: reading it would raise."""
    lr = torch.empty((), device="meta")
    assert scalars.hyper_rows(groups(lr=lr))[0][0] == 0.0


def test_scalars_are_copied_or_set():
    buffer = torch.zeros(())
    scalars.write_scalar(buffer, torch.tensor([3.0]), 1.0)
    assert buffer == 3
    scalars.write_scalar(buffer, None, 1.0)
    assert buffer == 1


@pytest.mark.parametrize(
    ("capturable", "ready", "changed", "message"),
    [
        (False, True, False, "capturable=True"),
        (True, False, True, "take a step before the capture"),
        (True, True, True, "make lr a tensor on the device"),
    ],
)
def test_captures_that_could_not_be_replayed(monkeypatch, capturable, ready, changed, message):
    cuda, known = torch.device("cuda", 0), scalars.hyper_rows(groups())
    now = groups(lr=0.2) if changed else groups()
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match=message):
        scalars.check_capture(cuda, capturable, ready, now, known)
    scalars.check_capture(cuda, True, True, groups(), known)
    scalars.check_capture(torch.device("cpu"), capturable, ready, now, known)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    scalars.check_capture(cuda, capturable, ready, now, known)


def test_a_capture_is_refused_before_anything_is_recorded(monkeypatch):
    """The capture would hold what `bind` launched; Triton's would lack memory, and say so."""
    optimizer = MaskedAdamW(new_params((4,)), importance=D3(), selection=Static(1))
    optimizer.engine.pool.params[0].grad = torch.ones(4)
    bound: list[object] = []
    monkeypatch.setattr("sparse_optim.engine.engine.bind_gradients", lambda *a: bound.append(a))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    pool = replace(optimizer.engine.pool, device=torch.device("cuda", 0))
    monkeypatch.setattr(optimizer.engine, "pool", pool)
    with pytest.raises(RuntimeError, match="construct the optimizer with capturable=True"):
        optimizer.step()
    assert not bound


def test_capturable_is_for_cuda_and_a_backend_that_does_not_wait():
    cuda = torch.device("cuda", 0)
    check_rejected(True, False, cuda, "cuda", False)
    check_rejected(True, False, cuda, "triton", False)
    with pytest.raises(ValueError, match="needs importance D3 and a selection that keeps"):
        check_rejected(True, False, cuda, "cuda", True)
    with pytest.raises(ValueError, match="needs backend='cuda' or 'triton'"):
        check_rejected(True, False, cuda, "reference", False)
    with pytest.raises(ValueError, match="the parameters are on cpu"):
        MaskedAdamW(new_params((4,)), importance=D3(), selection=Static(1), capturable=True)

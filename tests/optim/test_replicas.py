"""DistributedDataParallel with sampled gradients: replicas stay equal bit for bit.

The cases are in tests/support/replica_runs.py (whole runs, against one process) and
replica_changes.py (changes in mid-run, and errors).
"""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from repository import ROOT
from sampled_nets import loss_of, new_model, optimizer_of, train
from torch.nn.parallel import DistributedDataParallel

from sparse_optim import D3, MaskedAdamW, Static
from sparse_optim.optim.left_out import IGNORED, LeftOut

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_gloo_available(), reason="torch has no gloo"
)
SUPPORT = ROOT / "tests" / "support"


@pytest.mark.parametrize("world", [2, 3])
def test_replicas_are_equal_and_train_as_one_process_does(world: int, tmp_path: Path):
    processes = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", "replica_cases.py", tmp_path],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=SUPPORT,
            env={
                **os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT),
                "RANK": str(rank), "WORLD_SIZE": str(world),
            },
        )
        for rank in range(world)
    ]  # fmt: skip
    ended = [process.communicate(timeout=120) for process in processes]
    for process, (_, err) in zip(processes, ended, strict=True):
        assert process.returncode == 0, err
    assert all(out.endswith("equal\n") for out, _ in ended)


@pytest.fixture
def group(tmp_path):
    """A process group of this process alone."""
    address = f"file://{tmp_path}/group"
    torch.distributed.init_process_group("gloo", init_method=address, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_a_group_of_one_process(group):
    """With a wrapper, which waits for no gradient, and without one."""
    runs = []
    for wrapped in (True, False):
        model = new_model()
        optimizer = optimizer_of(model, True)
        train(DistributedDataParallel(model) if wrapped else model, optimizer, 9)
        runs.append(optimizer)
    for got, want in zip(*(run.engine.pool.params for run in runs), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("name", ["norm.bias", None])
def test_copies_of_the_model_leave_nothing_out(group, name):
    """Only what others have left out; the wrapper of the model itself goes on."""
    model = new_model()
    if name is not None:
        setattr(model, IGNORED, [name])
    given = set() if name is None else {name}
    optimizer = optimizer_of(model, True)
    wrapper = DistributedDataParallel(model)
    assert {"up.weight", "down.weight", "words.weight"} < wrapper.parameters_to_ignore
    loss_of(wrapper, 1).backward()
    data = pickle.dumps(model)
    assert b"sparse_optim" not in data
    for twin in (copy.deepcopy(model), pickle.loads(data)):
        assert getattr(twin, IGNORED) == given
        assert DistributedDataParallel(twin).parameters_to_ignore == given
        loss_of(twin, 1).backward()
    for twin in (copy.deepcopy(wrapper), pickle.loads(pickle.dumps(wrapper))):
        names = {name for name, _ in twin.module.named_parameters()}
        assert twin.parameters_to_ignore & names == given & names
    assert copy.deepcopy(optimizer)._left_out is None
    optimizer.step()


def test_a_wrapper_without_the_optimizer_leaves_nothing_out(group):
    model = new_model()
    optimizer = optimizer_of(model, True)
    optimizer.sampled_backward = False
    assert not DistributedDataParallel(model).parameters_to_ignore
    optimizer.sampled_backward = True
    assert DistributedDataParallel(model).parameters_to_ignore
    del optimizer
    assert not DistributedDataParallel(model).parameters_to_ignore


def test_the_model_is_no_wrapper(group):
    model = DistributedDataParallel(new_model())
    with pytest.raises(ValueError, match="build the optimizer with the model inside"):
        optimizer_of(model, True)


def test_mixed_precision_of_the_wrapper_is_refused(group):
    model = new_model()
    optimizer = optimizer_of(model, True)
    wrapper = DistributedDataParallel(model)
    wrapper.mixed_precision = SimpleNamespace(param_dtype=torch.float32)  # real ones need a GPU
    with pytest.raises(RuntimeError, match=r"use torch\.autocast"):
        loss_of(wrapper, 1)
    assert optimizer.sampled_backward


def test_ddp_keeps_a_parameter(group):
    """The smallest weight, where all would sample; a single one cannot."""
    model = torch.nn.Sequential(*(torch.nn.Linear(size, 4, bias=False) for size in (6, 4, 4)))
    optimizer = optimizer_of(model, True, budget=9)
    assert DistributedDataParallel(model).parameters_to_ignore == {"0.weight", "2.weight"}
    optimizer.extend(budget=12)
    with pytest.raises(ValueError, match="no trainable parameter beside the weight"):
        optimizer_of(torch.nn.Linear(4, 4, bias=False), True, budget=9)


def test_a_layer_that_is_the_model(group):
    """DDP knows its weight under two names."""
    model = torch.nn.Linear(8, 8)
    optimizer = optimizer_of(model, True, budget=9)
    wrapper = DistributedDataParallel(model)
    for _ in range(6):
        wrapper(torch.ones(2, 8)).sum().backward()
        optimizer.step()
    assert not optimizer.engine.loud


def test_one_optimizer_and_one_object_for_each_model(group):
    model = new_model()
    optimizer_of(model, True)
    optimizer = optimizer_of(model, True)
    assert isinstance(getattr(model, IGNORED), LeftOut)
    assert len(model._forward_pre_hooks) == 1
    model.extra = torch.nn.Linear(4, 4)
    with pytest.raises(ValueError, match="one optimizer with sampled_backward=True can be"):
        MaskedAdamW(
            model.extra.parameters(), importance=D3(), selection=Static(3), max_grad_norm=1.0,
            model=model, sampled_backward=True,
        )  # fmt: skip
    assert optimizer.sampled_backward

"""Sharded parameters: `fully_shard`, tensor parallelism, torch.distributed.checkpoint.

What four processes compute is in tests/support/sharded_ranks.py.
"""

from __future__ import annotations

import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import sharded_ranks
import torch
from repository import ROOT
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint import CheckpointException
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from sparse_optim.backends.noise import noise, noise_at
from sparse_optim.engine import kth_largest
from sparse_optim.engine.blocks import Block, block_of, make_up


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="torch has no gloo")
def test_shards_do_what_one_process_does(tmp_path: Path) -> None:
    script = ROOT / "tests/support/sharded_ranks.py"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, script, str(rank), str(tmp_path)],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT, env=environment,
        )
        for rank in range(4)
    ]  # fmt: skip
    try:
        for process in processes:
            out, err = process.communicate(timeout=300)
            assert process.returncode == 0, err
            assert out.split() == [part.__name__ for part in sharded_ranks.PARTS]
    finally:
        for process in processes:
            process.kill()


@pytest.mark.parametrize(
    ("whole", "shape", "begin"),
    [
        ((6, 4), (2, 4), (2, 0)),
        ((6, 4), (6, 2), (0, 1)),
        ((6, 4), (3, 2), (2, 2)),
        ((5,), (2,), (3,)),
        ((3, 4, 5), (1, 4, 5), (2, 0, 0)),
        ((3, 4, 5), (3, 2, 5), (0, 1, 0)),
        ((3, 4, 5), (2, 4, 2), (1, 0, 3)),
        ((3, 4, 5), (1, 2, 3), (2, 1, 1)),
        ((), (), ()),
    ],
)
def test_places_of_a_block(whole, shape, begin) -> None:
    block = block_of(whole, shape, begin, "it")
    places = torch.arange(torch.Size(whole).numel()).view(whole)
    cut = places[tuple(slice(b, b + n) for b, n in zip(begin, shape, strict=True))].reshape(-1)
    at = torch.arange(block.entries)
    assert torch.equal(at // block.run * block.pitch + at % block.run + block.offset, cut)


def test_a_block_of_three_cuts_is_refused() -> None:
    with pytest.raises(TypeError, match=r"it of shape \(4, 4, 4\) is sharded in dimensions"):
        block_of((4, 4, 4), (2, 2, 2), (0, 0, 0), "it")


def test_blocks_make_up_a_tensor() -> None:
    rows = [block_of((5, 4), (n, 4), (b, 0), "it") for n, b in ((2, 0), (2, 2), (1, 4), (0, 5))]
    grid = [block_of((5, 4), (n, 2), (b, c), "it") for n, b in ((3, 0), (2, 3)) for c in (0, 2)]
    assert make_up(rows, 20)
    assert make_up(grid, 20)
    assert not make_up(rows[1:], 20)
    assert not make_up(grid[1:], 20)
    # Entries in all are right, but some are held twice and others not at all.
    assert not make_up([Block(12, 20, 0, 12), Block(8, 20, 4, 8)], 20)


class One:
    """Shards of a single process."""

    size = 1

    def add(self, numbers: torch.Tensor) -> None:
        """Nothing to add."""

    def gather(self, mine: torch.Tensor) -> torch.Tensor:
        """Nothing to gather."""
        return mine[None]


@pytest.mark.parametrize("most_bytes", [0, 1 << 20])
@pytest.mark.parametrize("bits", [4, 20, 63])
def test_the_kth_largest_word(bits: int, most_bytes: int, monkeypatch) -> None:
    monkeypatch.setattr(kth_largest, "GATHERED_BYTES", most_bytes)
    generator = torch.Generator().manual_seed(bits)
    words = torch.randint(-(2**bits) + 1, 2**bits - 1, (500,), generator=generator)
    words = torch.cat([words, torch.tensor([1 - 2**63, 2**63 - 1])]).unique()
    alive = torch.rand(len(words), generator=generator) < 0.7
    there = words[alive].sort(descending=True).values
    find = partial(kth_largest.kth_largest, words, alive, most=len(words), shards=One())
    for k in (1, 2, 7, len(there) - 1, len(there), len(words)):
        count, word = find(k=torch.tensor(k))
        assert int(count) == min(k, len(there))
        assert int(word) == int(there[int(count) - 1])
    count, word = find(k=torch.tensor(0))
    assert (int(count), int(word)) == (0, 2**63 - 1)
    count, word = kth_largest.kth_largest(words, alive & False, torch.tensor(3), len(words), One())
    assert (int(count), int(word)) == (0, 2**63 - 1)


def test_noise_at_places_is_that_of_the_whole() -> None:
    every = noise(7, 3, 2, 50, torch.device("cpu"))
    position = torch.tensor([49, 0, 3, 4, 21])
    assert torch.equal(noise_at(7, 3, 2, position), every[position])


SAVES = """
import os, sys, torch, torch.distributed as dist
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint import filesystem
from torch.distributed.checkpoint.state_dict import get_state_dict
from torch.distributed.device_mesh import DeviceMesh
import sharded_ranks as runs

folder = sys.argv[1]
dist.init_process_group("gloo", init_method=f"file://{folder}/group", rank=0, world_size=1)
net = runs.Net()
runs.by_fsdp(DeviceMesh("cpu", [0]))(net)
optimizer = runs.optimizer_of(net)
for step in range(4):
    runs.make_up(net, step)
    optimizer.step()
    if step == 3:  # killed when a part of the files is written
        write = filesystem._write_item
        def once(*args, **kwargs):
            write(*args, **kwargs)
            os._exit(9)
        filesystem._write_item = once
    if step in (1, 3):
        model, state = get_state_dict(net, optimizer)
        dcp.save({"model": model, "optimizer": state}, checkpoint_id=f"{folder}/step{step}")
"""


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
def test_a_killed_save_leaves_the_last_good_one(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests/support'}"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", SAVES, str(tmp_path)],
        capture_output=True, text=True, cwd=ROOT, env=environment, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 9, done.stderr
    assert any((tmp_path / "step3").iterdir())
    nets, optimizers = zip(*(_trained(step) for step in (2, 0)), strict=True)
    model, state = get_state_dict(nets[1], optimizers[1])
    saved = {"model": model, "optimizer": state}
    with pytest.raises(CheckpointException):
        dcp.load(saved, checkpoint_id=tmp_path / "step3", no_dist=True)
    dcp.load(saved, checkpoint_id=tmp_path / "step1", no_dist=True)
    set_state_dict(nets[1], optimizers[1], model_state_dict=model, optim_state_dict=state)
    for net, optimizer in zip(nets, optimizers, strict=True):
        sharded_ranks.make_up(net, 3)
        optimizer.step()
    assert all(map(torch.equal, nets[0].parameters(), nets[1].parameters()))
    ours, theirs = (optimizer.active_entries() for optimizer in optimizers)
    assert all(torch.equal(position, theirs[name]) for name, position in ours.items())


def _trained(steps: int):
    net = sharded_ranks.Net()
    optimizer = sharded_ranks.optimizer_of(net)
    for step in range(steps):
        sharded_ranks.make_up(net, step)
        optimizer.step()
    return net, optimizer

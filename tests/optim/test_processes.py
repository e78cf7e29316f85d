"""Data-parallel processes: replicas stay equal bit for bit, and a delta never lacks an entry."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from repository import ROOT

REPLICAS = """
import sys, warnings
import torch, torch.distributed as dist
from contextlib import nullcontext
from torch import nn
from torch.distributed.algorithms.join import Join
from torch.nn.parallel import DistributedDataParallel
from sparse_optim import D3, Increment, MaskedAdamW, Repeat, apply_delta
from sparse_optim.delta import Delta

rank, folder = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{folder}/group", rank=rank, world_size=2)

def build():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))

def run(dtype=torch.float32, uneven=False, **options):
    net = build().to(dtype)
    wrapped = DistributedDataParallel(net)
    given = {"selection": Increment(60, 6), "max_grad_norm": 1.0, **options}
    optimizer = MaskedAdamW(net.named_parameters(), lr=0.05, importance=D3(1.0), **given)
    steps = 6 if rank or not uneven else 3
    with Join([wrapped]) if uneven else nullcontext():
        for step in range(steps):
            data = torch.randn(4, 8, generator=torch.Generator().manual_seed(2 * step + rank))
            wrapped(data.to(dtype)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    mine = torch.cat([param.detach().view(-1) for param in net.parameters()]).float()
    both = [torch.zeros_like(mine) for _ in range(2)]
    dist.all_gather(both, mine)
    assert torch.equal(both[0], both[1]), options
    base = build().to(dtype)
    if uneven:
        try:
            optimizer.delta(net)
            raise SystemExit("the delta was not refused")
        except RuntimeError as error:
            assert "DDP's Join" in str(error)
        delta = Delta.from_models(base, wrapped)
    else:
        delta = optimizer.delta(wrapped)
    apply_delta(base, delta)
    for got, expected in zip(base.parameters(), net.parameters()):
        assert torch.equal(got, expected), options

run()
run(dtype=torch.bfloat16)
run(max_grad_norm=None)
run(selection=Repeat(20))
run(bias_correction="global")
run(backend="reference")
run(uneven=True)
dist.barrier()
dist.destroy_process_group()
print("equal")
"""


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="torch has no gloo")
def test_replicas_are_equal_and_deltas_whole(tmp_path: Path):
    processes = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", REPLICAS, str(rank), str(tmp_path)],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        for rank in range(2)
    ]  # fmt: skip
    for process in processes:
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
        assert out.endswith("equal\n")


@pytest.mark.parametrize("mixed_precision", ["no", "bf16"])
def test_accelerate_prepares_it_and_saves_its_state(tmp_path, mixed_precision):
    accelerate = pytest.importorskip("accelerate", reason="needs the extra 'finetune'")
    from sparse_optim import IncrementalMaskedAdamW

    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)

    def build():
        torch.manual_seed(0)
        net = torch.nn.Linear(8, 4)
        optimizer = IncrementalMaskedAdamW(
            net.named_parameters(), lr=0.05, budget=20, total_steps=6, unmask_steps=1.0
        )
        accelerator = accelerate.Accelerator(cpu=True, mixed_precision=mixed_precision)
        return accelerator, *accelerator.prepare(net, optimizer)

    def train(accelerator, net, optimizer, first, last):
        for step in range(first, last):
            data = torch.randn(4, 8, generator=torch.Generator().manual_seed(step))
            accelerator.backward(net(data).square().mean())
            optimizer.step()
            optimizer.zero_grad()

    straight = build()
    train(*straight, 0, 6)
    saving, resumed = build(), build()
    train(*saving, 0, 3)
    saving[0].save_state(str(tmp_path / "state"))
    resumed[0].load_state(str(tmp_path / "state"))
    train(*resumed, 3, 6)
    for got, expected in zip(resumed[1].parameters(), straight[1].parameters(), strict=True):
        assert torch.equal(got, expected)
    assert resumed[2].optimizer.delta(resumed[1]).num_entries == 20

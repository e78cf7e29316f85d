"""A training process is killed with SIGKILL in the middle of a run and started again."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from op_cases import assert_same_bits

TRAIN = """
import os, sys, time
from pathlib import Path
import torch
from torch.nn import Linear, ReLU, Sequential
from sparse_optim import D3, IncrementalMaskedAdamW

folder, dtype, pause = Path(sys.argv[1]), getattr(torch, sys.argv[2]), float(sys.argv[3])
torch.manual_seed(0)
model = Sequential(Linear(24, 48), ReLU(), Linear(48, 24), ReLU(), Linear(24, 3)).to(dtype)
optimizer = IncrementalMaskedAdamW(
    [{"params": list(model[:4].named_parameters())},
     {"params": list(model[4].named_parameters("head")), "unmask": "all"}],
    lr=3e-3, budget=700, total_steps=30, unmask_steps=1.0, importance=D3(2.0, 0.5),
    max_grad_norm=1.0,
)
scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / 40)
first = 0
if (folder / "checkpoint.pt").exists():
    saved = torch.load(folder / "checkpoint.pt", weights_only=True)
    optimizer.load_state_dict(saved["optimizer"])
    model.load_state_dict(saved["model"])
    scheduler.load_state_dict(saved["scheduler"])
    first = saved["step"]
for step in range(first, 30):
    generator = torch.Generator().manual_seed(step)
    batch, wanted = torch.randn(2, 8, 24, generator=generator).to(dtype)
    loss = (model(batch) - wanted[:, :3]).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    scheduler.step()
    torch.save(
        {"optimizer": optimizer.state_dict(), "model": model.state_dict(),
         "scheduler": scheduler.state_dict(), "step": step + 1},
        folder / "new.pt",
    )
    os.replace(folder / "new.pt", folder / "checkpoint.pt")
    print(step + 1, flush=True)
    time.sleep(pause)
"""


def start(folder: Path, dtype: str, pause: float = 0.0) -> subprocess.Popen[str]:
    folder.mkdir(exist_ok=True)
    return subprocess.Popen(
        [sys.executable, "-c", TRAIN, str(folder), dtype, str(pause)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def finish(process: subprocess.Popen[str]) -> list[int]:
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    return [int(line) for line in out.split()]


def kill_after(process: subprocess.Popen[str], step: int) -> None:
    """SIGKILL once the process has reported `step`."""
    deadline = time.monotonic() + 120
    assert process.stdout is not None
    for line in process.stdout:
        if int(line) >= step or time.monotonic() > deadline:
            break
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL


@pytest.mark.parametrize(("dtype", "kills"), [("float32", (17,)), ("bfloat16", (4, 17))])
def test_a_killed_run_ends_as_an_unbroken_one(dtype, kills, tmp_path):
    """Killed amid the unmasking, once or twice, at whatever the process was doing."""
    unbroken = start(tmp_path / "unbroken", dtype)
    for step in kills:
        kill_after(start(tmp_path / "killed", dtype, pause=0.02), step)
    saved = torch.load(tmp_path / "killed" / "checkpoint.pt", weights_only=True)
    assert 17 <= saved["step"] < 30
    assert 0 < int(saved["optimizer"]["state"][0]["pool_progress"][1]) < 700
    assert finish(start(tmp_path / "killed", dtype))[0] == saved["step"] + 1
    assert finish(unbroken) == list(range(1, 31))
    a, b = (
        torch.load(tmp_path / name / "checkpoint.pt", weights_only=True)
        for name in ("unbroken", "killed")
    )
    assert int(a["optimizer"]["state"][0]["pool_progress"][1]) == 700
    for name, value in a["model"].items():
        assert_same_bits(b["model"][name], value, name)
    for key, state in a["optimizer"]["state"].items():
        for name, value in state.items():
            other = b["optimizer"]["state"][key][name]
            if isinstance(value, torch.Tensor):
                assert_same_bits(other, value, f"{key} {name}")
            else:
                assert other == value

"""DistributedDataParallel with sampled gradients: replicas stay equal bit for bit."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from repository import ROOT

SCRIPT = ROOT / "tests" / "support" / "sampled_replicas.py"


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="torch has no gloo")
@pytest.mark.parametrize("world", [2, 3])
def test_replicas_are_equal_and_train_as_one_process_does(world: int, tmp_path: Path):
    processes = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", str(SCRIPT), str(rank), str(world), str(tmp_path)],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        )
        for rank in range(world)
    ]  # fmt: skip
    ended = [process.communicate(timeout=120) for process in processes]
    for process, (out, err) in zip(processes, ended, strict=True):
        assert process.returncode == 0, err
        assert out.endswith("equal\n")

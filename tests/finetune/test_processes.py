"""Several processes, as torchrun starts them: all train, one writes and prints."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers", reason="the job needs the extra 'finetune'")

from finetune_jobs import make_folders
from processes import start_group

from sparse_optim.finetune import FinetuneConfig, FinetuneError
from sparse_optim.finetune.processes import count, is_first, is_first_here, largest
from sparse_optim.finetune.validate import check_machine

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_gloo_available(), reason="torch has no gloo"
)


def start_two(*arguments: str) -> list[subprocess.CompletedProcess[str]]:
    """Run the command in two processes that train together; their outcomes, by rank."""
    command = [sys.executable, "-W", "ignore", "-m", "sparse_optim", "finetune", *arguments]
    return start_group(command, COLUMNS="200")


def launch(launcher: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run the command in two processes by a launcher of this environment."""
    environment = {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "COLUMNS": "200"}
    return subprocess.run(
        [Path(sys.executable).parent / launcher, *arguments],
        env={**os.environ, **environment, "PYTHONWARNINGS": "ignore"},
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip


@pytest.mark.slow
def test_two_processes_train_and_one_writes_and_prints(tmp_path: Path):
    """By torchrun, and the same by accelerate, which starts several processes on CPUs with
    --multi_gpu alone; without, it needs MPI."""
    folders = make_folders(tmp_path / "tiny")
    job = (
        *("-m", "sparse_optim", "finetune", "-m", folders["encoder"], "-d", folders["sequence"]),
        *("--cpu", "--steps", "4", "--batch-size", "4", "--max-length", "16", "--budget", "500"),
        *("--eval-fraction", "0.25", "--save-every", "2", "--best", "--threads", "1", "-o"),
    )
    logs = ("--redirects", "3", "--log-dir", tmp_path / "logs")
    done = launch(
        "torchrun", "--standalone", "--nproc_per_node", "2", *logs, *job, tmp_path / "out"
    )
    (first,), (second,) = ((tmp_path / "logs").glob(f"*/attempt_0/{rank}") for rank in (0, 1))
    assert done.returncode == 0, (first / "stderr.log").read_text()
    shown = (first / "stdout.log").read_text()
    assert "4 steps of 8 examples on cpu (2 processes)" in shown
    assert "sampled gradients" in shown
    assert "yes, bit for bit" in shown
    assert (second / "stdout.log").read_text() == ""
    # torch's own warnings apart, which it logs on each process
    said = (second / "stderr.log").read_text().splitlines()
    assert not [line for line in said if not line.startswith("[rank1]:[W")]
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert metrics["used"]["processes"] == 2
    assert metrics["active_entries"] == 500 + metrics["model"]["fresh_entries"]
    files = {path.name for path in (tmp_path / "out" / "checkpoints" / "checkpoint-4").iterdir()}
    assert {"rng_state_0.pth", "rng_state_1.pth", "manifest.json", "best.safetensors"} <= files
    manifest = tmp_path / "out" / "checkpoints" / "checkpoint-4" / "manifest.json"
    assert "rng_state_1.pth" in json.loads(manifest.read_text())["files"]

    group = ("--multi_gpu", "--num_processes", "2", "--num_machines", "1")
    plain = ("--main_process_port", "0", "--mixed_precision", "no", "--dynamo_backend", "no")
    again = launch("accelerate", "launch", *group, *plain, *job, tmp_path / "again")
    assert again.returncode == 0, again.stderr
    assert again.stdout.count("4 steps of 8 examples on cpu (2 processes)") == 1
    ours, theirs = tmp_path / "out", tmp_path / "again"
    assert {path.name for path in ours.iterdir()} == {path.name for path in theirs.iterdir()}
    deltas = [(folder / "delta.safetensors").read_bytes() for folder in (ours, theirs)]
    assert deltas[0] == deltas[1]


def test_an_error_is_printed_once(tmp_path: Path):
    first, second = start_two("-m", "minilm", "-d", "trec6", "-o", str(tmp_path), "--lr", "0")
    assert (first.returncode, second.returncode) == (1, 1)
    assert "--lr must be above 0" in first.stderr
    assert second.stdout == second.stderr == ""


def test_numbers_of_processes(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("RANK", "2")
    assert (count(), is_first(), is_first_here()) == (1, True, True)  # a cluster's, not torchrun's
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert (count(), is_first(), is_first_here()) == (4, False, True)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert is_first_here() is False
    assert largest(7, torch.device("cpu")) == 7  # before the group exists


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"fuse_backward": True}, "--fuse-backward needs one process, and torchrun started 2"),
        ({"method": "fish"}, "--method fish chooses entries by the examples of one process"),
    ],
)
def test_what_needs_one_process_is_refused(monkeypatch, settings, message):
    config = FinetuneConfig("minilm", "trec6", Path("out"), **settings)
    check_machine(config)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "0")
    with pytest.raises(FinetuneError, match=message):
        check_machine(config)

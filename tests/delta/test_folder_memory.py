"""Model folders of many shards are merged with about one of them in memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from repository import ROOT
from safetensors.torch import save_file

from sparse_optim.delta import Delta, SparseValues, save_delta
from sparse_optim.delta._fingerprint import fingerprint

SHARDS, ENTRIES = 10, 1 << 22  # 16 MiB each: modules that load meanwhile take some MiB

PROGRAM = """
import os, sys, threading, time
from pathlib import Path
import torch
from sparse_optim.delta import (
    folder_tensors, load_delta, merge, merge_deltas, merge_folder, save_delta
)

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

def watch():
    while not done.wait(0.001):
        seen.append(resident())

torch.set_num_threads(1)
folder, step = Path(sys.argv[1]), sys.argv[2]
deltas = [load_delta(folder / f"{name}.safetensors") for name in "ab"]
done, seen, before = threading.Event(), [], resident()
thread = threading.Thread(target=watch, daemon=True)  # an error ends the program
thread.start()
if step == "deltas":
    save_delta(merge_deltas(deltas, folder / "base", method="ties"), folder / "merged.safetensors")
elif step == "folder":
    merge_folder(folder / "base", deltas[0], folder / "out")
else:
    merge(deltas[0], folder_tensors(folder / "base"))
done.set()
thread.join()
print(len(seen), max(seen) - before)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    if not Path("/proc/self/statm").exists():
        pytest.skip("resident memory is read from /proc")
    folder = tmp_path_factory.mktemp("shards")
    (folder / "base").mkdir()
    where, prints = {}, {}
    for at in range(SHARDS):
        name, file = f"layer.{at}", f"model-{at}.safetensors"
        tensor = torch.rand(ENTRIES)
        save_file({name: tensor}, folder / "base" / file)
        where[name], prints[name] = file, fingerprint(tensor)
    index = json.dumps({"weight_map": where})
    (folder / "base" / "model.safetensors.index.json").write_text(index)
    for which in "ab":
        position = torch.arange(0, ENTRIES, 4099)  # on every second page
        sparse = {
            name: SparseValues((ENTRIES,), torch.float32, position, torch.rand(position.numel()))
            for name in where
        }
        save_delta(Delta(sparse, fingerprints=prints), folder / f"{which}.safetensors")
    return folder


@pytest.mark.parametrize(
    ("step", "least", "most"), [("deltas", 0, 1.5), ("folder", 0.5, 1.5), ("all", 15, 25)]
)
def test_the_peak_is_about_one_shard(folder, step, least, most):
    """Of ten. Loading everything also holds the new values of all changed tensors."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(folder), step],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env=os.environ
        | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        | {"MALLOC_MMAP_THRESHOLD_": "1000000"},  # glibc gives freed tensors back at once
    )
    assert done.returncode == 0, done.stderr
    looks, peak = map(int, done.stdout.split())
    assert looks > 3
    assert least < peak / (4 * ENTRIES) < most

"""Writing a delta file: all or nothing."""

import os
import stat
import subprocess
import sys

import pytest
from delta_cases import example_base, example_delta
from repository import ROOT

from sparse_optim.delta import content_fingerprint, load_delta, save_delta


def test_permissions_follow_the_umask(tmp_path):
    old = os.umask(0o027)
    try:
        save_delta(example_delta(example_base()), tmp_path / "delta")
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "delta").stat().st_mode) == 0o640


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_failed_save_keeps_the_old_file(tmp_path, monkeypatch, step):
    old, new = (example_delta(example_base(), seed=seed) for seed in (1, 2))
    save_delta(old, tmp_path / "delta")

    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, step, full)
    with pytest.raises(OSError, match="No space left"):
        save_delta(new, tmp_path / "delta")
    monkeypatch.undo()
    assert os.listdir(tmp_path) == ["delta"]
    assert content_fingerprint(load_delta(tmp_path / "delta")) == content_fingerprint(old)


def test_saving_writes_through_a_link(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "delta")
    save_delta(example_delta(example_base()), tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert load_delta(tmp_path / "delta").num_entries == 18


def test_saving_into_a_missing_folder(tmp_path):
    with pytest.raises(FileNotFoundError):
        save_delta(example_delta(example_base()), tmp_path / "absent" / "delta")


KILLED_WRITERS = """
import os, random, signal, sys, time
import torch
from sparse_optim.delta import Delta, content_fingerprint, load_delta, save_delta

torch.set_num_threads(1)  # No threads, so that fork is safe.
random.seed(0)
path = sys.argv[1]
deltas = [Delta(sparse={}, dense={"x": torch.full((size,), 1.0)}) for size in (10**6, 3 * 10**5)]
allowed = {content_fingerprint(delta) for delta in deltas}
found, cut = set(), 0
for trial in range(25):
    child = os.fork()
    if child == 0:
        while True:
            for delta in deltas:
                save_delta(delta, path)
    time.sleep(random.uniform(0.005, 0.06))
    os.kill(child, signal.SIGKILL)
    assert os.WIFSIGNALED(os.waitpid(child, 0)[1])
    if os.path.exists(path):
        found.add(content_fingerprint(load_delta(path)))
    cut += any(name.endswith(".tmp") for name in os.listdir(os.path.dirname(path)))
save_delta(deltas[0], path)
assert os.listdir(os.path.dirname(path)) == [os.path.basename(path)], "leftovers stay"
assert found <= allowed and found, "a killed writer left another file"
print(len(found), cut)
"""


def test_a_killed_writer_leaves_a_whole_file(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", KILLED_WRITERS, str(tmp_path / "delta")],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    versions, cut = map(int, done.stdout.split())
    assert versions >= 1
    assert cut >= 1, "no writer was killed in the middle of a write: the test proved nothing"

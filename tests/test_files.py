"""`replacing`: a target appears whole or stays as it was."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from sparse_optim.files import replacing


def names(folder) -> list[str]:
    return sorted(os.listdir(folder))


def test_a_file_replaces_a_file(tmp_path):
    target = tmp_path / "a"
    target.write_text("old")
    with replacing(target) as temporary:
        temporary.write_text("new")
        assert temporary.parent == tmp_path
        assert target.read_text() == "old"
    assert target.read_text() == "new"
    assert names(tmp_path) == ["a"]


@pytest.mark.parametrize("exists", [False, True])
def test_a_folder_replaces_an_empty_one_or_none(tmp_path, exists):
    target = tmp_path / "a"
    if exists:
        target.mkdir()
    with replacing(target) as temporary:
        (temporary / "deep").mkdir(parents=True)
        (temporary / "deep" / "file").write_text("x")
        (temporary / "deep" / "file").chmod(0o444)
    assert (target / "deep" / "file").read_text() == "x"
    assert names(tmp_path) == ["a"]


@pytest.mark.parametrize("error", [ValueError, OSError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("folder", [False, True])
def test_a_failure_leaves_the_target_and_nothing_else(tmp_path, error, folder):
    target = tmp_path / "a"
    target.write_text("old")

    def fail() -> None:
        with replacing(target) as temporary:
            if folder:
                temporary.mkdir()
            (temporary / "file" if folder else temporary).write_text("new")
            raise error

    with pytest.raises(error):
        fail()
    assert target.read_text() == "old"
    assert names(tmp_path) == ["a"]


def test_a_folder_that_holds_something_is_kept(tmp_path):
    target = tmp_path / "a"
    target.mkdir()
    (target / "mine").write_text("x")
    with pytest.raises(OSError, match="not empty"), replacing(target) as temporary:
        temporary.mkdir()
    assert names(tmp_path) == ["a"]
    assert names(target) == ["mine"]


def test_nothing_written_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError), replacing(tmp_path / "a"):
        pass
    assert names(tmp_path) == []


def test_a_link_is_written_through(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "a")
    with replacing(tmp_path / "link") as temporary:
        temporary.write_text("new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "a").read_text() == "new"


def test_a_missing_folder_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError), replacing(tmp_path / "b" / "a") as temporary:
        temporary.write_text("new")


LEAVE = """
import os, sys
from pathlib import Path
from sparse_optim.files import replacing
with replacing(sys.argv[1]) as temporary:
    (temporary.write_text("half") if sys.argv[2] == "file" else temporary.mkdir())
    os._exit(9)
"""


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_the_next_write_removes_what_a_killed_one_left(tmp_path, kind):
    """And nothing of others: of other targets, other machines, or processes that still run."""
    target = tmp_path / "a[1].txt"
    subprocess.run([sys.executable, "-c", LEAVE, str(target), kind], check=False)
    (left,) = tmp_path.iterdir()
    host = left.name.split(".")[3].partition("-")[0]
    kept = [
        f".b.txt.{host}-999999999-0.tmp", ".a[1].txt.0-999999999-0.tmp",
        f".a[1].txt.{host}-{os.getpid()}-0.tmp", ".a[1].txt.tmp",
    ]  # fmt: skip
    for name in kept:
        (tmp_path / name).write_text("of others")
    with replacing(target) as temporary:
        temporary.write_text("whole")
    assert {path.name for path in tmp_path.iterdir()} == {target.name, *kept}
    assert target.read_text() == "whole"

"""Patches as files: receivers come late, fall behind, and meet damaged or missing files."""

from __future__ import annotations

from pathlib import Path
from threading import Thread

import pytest
from publish_cases import Net, Run, assert_same

from sparse_optim import files
from sparse_optim.publish import (
    MissingVersionError,
    Patch,
    PatchError,
    PatchFolder,
    WeightPublisher,
    WeightReceiver,
    _folder,
)


def names(folder: Path) -> list[str]:
    return sorted(path.name.removesuffix(".safetensors") for path in folder.glob("[!.]*"))


def test_receivers_follow_from_wherever_they_are(tmp_path: Path):
    run, folder = Run(), PatchFolder(tmp_path / "weights", whole_every=3, keep=2)
    assert folder.newest == 0
    near, far = WeightReceiver(Net()), WeightReceiver(Net())
    with pytest.raises(PatchError, match="is not a folder"):
        folder.follow(near)
    assert not folder.path.exists()
    for version in range(1, 11):
        run.step()
        assert folder.publish(run.publisher) == folder.newest == version
        assert PatchFolder(folder.path).follow(near) == version
        assert_same(near._model, run.net)
        if version in (1, 9):
            assert folder.follow(far) == version
            assert far.digest == near.digest
        late = WeightReceiver(Net())
        folder.follow(late)
        assert late.digest == near.digest
    assert names(folder.path) == [
        "000000007.whole", "000000008.patch", "000000009.patch", "000000010.patch",
        "000000010.whole",
    ]  # fmt: skip
    assert_same(far._model, run.net) if folder.follow(far) == 10 else pytest.fail(
        "it stayed behind"
    )


def test_a_damaged_or_missing_file(tmp_path: Path):
    run, folder = Run(), PatchFolder(tmp_path)
    receiver = WeightReceiver(Net())
    for _ in range(3):
        run.step()
        folder.publish(run.publisher)
    folder.follow(receiver)
    for _ in range(2):
        run.step()
        folder.publish(run.publisher)
    path = tmp_path / "000000004.patch.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[:-1])
    with pytest.raises(PatchError, match=r"000000004.patch.safetensors: cut or damaged"):
        folder.follow(receiver)
    path.unlink()
    with pytest.raises(MissingVersionError, match="has no version 4"):
        folder.follow(receiver)
    assert receiver.version == 3
    path.write_bytes(data)
    assert folder.follow(receiver) == 5
    assert_same(receiver._model, run.net)
    (tmp_path / "000000006.patch.safetensors").write_bytes(data)
    with pytest.raises(PatchError, match="it is not of version 6"):
        folder.follow(receiver)
    (tmp_path / "notes.txt").write_text("files of others are left alone")
    assert folder.newest == 6


def test_other_ways_around_a_damaged_file(tmp_path: Path):
    run, folder = Run(), PatchFolder(tmp_path, whole_every=2, keep=3)
    receiver = WeightReceiver(Net())
    for version in range(1, 6):
        run.step()
        folder.publish(run.publisher)
        if version == 2:
            folder.follow(receiver)
    (tmp_path / "000000003.patch.safetensors").write_bytes(b"damaged")
    assert folder.follow(receiver) == 5  # by version 5, whole
    assert_same(receiver._model, run.net)
    (tmp_path / "000000005.whole.safetensors").write_bytes(b"damaged")
    late = WeightReceiver(Net())
    assert folder.follow(late) == 5  # by version 3, whole, and the increments after it
    assert late.digest == receiver.digest


def test_files_that_vanish_while_someone_follows(tmp_path: Path, monkeypatch):
    """Between the list and the reading; a newer version is there then."""
    run, folder = Run(), PatchFolder(tmp_path, whole_every=1, keep=1)
    run.step()
    folder.publish(run.publisher)
    receiver, read = WeightReceiver(Net()), Path.read_bytes

    def reads(path: Path) -> bytes:
        if path.name == "000000001.whole.safetensors":
            run.step()
            folder.publish(run.publisher)  # removes version 1
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", reads)
    assert folder.follow(receiver) == 2
    assert_same(receiver._model, run.net)


def test_a_version_that_could_not_be_written_is_made_up_for(tmp_path: Path, monkeypatch):
    run, folder = Run(), PatchFolder(tmp_path)
    receiver = WeightReceiver(Net())
    run.step()
    folder.publish(run.publisher)
    folder.follow(receiver)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(files.os, "replace", full)
        run.step()
        with pytest.raises(OSError, match="No space left"):
            folder.publish(run.publisher)
    assert names(tmp_path) == ["000000001.whole"]
    run.step()
    assert folder.publish(run.publisher) == 3
    assert names(tmp_path) == ["000000001.whole", "000000003.patch", "000000003.whole"]
    assert folder.follow(receiver) == 3
    assert_same(receiver._model, run.net)


def test_another_process_goes_on(tmp_path: Path):
    run, folder = Run(), PatchFolder(tmp_path)
    receiver = WeightReceiver(Net())
    for _ in range(2):
        run.step()
        folder.publish(run.publisher)
    folder.follow(receiver)
    with pytest.raises(ValueError, match=r"has version 2, .* version=folder.newest"):
        folder.publish(Run().publisher)
    fresh = Run(publisher={"version": folder.newest})  # it begins anew, from the base
    fresh.step()
    assert folder.publish(fresh.publisher) == 3
    assert folder.follow(receiver) == 3
    assert_same(receiver._model, fresh.net)


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_a_folder_that_another_run_began_anew(tmp_path: Path, steps: int):
    """With fewer, as many, or more versions than the receiver holds."""
    old, new, receiver = Run(), Run(), WeightReceiver(Net())
    for _ in range(2):
        old.step()
        PatchFolder(tmp_path).publish(old.publisher)
    folder = PatchFolder(tmp_path)
    assert folder.follow(receiver) == folder.follow(receiver) == 2
    for path in tmp_path.glob("[!.]*"):
        path.unlink()
    for _ in range(steps):
        new.step()
        PatchFolder(tmp_path, whole_every=1).publish(new.publisher)
    if steps < 3:
        for each in (folder, PatchFolder(tmp_path)):
            with pytest.raises(PatchError, match=r"reset\(\)"):
                each.follow(receiver)
        assert_same(receiver._model, old.net)
        receiver.reset()
    assert folder.follow(receiver) == steps
    assert_same(receiver._model, new.net)


def test_a_file_that_goes_while_it_is_looked_at(tmp_path: Path, monkeypatch):
    """As increments do, once a whole patch of their version is there."""
    run, folder = Run(), PatchFolder(tmp_path)
    for _ in range(2):
        run.step()
        folder.publish(run.publisher)
    receiver = WeightReceiver(Net())
    assert folder.follow(receiver) == 2
    look = _folder._identity

    def gone(path: Path) -> object:
        path.unlink()
        return look(path)

    monkeypatch.setattr(_folder, "_identity", gone)
    assert PatchFolder(tmp_path).follow(receiver) == 2
    assert_same(receiver._model, run.net)


def test_two_publishers_at_once(tmp_path: Path, monkeypatch):
    """The second comes while the first makes its patch, and waits."""
    first, second = Run(), Run()
    first.step(), second.step()
    refused: list[str] = []

    def publish_second() -> None:
        try:
            PatchFolder(tmp_path).publish(second.publisher)
        except ValueError as error:
            refused.append(str(error))

    thread = Thread(target=publish_second)

    def interrupted() -> Patch:
        thread.start()
        thread.join(0.3)
        assert thread.is_alive()
        assert not names(tmp_path)
        return WeightPublisher.patch(first.publisher)

    monkeypatch.setattr(first.publisher, "patch", interrupted)
    assert PatchFolder(tmp_path).publish(first.publisher) == 1
    thread.join()
    assert len(refused) == 1
    assert "has version 1, the publisher would go on from 0" in refused[0]
    receiver = WeightReceiver(Net())
    PatchFolder(tmp_path).follow(receiver)
    assert_same(receiver._model, first.net)


@pytest.mark.parametrize("option", ["whole_every", "keep"])
def test_what_is_refused(tmp_path: Path, option: str):
    with pytest.raises(ValueError, match="expected at least 1"):
        PatchFolder(tmp_path, **{option: 0})

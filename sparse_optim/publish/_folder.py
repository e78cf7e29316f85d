"""Patches as files in a folder: a disk that machines share, or a mounted bucket."""

from __future__ import annotations

import os
import re
from pathlib import Path

from filelock import FileLock

from sparse_optim.files import replacing
from sparse_optim.publish._manifest import PatchError
from sparse_optim.publish._patch import MissingVersionError, Patch
from sparse_optim.publish._publisher import WeightPublisher
from sparse_optim.publish._receiver import WeightReceiver

_LOCK, _LOCK_SECONDS = ".publishing.lock", 60
_NAME = re.compile(r"(\d{9,})\.(whole|patch)\.safetensors")


class PatchFolder:
    """A folder through which one publisher reaches receivers that come and go.

    Files appear whole and never change: 000000012.patch.safetensors is version 12 as an increment,
    000000012.whole.safetensors the same version for a receiver of any age.

    Args:
        path: of the folder; `publish` makes it. Of two publishers, the first to write a version
            goes on, and the other gets an error.
        whole_every: increments between whole patches.
        keep: whole patches to keep, with the increments after the oldest. A receiver that is
            further behind goes on from the newest whole one.

    Raises:
        ValueError: `whole_every` or `keep` is below 1.

    Examples:
        ```python
        folder = PatchFolder("weights")
        publisher = WeightPublisher(optimizer, model, version=folder.newest)
        folder.publish(publisher)  # after a step

        receiver = WeightReceiver(model)  # elsewhere
        PatchFolder("weights").follow(receiver)  # as often as you like
        ```
    """

    def __init__(
        self, path: str | os.PathLike[str], *, whole_every: int = 8, keep: int = 2
    ) -> None:
        if whole_every < 1 or keep < 1:
            raise ValueError(
                f"whole_every and keep: expected at least 1, got {whole_every} and {keep}"
            )
        self.path, self._whole_every, self._keep = Path(path), whole_every, keep
        self._taken: object = None  # the file that `follow` gave last

    @property
    def newest(self) -> int:
        """The newest version in the folder; 0 if there is none."""
        return max((*self._versions("whole"), *self._versions("patch")), default=0)

    def publish(self, publisher: WeightPublisher) -> int:
        """Write the next version, and remove those that nobody needs any more; its number.

        Raises:
            ValueError: the folder has a version that the publisher does not know, of another
                publisher or an earlier part of the run: build it with `version=folder.newest`. Or
                as `WeightPublisher.patch`.
            OSError: the folder is full or not writable, or another publisher has been writing for
                a minute.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        with FileLock(self.path / _LOCK, timeout=_LOCK_SECONDS):
            return self._publish_alone(publisher)

    def _publish_alone(self, publisher: WeightPublisher) -> int:
        newest = self.newest
        if publisher.version < newest:
            raise ValueError(
                f"{self.path} has version {newest}, the publisher would go on from "
                f"{publisher.version}: build it with version=folder.newest"
            )
        patch, wholes = publisher.patch(), self._versions("whole")
        if patch.manifest is None:
            self._write(patch, "patch")
        due = not wholes or patch.version - max(wholes) >= self._whole_every
        if patch.manifest or due or newest < patch.version - 1:  # one was not written: disk full?
            self._write(publisher.whole(), "whole")
            for old in sorted([*wholes, patch.version])[: -self._keep]:
                self._file(old, "whole").unlink(missing_ok=True)
            oldest = min(self._versions("whole"))
            for version in self._versions("patch"):
                if version <= oldest:
                    self._file(version, "patch").unlink(missing_ok=True)
        return patch.version

    def follow(self, receiver: WeightReceiver) -> int:
        """Bring a receiver to the newest version in the folder; its version then.

        To stay at an earlier version after `receiver.rollback()`, do not call this until the next.

        Raises:
            PatchError: the folder is missing, files are damaged or of another run, or nothing here
                leads on from the receiver's version. The receiver holds the last version that it
                reached.
        """
        if not self.path.is_dir():
            raise PatchError(f"{self.path} is not a folder (yet): is this what the trainer writes?")
        while (newest := self.newest) > receiver.version:
            try:
                self._advance(receiver)
            except PatchError:
                if self.newest == newest:  # else files have come and gone meanwhile
                    raise
        if newest < receiver.version:
            raise PatchError(
                f"the newest version in {self.path} is {newest}, the receiver holds "
                f"{receiver.version}: the folder was emptied, or is of another run; "
                "receiver.reset() takes the model back to the base"
            )
        kind = "patch" if self._file(newest, "patch").is_file() else "whole"
        if _identity(self._file(newest, kind)) not in (None, self._taken):
            self._give(receiver, newest, kind)  # of another run with as many versions?
        return receiver.version

    def _advance(self, receiver: WeightReceiver) -> None:
        """Give a receiver its next version, or a whole one, the newest that is in order."""
        following = receiver.version + 1
        error: PatchError = MissingVersionError(f"{self.path} has no version {following}")
        try:
            if self._give(receiver, following, "patch"):
                return
        except PatchError as refused:
            error = refused
        for version in sorted(self._versions("whole"), reverse=True):
            if version > receiver.version:
                try:
                    if self._give(receiver, version, "whole"):
                        return
                except PatchError as refused:
                    error = refused
        raise error

    def _give(self, receiver: WeightReceiver, version: int, kind: str) -> bool:
        """False where the file is not there (any more)."""
        path = self._file(version, kind)
        try:
            identity, data = _identity(path), path.read_bytes()
        except FileNotFoundError:
            return False
        try:
            receiver.receive(data)
        except MissingVersionError:
            raise
        except PatchError as error:
            raise PatchError(f"{path}: {error}") from error
        if receiver.version < version:
            raise PatchError(f"{path}: it is not of version {version}")
        self._taken = identity
        return True

    def _write(self, patch: Patch, kind: str) -> None:
        with replacing(self._file(patch.version, kind)) as temporary:
            temporary.write_bytes(patch.to_bytes())

    def _file(self, version: int, kind: str) -> Path:
        return self.path / f"{version:09d}.{kind}.safetensors"

    def _versions(self, kind: str) -> list[int]:
        paths = self.path.iterdir() if self.path.is_dir() else ()
        found = (_NAME.fullmatch(path.name) for path in paths)
        return [int(match[1]) for match in found if match and match[2] == kind]


def _identity(path: Path) -> object:
    """Another one for a file that was replaced; None for one that is not there (any more)."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return path.name, found.st_ino, found.st_mtime_ns, found.st_size

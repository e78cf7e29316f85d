"""Write files and folders that appear whole or not at all, and JSON. It imports nothing of ours."""

from __future__ import annotations

import glob
import json
import math
import os
import platform
import secrets
import shutil
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def replacing(target: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path beside `target`; write a file or a folder there.

    When the block ends, what it wrote is synced to disk and renamed to `target`. When the block
    fails or is interrupted, it is removed and `target` stays as it was. A process that is killed
    leaves the old target, none, or the whole new one, and perhaps a hidden `.NAME.*.tmp`, which
    the next write to the same target on the same machine removes. A link at `target` is kept: the
    file that it points to is replaced.

    Args:
        target: in an existing folder. A file replaces a file; a folder replaces nothing or an
            empty folder.

    Raises:
        OSError: the folder is missing, not writable, or full.
    """
    path = Path(os.path.realpath(target))
    host = f"{zlib.crc32(_machine().encode()):08x}"
    _remove_leftovers(path, host)
    temporary = path.with_name(f".{path.name}.{host}-{os.getpid()}-{secrets.token_hex(8)}.tmp")
    try:
        yield temporary
        for file in temporary.rglob("*") if temporary.is_dir() else (temporary,):
            if file.is_file():
                _sync(file, os.O_RDONLY if os.name == "posix" else os.O_RDWR)
        os.replace(temporary, path)
    except BaseException:
        remove(temporary)
        raise
    if hasattr(os, "O_DIRECTORY"):  # elsewhere a folder cannot be synced
        _sync(path.parent, os.O_RDONLY | os.O_DIRECTORY)


def _machine() -> str:
    """The machine, and on Linux its process namespace: where a process number is unique."""
    try:
        return platform.node() + os.readlink("/proc/self/ns/pid")
    except OSError:
        return platform.node()


def _remove_leftovers(path: Path, host: str) -> None:
    """Remove what processes of this machine that no longer run have left beside `path`."""
    begin = f".{path.name}.{host}-"
    for leftover in path.parent.glob(f"{glob.escape(begin)}*.tmp"):
        process = leftover.name.removeprefix(begin).partition("-")[0]
        if process.isdecimal() and not _runs(int(process)):
            remove(leftover)


def _runs(process: int) -> bool:
    """Whether a process of this number runs here; where that cannot be asked, yes."""
    if os.name != "posix":
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True


def _sync(path: Path, flags: int) -> None:
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove(path: Path) -> None:
    """Remove a file, or a folder with what is in it; nothing if there is none."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def strict_json(value: Any, indent: int | None = None) -> str:
    """Strict JSON: a number that is not finite becomes null."""

    def finite(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: finite(item) for name, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [finite(item) for item in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return json.dumps(finite(value), indent=indent, allow_nan=False)

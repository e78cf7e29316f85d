"""Deltas and model folders (transformers' layout: safetensors, perhaps sharded, beside config).

Folders are handled as files: no model is built, nothing is unpickled, one shard is in memory at a
time.
"""

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from sparse_optim.delta._apply import check_base
from sparse_optim.delta._fingerprint import fingerprint
from sparse_optim.delta._format import write_safetensors
from sparse_optim.delta._names import Naming, match_names, renamed, untied
from sparse_optim.delta._types import Delta
from sparse_optim.delta._values import DeltaError
from sparse_optim.files import replacing

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
# Other formats of the same weights (they would still be the base), and leftovers of training.
_NOT_COPIED = (
    *("*.bin", "*.bin.index.json", "*.pt", "*.pth", "*.ckpt", "*.h5", "*.msgpack", "*.ot"),
    *("*.onnx", "*.gguf", "*.tflite", "checkpoint-*", ".*"),
)


@dataclass(frozen=True)
class MergedFolder:
    """The result of `merge_folder`.

    Attributes:
        files: weight files written.
        prefix: what separates the names of delta and base ("bert."), or "".
        added: names of dense tensors that the base did not have, as written.
    """

    files: tuple[str, ...]
    prefix: str
    added: tuple[str, ...]


def folder_tensors(folder: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Every weight tensor of a model folder, by name.

    Raises:
        DeltaError: no safetensors weights, a missing shard, or a damaged file.
    """
    folder = Path(folder)
    tensors: dict[str, Tensor] = {}
    for file in _shards(folder):
        with _readable(folder / file):
            tensors |= load_file(folder / file)
    return tensors


class FolderTensors(Mapping[str, Tensor]):
    """The weight tensors of a model folder, each mapped from its file when it is asked for.

    One file at a time is open: memory holds the pages in use of one shard.

    Args:
        names: name in the folder -> name here; None for the same.

    Raises:
        DeltaError: as `folder_tensors`.
    """

    def __init__(
        self, folder: str | os.PathLike[str], names: Mapping[str, str] | None = None
    ) -> None:
        self._folder = Path(folder)
        self._open: Any = None
        self._file = ""
        where = _locate(self._folder, _shards(self._folder))
        self._where = {
            name if names is None else names[name]: (file, name) for name, file in where.items()
        }

    def __getitem__(self, name: str) -> Tensor:
        file, stored = self._where[name]
        with _readable(self._folder / file):
            if file != self._file:
                self._open, self._file = None, file  # the last one is unmapped first
                self._open = safe_open(self._folder / file, "pt")
            tensor: Tensor = self._open.get_tensor(stored)
        return tensor

    def __contains__(self, name: object) -> bool:
        return name in self._where

    def __iter__(self) -> Iterator[str]:
        return iter(self._where)

    def __len__(self) -> int:
        return len(self._where)


def merge_folder(
    base_folder: str | os.PathLike[str], delta: Delta, out_folder: str | os.PathLike[str]
) -> MergedFolder:
    """Write base + delta as a full model folder: same shards, all other files copied.

    Memory holds one shard at a time, as pages of its file.

    Names may differ by wrappers and by one prefix: `_names.match_names`. A tied weight that the
    base's files hold twice is changed in both places. config.json is copied from the base: a delta
    does not contain the number of labels and the like.

    Args:
        out_folder: must not exist, or be empty. It appears whole or not at all.

    Raises:
        DeltaError: the base is not such a folder, names do not fit or fit in several ways, or
            `merge` raises an error.
        OSError: `out_folder` cannot be written.
    """
    base, out = Path(base_folder), Path(out_folder)
    shards = _shards(base)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise DeltaError(f"{out}: expected a new or empty folder: choose another name")
    if delta.parent is not None:
        raise DeltaError("an increment: compose it with its parent first")
    where = _locate(base, shards)
    naming = match_names(delta, where)
    delta = renamed(delta, naming)
    delta = replace(delta, tied={**_tied_copies(base, where, delta, naming), **delta.tied})
    where = {naming.base[name]: file for name, file in where.items()}
    delta = untied(delta, where)
    added = tuple(name for name in delta.dense if name not in where)
    where |= dict.fromkeys(added, shards[-1])
    out.parent.mkdir(parents=True, exist_ok=True)
    with replacing(out) as temporary:
        shutil.copytree(base, temporary, ignore=lambda at, names: _ignored(base, at, names))
        total = sum(
            _merge_shard(base / file, temporary / file, delta, naming.base, where)
            for file in shards
        )
        if len(shards) > 1 or (base / INDEX).exists():
            index = {"metadata": {"total_size": total}, "weight_map": where}
            (temporary / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    return MergedFolder(files=tuple(shards), prefix=naming.prefix, added=added)


def _ignored(base: Path, folder: str, names: list[str]) -> set[str]:
    skip = set(shutil.ignore_patterns(*_NOT_COPIED)(folder, names))
    if Path(folder) == base:
        skip |= {name for name in names if name.endswith(".safetensors") or name == INDEX}
    return skip


def _merge_shard(
    source: Path, target: Path, delta: Delta, names: Mapping[str, str], where: Mapping[str, str]
) -> int:
    """Write one merged shard, its tensors renamed by `names`; returns the bytes of its tensors."""
    with _readable(source):
        tensors = {names[name]: tensor for name, tensor in load_file(source).items()}
    here = {name for name, file in where.items() if file == target.name}
    sparse = {name: values for name, values in delta.sparse.items() if name in here}
    check_base(tensors, delta, sparse)
    tensors |= {name: tensor for name, tensor in delta.dense.items() if name in here}
    with open(target, "xb") as file:
        write_safetensors(file, tensors, {"format": "pt"}, changes=sparse)
    return sum(tensor.nbytes for tensor in tensors.values())


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except SafetensorError as error:
        raise DeltaError(f"{path}: cut or damaged ({error}): copy it again") from error
    except OSError as error:
        raise DeltaError(f"{path}: cannot be read ({error.strerror or error})") from error


def _locate(folder: Path, shards: list[str]) -> dict[str, str]:
    """The weight file of every tensor name."""
    where: dict[str, str] = {}
    for shard in shards:
        with _readable(folder / shard), safe_open(folder / shard, framework="pt") as file:
            names = file.keys()
        twice = where.keys() & set(names)
        if twice:
            raise DeltaError(f"{folder}: {min(twice)!r} is in {where[min(twice)]} and in {shard}")
        where |= dict.fromkeys(names, shard)
    return where


def _tied_copies(
    base: Path, where: Mapping[str, str], delta: Delta, naming: Naming
) -> dict[str, str]:
    """Second copies, in the base's files, of embeddings that the delta changes.

    A delta that was made from names alone does not know which were tied. A tensor of equal bits,
    with a row for each word, is a copy unless config.json says that the two are not tied.
    """
    try:
        config = json.loads((base / "config.json").read_text())
    except (OSError, ValueError):
        return {}
    if not isinstance(config, dict) or config.get("tie_word_embeddings") is False:
        return {}
    parts = [config, *(part for part in config.values() if isinstance(part, dict))]
    words = {size for part in parts if isinstance(size := part.get("vocab_size"), int)}
    known = {
        values.shape: name
        for name, values in delta.sparse.items()
        if len(values.shape) == 2 and values.shape[0] in words
    }
    copies = {}
    for name, file in where.items():
        new = naming.base[name]
        if not known or new in delta.sparse or new in delta.dense:
            continue
        with _readable(base / file), safe_open(base / file, framework="pt") as tensors:
            of = known.get(tuple(tensors.get_slice(name).get_shape()))
            if of is not None and fingerprint(tensors.get_tensor(name)) == delta.fingerprints[of]:
                copies[new] = of
    return copies


def _shards(folder: Path) -> list[str]:
    """The weight files of a model folder, in order."""
    if not folder.is_dir():
        raise DeltaError(f"{folder}: expected a local model folder, found none")
    if (folder / WEIGHTS).exists():
        return [WEIGHTS]
    if not (folder / INDEX).exists():
        raise DeltaError(
            f"{folder}: no {WEIGHTS} and no {INDEX}: save the model with safe_serialization first"
        )
    try:
        files = sorted(set(json.loads((folder / INDEX).read_text())["weight_map"].values()))
        plain = all(Path(file).name == file for file in files)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DeltaError(f"{folder / INDEX}: expected a JSON object with a weight_map") from error
    if not files or not plain:
        raise DeltaError(f"{folder / INDEX}: expected names of files in this folder")
    missing = [file for file in files if not (folder / file).exists()]
    if missing:
        raise DeltaError(f"{folder}: {missing[0]} is missing: copy the model again")
    return files

"""The delta file: safetensors, with a header that identifies the base.

Tensors, for every sparse parameter NAME and every dense tensor NAME:

    position/NAME        (n,) uint32, or int64 when the parameter has more than 2^32 entries;
                         packed low/NAME and high/NAME in its place, uint8: see `_packing`
    value/NAME           (n,) in the parameter's dtype
    unmask_step/NAME     (n,) int32, optional
    original/NAME        (n,) in the parameter's dtype, optional
    removed/NAME         (k,) as position, increments only
    dense/NAME           whole
    dense_original/NAME  whole, optional

Metadata (text to text): `format`, `format_version`, `method` (JSON), `sparse` (JSON: name, shape,
dtype and base fingerprint of every parameter, in parameter order), `dense` (JSON: names in order),
`content` (hash of all of the above, with positions as they are), in an increment `parent` (the
parent's `content`), and from version 2 on `tied` (JSON: further names of tensors). A file with
packed positions is of version 4; another one of version 2 if it has tied names, else of 1. In
version 4 a sparse parameter's tensors have its place in `sparse`, 0, 1, ..., for NAME: names would
be up to 5% of a small file. (Version 3 was version 4 with names.)
The same delta always gives the same bytes.
"""

import json
import os
import struct
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sparse_optim.delta._content import (
    columns_of,
    content_fingerprint,
    description_of,
    note_fingerprint,
)
from sparse_optim.delta._fingerprint import raw_bytes
from sparse_optim.delta._packing import pack, unpack
from sparse_optim.delta._tensors import DTYPE_CODES, DTYPES, bits
from sparse_optim.delta._types import Delta
from sparse_optim.delta._values import DeltaError, SparseValues, check_shape
from sparse_optim.files import replacing

FORMAT = "sparse_optim.delta"
FORMAT_VERSIONS = ("1", "2", "3", "4")
NUMBERED = "4"  # tensors of sparse parameters have numbers for names
# Reading a header takes up to 60 times its bytes; 20,000 tensors with all columns take 12 MB.
MAX_HEADER_BYTES = 16 << 20
CHANGED_BYTES = 1 << 20  # of a piece that is copied and changed; a multiple of every dtype's width
# Looked at only where the header length, which has the same place, is impossible.
_PICKLE_MAGIC = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")


def save_delta(
    delta: Delta, path: str | os.PathLike[str], *, packed: bool = True, unmask_steps: bool = True
) -> None:
    """Write a delta file, all or nothing.

    Args:
        packed: write positions in about a byte each, not in 4 or 8; any safetensors reader opens
            both, but packed ones take a few lines to decode (docs/reference/delta-format.md).
        unmask_steps: write the step at which each entry was unmasked, if the delta has it: 4 bytes
            an entry. Without it no prefix of the entries (`Delta.prefix`) can be taken any more.

    The bytes go to a temporary file beside `path`, which is synced and renamed over it: a process
    killed at any moment leaves the old file, or none, or the whole new one (and perhaps a hidden
    `.NAME.*.tmp`, which may be deleted).

    Raises:
        OSError: the folder is missing, not writable, or full.
        DeltaError: there are too many tensors for a header that `load_delta` reads.
    """
    with replacing(path) as temporary, open(temporary, "xb") as file:
        if not unmask_steps:
            bare = {name: replace(each, unmask_step=None) for name, each in delta.sparse.items()}
            delta = replace(delta, sparse=bare)
        columns = _packed(delta) if packed else columns_of(delta)
        write_safetensors(file, columns, _metadata(delta, packed), MAX_HEADER_BYTES)


def load_delta(path: str | os.PathLike[str]) -> Delta:
    """Read a delta file and check every part of it. Nothing is ever unpickled.

    Raises:
        DeltaError: the file is missing, cut, damaged, of another kind or a newer version, or its
            contents contradict each other; the message says which.
    """
    path = Path(path)
    try:
        _check_file(path)
        with safe_open(path, framework="pt", device="cpu") as file:
            names = file.keys()
            return _parse(file.metadata() or {}, {name: _read(file, name) for name in names})
    except DeltaError as error:
        raise DeltaError(f"{path}: {error}") from error
    except SafetensorError as error:
        raise DeltaError(f"{path}: cut or damaged ({error}): copy it again") from error
    except RecursionError as error:
        raise DeltaError(f"{path}: its metadata is nested too deep") from error
    except OSError as error:
        raise DeltaError(f"{path}: cannot be read ({error.strerror or error})") from error


def write_safetensors(
    file: BinaryIO,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    max_header_bytes: int = 100_000_000,  # the safetensors library's own limit
    changes: Mapping[str, SparseValues] | None = None,
) -> None:
    """Write a safetensors file, tensor by tensor, always in the same byte order.

    (safetensors' own writer puts the metadata in random order and makes the file readable by its
    owner alone.) Wide dtypes come first, so that every tensor is aligned.

    Args:
        changes: entries of some of the tensors that get other values in the file; the tensors stay
            as they are, and no copy of one is made.
    """
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    order = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    start = 0
    for name in order:
        tensor = tensors[name]
        if tensor.dtype not in DTYPE_CODES:
            raise DeltaError(f"tensor {name!r}: {tensor.dtype} cannot be written to safetensors")
        end = start + tensor.nbytes
        header[name] = {
            "dtype": DTYPE_CODES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
        start = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > max_header_bytes:
        raise DeltaError(
            f"{len(tensors)} tensors need a header of {len(text)} bytes, at most "
            f"{max_header_bytes} are read: give fewer tensors to the optimizer"
        )
    file.write(struct.pack("<Q", len(text)) + text)
    for name in order:
        values, tensor = (changes or {}).get(name), tensors[name]
        for piece in raw_bytes(tensor) if values is None else _changed(tensor, values):
            file.write(piece)


def _changed(tensor: Tensor, values: SparseValues) -> Iterator[memoryview]:
    """The bytes of a tensor with other values at some positions, in pieces."""
    width = tensor.dtype.itemsize
    position, value = values.position.numpy(), bits(values.value).numpy()
    start = 0  # entries before the piece
    for piece in raw_bytes(tensor, CHANGED_BYTES):
        entries = np.frombuffer(piece, dtype=value.dtype).copy()
        part = slice(*position.searchsorted([start, start + entries.size]))
        entries[position[part] - start] = value[part]
        start += len(piece) // width
        yield entries.data


def _packed(delta: Delta) -> dict[str, Tensor]:
    numbers = {name: number for number, name in enumerate(delta.sparse)}
    columns: dict[str, Tensor] = {}
    for key, tensor in columns_of(delta).items():
        kind, _, name = key.partition("/")
        if kind.startswith("dense"):
            columns[key] = tensor
        elif kind == "position":
            values, number = delta.sparse[name], numbers[name]
            low, high = pack(values.position, values.numel)
            columns[f"low/{number}"], columns[f"high/{number}"] = low, high
        else:
            columns[f"{kind}/{numbers[name]}"] = tensor
    return columns


def _metadata(delta: Delta, packed: bool) -> dict[str, str]:
    description = description_of(delta)
    parent = description.pop("parent")
    version = NUMBERED if packed else FORMAT_VERSIONS[1 if delta.tied else 0]
    metadata = {"format": FORMAT, "format_version": version}
    metadata |= {key: json.dumps(part, separators=(",", ":")) for key, part in description.items()}
    metadata["content"] = content_fingerprint(delta)
    return metadata if parent is None else metadata | {"parent": parent}


def _check_file(path: Path) -> None:
    if path.is_dir():
        raise DeltaError("expected a delta file, got a folder")
    if not path.exists():
        raise DeltaError("no such file")
    if not path.is_file():  # Opening a pipe waits for a writer.
        raise DeltaError("expected a regular file, got a pipe, socket or device")
    size = path.stat().st_size
    with open(path, "rb") as file:
        start = file.read(8)
    if len(start) < 8:
        raise DeltaError(f"{size} bytes are too few for a delta: cut, copy it again")
    (header,) = struct.unpack("<Q", start)
    if header > MAX_HEADER_BYTES and start.startswith(_PICKLE_MAGIC):
        raise DeltaError(
            "a pickle or zip archive (torch.save?), not a delta: such files can run code when "
            "loaded and are never opened here"
        )
    if header > MAX_HEADER_BYTES:
        raise DeltaError(
            f"not a delta, or damaged: its header claims {header} bytes, expected at most "
            f"{MAX_HEADER_BYTES}"
        )
    if header > size - 8:
        raise DeltaError(f"cut: its header claims {header} of {size} bytes: copy it again")


def _read(file: Any, key: str) -> Tensor:
    piece = file.get_slice(key)
    code, shape = piece.get_dtype(), piece.get_shape()
    if code not in DTYPES:
        raise DeltaError(f"tensor {key!r}: dtype {code} is unknown")
    check_shape(shape)
    tensor: Tensor = file.get_tensor(key)
    return tensor


def _json(metadata: Mapping[str, str], key: str, kind: type) -> Any:
    if key not in metadata:
        raise DeltaError(f"metadata {key!r} is missing: damaged, or another program wrote it")
    try:
        parsed = json.loads(metadata[key])
    except (ValueError, RecursionError) as error:
        raise DeltaError(f"metadata {key!r} is not JSON ({error})") from error
    if not isinstance(parsed, kind):
        raise DeltaError(f"metadata {key!r}: expected a JSON {kind.__name__}")
    return parsed


def _check_metadata(metadata: Mapping[str, str]) -> None:
    if metadata.get("format") != FORMAT:
        raise DeltaError(
            f"a safetensors file, but no delta (metadata 'format' is {metadata.get('format')!r}, "
            f"expected {FORMAT!r})"
        )
    version = metadata.get("format_version")
    if version not in FORMAT_VERSIONS:
        raise DeltaError(
            f"format version {version!r}, this sparse_optim reads up to {FORMAT_VERSIONS[-1]!r}: "
            "upgrade sparse_optim"
        )


def _parse(metadata: Mapping[str, str], tensors: dict[str, Tensor]) -> Delta:
    """Build the delta out of a file's parts. `tensors` is used up."""
    _check_metadata(metadata)
    sparse: dict[str, SparseValues] = {}
    fingerprints: dict[str, str] = {}
    removed: dict[str, Tensor] = {}
    for number, entry in enumerate(_json(metadata, "sparse", list)):
        if not isinstance(entry, dict) or entry.keys() != {"name", "shape", "dtype", "fingerprint"}:
            raise DeltaError("metadata 'sparse': expected name, shape, dtype and fingerprint each")
        name = entry["name"]
        if not isinstance(name, str) or name in sparse:
            raise DeltaError(f"metadata 'sparse': {str(name)[:80]!r} is no name, or appears twice")
        try:
            called = str(number) if metadata["format_version"] == NUMBERED else name
            sparse[name] = _sparse_values(entry, called, tensors)
        except DeltaError as error:
            raise DeltaError(f"{name!r}: {error}") from error
        fingerprints[name] = entry["fingerprint"]
        if f"removed/{called}" in tensors:
            removed[name] = _positions(tensors, f"removed/{called}", sparse[name].position_dtype)
    dense: dict[str, Tensor] = {}
    dense_original: dict[str, Tensor] = {}
    for name in _json(metadata, "dense", list):
        if not isinstance(name, str) or name in dense:
            raise DeltaError(f"metadata 'dense': {str(name)[:80]!r} is no name, or appears twice")
        dense[name] = _pop(tensors, f"dense/{name}")
        if f"dense_original/{name}" in tensors:
            dense_original[name] = tensors.pop(f"dense_original/{name}")
    if tensors:
        raise DeltaError(f"tensor {min(tensors)!r} is not accounted for in the metadata")
    delta = Delta(
        sparse=sparse,
        dense=dense,
        fingerprints=fingerprints,
        method=_json(metadata, "method", dict),
        dense_original=dense_original,
        parent=metadata.get("parent"),
        removed=removed,
        tied=_json(metadata, "tied", dict) if "tied" in metadata else {},
    )
    content = content_fingerprint(delta)
    if metadata.get("content") != content:
        raise DeltaError("damaged: its contents do not match their hash: copy it again")
    note_fingerprint(delta, content)
    return delta


def _sparse_values(entry: dict[str, Any], called: str, tensors: dict[str, Tensor]) -> SparseValues:
    """The values of a parameter; `called`: the name of its tensors."""
    shape, code = entry["shape"], entry["dtype"]
    if not isinstance(shape, list) or any(type(size) is not int for size in shape):
        raise DeltaError(f"shape: expected a list of integers, got {str(shape)[:80]}")
    if not isinstance(code, str) or code not in DTYPES:
        raise DeltaError(f"dtype: {str(code)[:80]!r} is unknown")
    empty = torch.empty(0, dtype=DTYPES[code])
    layout = SparseValues(
        tuple(shape), DTYPES[code], position=torch.empty(0, dtype=torch.int64), value=empty
    )
    value = _pop(tensors, f"value/{called}")
    if f"high/{called}" in tensors:
        low, high = _pop(tensors, f"low/{called}"), _pop(tensors, f"high/{called}")
        try:
            position = unpack(low, high, value.numel(), layout.numel)
        except ValueError as error:
            raise DeltaError(f"damaged: {error}") from error
    else:
        position = _positions(tensors, f"position/{called}", layout.position_dtype)
    return SparseValues(
        shape=layout.shape,
        dtype=layout.dtype,
        position=position,
        value=value,
        unmask_step=tensors.pop(f"unmask_step/{called}", None),
        original=tensors.pop(f"original/{called}", None),
    )


def _positions(tensors: dict[str, Tensor], key: str, dtype: torch.dtype) -> Tensor:
    position = _pop(tensors, key)
    if position.dtype != dtype:
        raise DeltaError(f"tensor {key!r}: expected {dtype} for this shape, got {position.dtype}")
    return position.to(torch.int64)


def _pop(tensors: dict[str, Tensor], key: str) -> Tensor:
    if key not in tensors:
        raise DeltaError(f"tensor {key!r} is missing")
    return tensors.pop(key)

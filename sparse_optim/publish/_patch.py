"""One version on the wire: a safetensors file with a header that chains it to the one before.

Tensors:

    new         (S,) int32, of each sparse tensor the number of new entries
    position    (sum of new,) int32, their positions, tensor by tensor, ascending
    value       (bytes,) uint8, the values of all entries, new ones in their places
    dense       (bytes,) uint8, the dense tensors whole

Metadata: `format`, `format_version`, `run`, `version`, `digest` (of the version), `parent` (digest
of the version before), and in a whole patch, whose parent is the base, `manifest`. That makes two
bytes an entry in bfloat16, and four more for a new one.
"""

from __future__ import annotations

import io
import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, deserialize
from torch import Tensor

from sparse_optim.delta._format import write_safetensors
from sparse_optim.publish._manifest import Manifest, PatchError

FORMAT, FORMAT_VERSION = "sparse_optim.patch", "1"
MAX_HEADER_BYTES, MAX_DIGITS, MAX_RUN_LETTERS = 16 << 20, 18, 200
_TENSORS = {"new": torch.int32, "position": torch.int32, "value": torch.uint8, "dense": torch.uint8}
_CODES = {"I32": torch.int32, "U8": torch.uint8}


class TensorPatch(NamedTuple):
    """New values of some entries of one tensor: the fields of vLLM's `SparseWeightPatch`.

    Attributes:
        name: of the tensor in the checkpoint.
        indices: (n,), int32, flat positions in it, ascending.
        values: (n,), in the tensor's dtype.
        full_shape: of the tensor.
    """

    name: str
    indices: Tensor
    values: Tensor
    full_shape: tuple[int, ...]


class MissingVersionError(PatchError):
    """A patch builds on a version that the receiver does not hold: give it a whole one."""


@dataclass(frozen=True, eq=False)
class Patch:
    """What a receiver writes to get from one version to the next.

    Attributes:
        run: name of the run that published it.
        version: the number of the version that it makes, from 1.
        digest: of that version; see `WeightReceiver.digest`.
        parent: digest of the version that it builds on; of the manifest in a whole patch.
        new, position, value, dense: tensors, see the format of the file.
        manifest: in a whole patch, which builds on the base.
    """

    run: str
    version: int
    digest: str
    parent: str
    new: Tensor
    position: Tensor
    value: Tensor
    dense: Tensor
    manifest: Manifest | None = None

    def __repr__(self) -> str:
        kind = "whole" if self.manifest else "increment"
        return f"Patch(version {self.version}, {kind}, {self.nbytes} bytes)"

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors."""
        return sum(getattr(self, name).nbytes for name in _TENSORS)

    @property
    def full_manifest(self) -> Manifest:
        """The manifest of a whole patch.

        Raises:
            PatchError: it is an increment.
        """
        if self.manifest is None:
            raise PatchError("an increment has no positions of older entries: take a whole patch")
        return self.manifest

    def entries(self) -> Iterator[TensorPatch]:
        """The entries of a whole patch, tensor by tensor, dense tensors with every index.

        What vLLM's sparse weight transfer takes, in the checkpoint's names and coordinates:
        `SparseWeightPatch(*each) for each in publisher.whole().entries()`.

        Raises:
            PatchError: it is an increment, which has values without positions.
        """
        manifest = self.full_manifest
        pieces = self.position.split(self.new.tolist())
        for spec, position, value in zip(manifest.sparse, pieces, self.values(), strict=True):
            if position.numel():
                yield TensorPatch(spec.name, position, value, spec.shape)
        for spec, whole in zip(manifest.dense, self.wholes(), strict=True):
            index = torch.arange(spec.numel, dtype=torch.int32)
            yield TensorPatch(spec.name, index, whole.view(-1), spec.shape)

    def values(self) -> list[Tensor]:
        """Of a whole patch, the values of each sparse tensor, in its dtype.

        Raises:
            PatchError: it is an increment, or there are more or fewer bytes than entries.
        """
        manifest, counts = self.full_manifest, self.new.tolist()
        if len(counts) != len(manifest.sparse):
            raise PatchError(f"expected {len(manifest.sparse)} sparse tensors, got {len(counts)}")
        sizes = [
            count * spec.dtype.itemsize for spec, count in zip(manifest.sparse, counts, strict=True)
        ]
        pieces = _split(self.value, sizes, "values of entries")
        dtypes = (spec.dtype for spec in manifest.sparse)
        return [_typed(piece, dtype) for piece, dtype in zip(pieces, dtypes, strict=True)]

    def wholes(self) -> list[Tensor]:
        """Of a whole patch, the dense tensors; raises as `values`."""
        manifest = self.full_manifest
        pieces = _split(self.dense, [spec.nbytes for spec in manifest.dense], "whole tensors")
        return [
            _typed(piece, spec.dtype).view(spec.shape)
            for piece, spec in zip(pieces, manifest.dense, strict=True)
        ]

    def to_bytes(self) -> bytes:
        """The file."""
        metadata = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "run": self.run,
            "version": str(self.version),
            "digest": self.digest,
            "parent": self.parent,
        }
        if self.manifest is not None:
            metadata["manifest"] = self.manifest.text
        file = io.BytesIO()
        write_safetensors(file, {name: getattr(self, name) for name in _TENSORS}, metadata)
        return file.getvalue()

    @staticmethod
    def from_bytes(data: bytes | bytearray | memoryview) -> Patch:
        """Read a file. Whether its digest is right, `WeightReceiver.stage` finds out.

        Raises:
            PatchError: it is cut, damaged, or of another kind or version.
        """
        data = bytes(data)
        metadata = _metadata(data)
        try:
            found = dict(deserialize(data))  # type: ignore[no-untyped-call]
        except SafetensorError as error:
            raise PatchError(f"cut or damaged ({error}): send it again") from error
        if found.keys() != _TENSORS.keys():
            raise PatchError(f"expected the tensors {sorted(_TENSORS)}, got {sorted(found)[:8]}")
        tensors = {name: _tensor(name, found[name]) for name in _TENSORS}
        run, version = metadata.get("run", ""), metadata.get("version", "")
        if not version.isdecimal() or not version.isascii() or len(version) > MAX_DIGITS:
            raise PatchError(f"its version is {version[:80]!r}, expected a number")
        if not 0 < len(run) <= MAX_RUN_LETTERS or not run.isprintable():
            raise PatchError(f"its run is {run[:80]!r}, expected a name")
        for name in ("digest", "parent"):
            digest = metadata.get(name, "")
            if len(digest) != 32 or not {*digest} <= {*"0123456789abcdef"}:
                raise PatchError(f"its {name} is {digest[:80]!r}, expected 32 hex digits")
        manifest = metadata.get("manifest")
        patch = Patch(
            run=run,
            version=int(version),
            digest=metadata["digest"],
            parent=metadata["parent"],
            manifest=None if manifest is None else Manifest.parse(manifest),
            **tensors,
        )
        if bool((patch.new < 0).any()) or int(patch.new.sum()) != patch.position.numel():
            raise PatchError("the numbers of new entries do not fit their positions")
        return patch


def _metadata(data: bytes) -> dict[str, str]:
    size = struct.unpack_from("<Q", data)[0] if len(data) >= 8 else 0
    if not 0 < size <= min(MAX_HEADER_BYTES, len(data) - 8):
        raise PatchError(f"{len(data)} bytes that are no patch, or a part of one: send it again")
    try:
        metadata = json.loads(data[8 : 8 + size]).get("__metadata__")
    except (ValueError, AttributeError, RecursionError) as error:
        raise PatchError("its header is damaged: send it again") from error
    if not isinstance(metadata, dict) or metadata.get("format") != FORMAT:
        raise PatchError("a safetensors file, but no patch")
    if metadata.get("format_version") != FORMAT_VERSION:
        raise PatchError(
            f"a patch of format {str(metadata.get('format_version'))[:20]!r}, this sparse_optim "
            f"reads {FORMAT_VERSION!r}: upgrade it"
        )
    if not all(isinstance(value, str) for value in metadata.values()):
        raise PatchError("its header is damaged: send it again")
    return metadata


def _tensor(name: str, found: dict[str, Any]) -> Tensor:
    dtype, shape = _CODES.get(found["dtype"]), found["shape"]
    if dtype != _TENSORS[name] or len(shape) != 1:
        raise PatchError(f"tensor {name!r} is {found['dtype']} of shape {shape[:8]}")
    return (
        torch.frombuffer(bytearray(found["data"]), dtype=dtype)
        if shape[0]
        else torch.empty(0, dtype=dtype)
    )


def _split(raw: Tensor, sizes: list[int], what: str) -> tuple[Tensor, ...]:
    if sum(sizes) != raw.numel():
        raise PatchError(f"expected {sum(sizes)} bytes of {what}, got {raw.numel()}")
    return raw.split(sizes) if sizes else ()


def _typed(piece: Tensor, dtype: torch.dtype) -> Tensor:
    """Bytes as numbers: a view where they are aligned."""
    if piece.storage_offset() % dtype.itemsize:
        piece = piece.clone()
    return piece.view(dtype)

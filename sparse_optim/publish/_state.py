"""What a model holds beyond its base at one version, and the digest of it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import xxhash
from torch import Tensor

from sparse_optim.delta._tensors import bits
from sparse_optim.publish._manifest import Manifest, PatchError

MAX_KEY_BYTES = hashlib.blake2b.MAX_KEY_SIZE


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


@dataclass(frozen=True)
class State:
    """One version: entries by tensor in the order of the manifest, and tensors that are sent whole.

    Attributes:
        version: 0 is the base.
        digest: of base, version, positions and values.
        positions: of each sparse tensor (n,), int32, ascending.
        values: of each sparse tensor (n,), in its dtype.
        dense: of each dense tensor its bytes, one after the other: (bytes,), uint8.
    """

    version: int
    digest: str
    positions: Sequence[Tensor]
    values: Sequence[Tensor]
    dense: Tensor

    def entries(self, manifest: Manifest) -> Iterator[TensorPatch]:
        """All of it, tensor by tensor."""
        for spec, position, value in zip(manifest.sparse, self.positions, self.values, strict=True):
            if position.numel():
                yield TensorPatch(spec.name, position, value, spec.shape)
        for spec, whole in zip(manifest.dense, dense_tensors(manifest, self.dense), strict=True):
            index = torch.arange(spec.numel, dtype=torch.int32)
            yield TensorPatch(spec.name, index, whole.view(-1), spec.shape)


def digest_of(
    manifest: Manifest,
    key: bytes | None,
    version: int,
    counts: Tensor,
    positions: Iterable[Tensor],
    values: Iterable[Tensor],
    dense: Tensor,
) -> str:
    """32 hex digits: xxh3_128, or with a key blake2b, which nobody can forge without the key.

    Args:
        counts: (S,), int64, entries of each sparse tensor.
        positions, values, dense: on the host; cut into pieces in any way.
    """
    state = xxhash.xxh3_128() if key is None else hashlib.blake2b(key=key, digest_size=16)
    state.update(f"{manifest.digest}/{version}/".encode())
    state.update(counts.numpy().data)
    for piece in (*positions, *values, dense):
        state.update(bits(piece).numpy().data)
    return state.hexdigest()


def check_key(key: bytes | None) -> bytes | None:
    """The key; ValueError if it is none."""
    if key is not None and not (isinstance(key, bytes) and 0 < len(key) <= MAX_KEY_BYTES):
        raise ValueError(f"key: expected 1 to {MAX_KEY_BYTES} bytes, got {type(key).__name__}")
    return key


def split_values(manifest: Manifest, counts: Sequence[int], raw: Tensor) -> list[Tensor]:
    """The values of each sparse tensor out of their bytes, (bytes,) uint8.

    Raises:
        PatchError: there are more or fewer bytes than the counts say.
    """
    sizes = [
        count * spec.dtype.itemsize for spec, count in zip(manifest.sparse, counts, strict=True)
    ]
    if sum(sizes) != raw.numel():
        raise PatchError(f"expected {sum(sizes)} bytes of values, got {raw.numel()}")
    dtypes = (spec.dtype for spec in manifest.sparse)
    return [_typed(piece, dtype) for piece, dtype in zip(raw.split(sizes), dtypes, strict=True)]


def dense_tensors(manifest: Manifest, raw: Tensor) -> list[Tensor]:
    """The dense tensors out of their bytes; raises as `split_values`."""
    sizes = [spec.nbytes for spec in manifest.dense]
    if sum(sizes) != raw.numel():
        raise PatchError(f"expected {sum(sizes)} bytes of whole tensors, got {raw.numel()}")
    pieces = raw.split(sizes) if sizes else ()
    return [
        _typed(piece, spec.dtype).view(spec.shape)
        for piece, spec in zip(pieces, manifest.dense, strict=True)
    ]


def _typed(piece: Tensor, dtype: torch.dtype) -> Tensor:
    """Bytes as numbers: a view where they are aligned."""
    if piece.storage_offset() % dtype.itemsize:
        piece = piece.clone()
    return piece.view(dtype)

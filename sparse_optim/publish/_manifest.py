"""What a publisher's patches speak of: tensors by name, and the base that they belong to."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import xxhash

from sparse_optim.delta import DeltaError
from sparse_optim.delta._tensors import DTYPE_CODES, DTYPES
from sparse_optim.delta._values import check_shape
from sparse_optim.errors import SparseOptimError

MAX_NUMEL = 2**31  # of a tensor of which entries are sent: positions are int32
MAX_TENSORS = 100_000  # read in about two seconds


class PatchError(SparseOptimError):
    """A patch is damaged, forged, or does not fit the receiver's model."""


@dataclass(frozen=True)
class TensorSpec:
    """A tensor as the base's checkpoint has it.

    Attributes:
        name, shape, dtype: of the tensor.
        fingerprint: of the base's values; "" of a tensor that is sent whole with each version.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    fingerprint: str = ""

    @property
    def numel(self) -> int:
        """Entries."""
        return torch.Size(self.shape).numel()

    @property
    def nbytes(self) -> int:
        """Bytes of the whole tensor."""
        return self.numel * self.dtype.itemsize


@dataclass(frozen=True)
class Manifest:
    """The tensors of a run, in the order of its patches.

    Attributes:
        sparse: tensors of which entries are sent.
        dense: tensors that are sent whole with each version.
        fixed: the model's other tensors, which a receiver's model must hold, too.
        tied: further names of tensors.
        text: all that as JSON; equal manifests have equal texts.
        digest: hash of the text.
    """

    sparse: tuple[TensorSpec, ...]
    dense: tuple[TensorSpec, ...]
    fixed: tuple[TensorSpec, ...]
    tied: Mapping[str, str]
    text: str = field(init=False, repr=False)
    digest: str = field(init=False)

    def __post_init__(self) -> None:
        rows = [
            [
                [spec.name, list(spec.shape), DTYPE_CODES[spec.dtype], spec.fingerprint]
                for spec in part
            ]
            for part in (self.sparse, self.dense, self.fixed)
        ]
        text = json.dumps([*rows, dict(self.tied)], separators=(",", ":"), sort_keys=True)
        object.__setattr__(self, "text", text)
        object.__setattr__(self, "digest", xxhash.xxh3_128_hexdigest(text.encode()))

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of each tensor by name, tied names included."""
        shapes = {spec.name: spec.shape for spec in (*self.sparse, *self.dense, *self.fixed)}
        return shapes | {alias: shapes[name] for alias, name in self.tied.items()}

    @staticmethod
    def parse(text: str) -> Manifest:
        """Read a manifest's text.

        Raises:
            PatchError: it is no such text, or names too many tensors.
        """
        try:
            sparse, dense, fixed, tied = json.loads(text)
            if sum(map(len, (sparse, dense, fixed, tied))) > MAX_TENSORS:
                raise ValueError(f"more than {MAX_TENSORS} tensors")
            manifest = Manifest(
                tuple(_spec(row, fingerprint=True) for row in sparse),
                tuple(_spec(row, fingerprint=False) for row in dense),
                tuple(_spec(row, fingerprint=True) for row in fixed),
                {str(alias): str(name) for alias, name in tied.items()},
            )
        except (ValueError, TypeError, AttributeError, RecursionError, DeltaError) as error:
            raise PatchError(f"its list of tensors is damaged ({str(error)[:200]})") from error
        names = [spec.name for spec in (*manifest.sparse, *manifest.dense, *manifest.fixed)]
        if len({*names, *manifest.tied}) != len(names) + len(manifest.tied):
            raise PatchError("its list of tensors names one twice")
        if not {*manifest.tied.values()} <= {*names}:
            raise PatchError("its list of tensors ties a name to one that is not there")
        return manifest


def _spec(row: Any, fingerprint: bool) -> TensorSpec:
    name, shape, code, text = row
    if not isinstance(name, str) or not name.isprintable() or not name:
        raise ValueError(f"{str(name)[:80]!r} is no name")
    if not isinstance(code, str) or code not in DTYPES:
        raise ValueError(f"dtype {str(code)[:80]!r} is unknown")
    if not isinstance(text, str) or bool(text) != fingerprint:
        raise ValueError(f"{name[:80]!r} has fingerprint {str(text)[:80]!r}")
    if not isinstance(shape, list) or any(type(size) is not int for size in shape):
        raise ValueError(f"{name[:80]!r} has shape {str(shape)[:80]}")
    spec = TensorSpec(name, check_shape(shape), DTYPES[code], text)
    if spec.numel > MAX_NUMEL:
        raise ValueError(f"{name[:80]!r} has {spec.numel} entries, at most {MAX_NUMEL}")
    return spec

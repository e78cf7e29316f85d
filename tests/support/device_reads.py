"""Refuses what would make the host wait for a GPU, on tensors of the CPU.

Every read of a tensor's contents into Python ends in one of these: operators whose result has a
size or a value that the host must know, and `Tensor.tolist`, which on the CPU asks no operator.
NumPy views and pointers, by which the interpreter and the emulator run kernels, pass.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from sparse_optim.engine.completion import Completion

READS = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "equal")
MASKS = ("index", "index_put", "index_put_")


def _reads(name: str, args: tuple[Any, ...]) -> bool:
    if name in MASKS:  # as many entries as the mask has
        return any(index is not None and index.dtype == torch.bool for index in args[1])
    return name in READS


class _Refusing(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if _reads(func.overloadpacket.__name__, args):
            raise AssertionError(f"the host reads a tensor: {func}")
        return func(*args, **(kwargs or {}))


def _refused(tensor: torch.Tensor) -> None:
    raise AssertionError("the host reads a tensor: Tensor.tolist")


@contextlib.contextmanager
def refused() -> Iterator[None]:
    """Reads of tensors raise AssertionError.

    On a device, `Completion.note` reads a copy in the host's memory, of an earlier call.
    """
    note = mock.patch.object(Completion, "note")
    with note, mock.patch.object(torch.Tensor, "tolist", _refused), _Refusing():
        yield

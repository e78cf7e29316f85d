"""Swap a delta's entries with those in the model: one operation for all tensors on a GPU.

    buffer[e] <-> tensor of e, at position[e]        (`exchange` of the backends)

so that a second swap undoes the first, and no other copy is read. For contiguous tensors in
float32, bfloat16 and float16 of fewer than 2^31 entries. Unrun on a GPU so far: `_switch` compares
what comes of the first swaps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sparse_optim.backends.registry import Backend, load
from sparse_optim.backends.words import words_of
from sparse_optim.delta._apply import Write
from sparse_optim.delta._tensors import Tensors

# Of each type of device, the first that is installed. Not on the CPU: there `cpp` took 9.7 ms for a
# switch of 2 x 856,026 bfloat16 entries of BERT-base that took 10.7 ms tensor by tensor, and on a
# busy machine up to twice as long, as its threads wait for each other.
BACKENDS: dict[str, tuple[str, ...]] = {"cuda": ("cuda", "triton")}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_NUMEL = 2**31 - 1


def backend_of(device: torch.device) -> Backend | None:
    """The backend that swaps entries on a device; None: no one does."""
    for name in BACKENDS.get(device.type, ()):
        try:
            return load(name)
        except ImportError:
            continue
    return None


def can_swap(tensor: Tensor) -> bool:
    """Whether entries of a tensor can be swapped."""
    return (
        type(tensor) in (Tensor, nn.Parameter)
        and tensor.dtype in DTYPES
        and tensor.is_contiguous()
        and tensor.numel() <= MAX_NUMEL
        and not tensor.is_inference()  # which counts no versions
    )


@dataclass
class _Part:
    """The entries on one device.

    Attributes:
        names: of the tensors.
        layouts: what they were like when the part was built.
        position, offsets, value: arguments of the operation.
        table, bound: the tensors' addresses, as the operation takes them.
        marks: of the tensors that are bound.
    """

    backend: Backend
    names: list[str]
    layouts: list[object]
    position: Tensor
    offsets: Tensor
    value: Tensor
    table: Tensor
    bound: Any = None
    marks: tuple[tuple[int, int], ...] = ()

    @classmethod
    def of(cls, backend: Backend, tensors: Tensors, writes: Sequence[Write]) -> _Part:
        device = tensors[writes[0].name].device
        places = [write.position for write in writes if write.position is not None]
        counts = torch.tensor([0, *(place.numel() for place in places)])
        return cls(
            backend,
            [write.name for write in writes],
            [_layout(tensors[write.name]) for write in writes],
            torch.cat([place.int() for place in places]).to(device),
            counts.cumsum(0).to(device),
            torch.cat([words_of(write.value) for write in writes]).to(device),
            torch.zeros(len(writes), 4, dtype=torch.int64, device=device),
        )

    def bind(self, tensors: Tensors) -> bool:
        """Note where the tensors are, if that is new; False if they are of another layout."""
        params = [tensors[name] for name in self.names]
        marks = tuple((id(param), param.data_ptr()) for param in params)
        if marks == self.marks:
            return True
        if [_layout(param) for param in params] != self.layouts:
            return False
        params = [param.detach() for param in params]
        none = [param.new_empty(0) for param in params]
        self.bound, self.marks = self.backend.bind(none, params, self.table), marks
        return True


class Exchange:
    """Entries of a delta, on the devices of their tensors. Holds 8 bytes an entry.

    Args:
        tensors: the model's.
        writes: what the first swap brings into the model.

    Attributes:
        names: of the tensors whose entries it swaps.
    """

    def __init__(self, tensors: Tensors, writes: Sequence[Write]) -> None:
        by_device: dict[torch.device, list[Write]] = {}
        for write in writes:
            if write.position is not None and can_swap(tensors[write.name]):
                by_device.setdefault(tensors[write.name].device, []).append(write)
        backends = {device: backend_of(device) for device in by_device}
        self._parts = [
            _Part.of(backend, tensors, by_device[device])
            for device, backend in backends.items()
            if backend is not None
        ]
        self.names = {name for part in self._parts for name in part.names}

    def bind(self, tensors: Tensors) -> bool:
        """Note where the tensors are. Call it before `swap`.

        Returns:
            False if one of them is of another shape, dtype or device than it was: build another.
        """
        return all(part.bind(tensors) for part in self._parts)

    def swap(self, tensors: Tensors) -> None:
        """Swap all entries; `tensor._version` moves."""
        for part in self._parts:
            part.backend.exchange(part.bound, part.position, part.offsets, part.value)
            torch.autograd.graph.increment_version([tensors[name] for name in part.names])


def _layout(tensor: Tensor) -> tuple[object, ...]:
    return tensor.device, tensor.dtype, tensor.shape, can_swap(tensor)

"""Memory of fine-tuning, from a model's config alone: nothing is loaded, nothing is allocated.

    held = weights + optimizer state
    peak = held + max(activations + what is recomputed at once, gradients)

The model runs forward on the meta device, where tensors have shapes but no memory; what autograd
saves is counted exactly. Backward frees activations while gradients appear, so that the greater of
the two counts. A step that runs within backward (`fuse_backward=True`) holds two gradients at once.
Temporaries within single operations, the CUDA context and fragmentation come on top. Attention that
saves less on a GPU (flash attention) makes the figure an upper one there.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

GIB = 1 << 30
# Nominal device memory, bytes.
GPUS = {
    "l4": 24 * GIB, "rtx4090": 24 * GIB, "a6000": 48 * GIB, "a100-40": 40 * GIB,
    "a100": 80 * GIB, "h100": 80 * GIB, "h200": 140 * GIB,
}  # fmt: skip
OPTIMIZERS = ("adamw", "adamw-fp32", "adamw-8bit", "sparse", "in-backward")
TILE = 4096  # of the GPU backends; 16 bytes of work space each, or a little more


@dataclass(frozen=True)
class Footprint:
    """A model's own bytes, whichever the optimizer.

    Attributes:
        entries, tensors: trainable scalars, and the tensors that hold them.
        weights: bytes.
        gradients: bytes, all of them at once.
        two_gradients: bytes of the two largest.
        activations: bytes that autograd saves in one forward pass.
        recomputed: bytes that checkpointing saves anew for one layer.
    """

    entries: int
    tensors: int
    weights: int
    gradients: int
    two_gradients: int
    activations: int
    recomputed: int


@dataclass(frozen=True)
class Estimate:
    """Bytes of a training step with one optimizer."""

    optimizer: str
    state: int
    footprint: Footprint

    @property
    def held(self) -> int:
        """Between steps, gradients set to None."""
        return self.footprint.weights + self.state

    @property
    def peak(self) -> int:
        """In the second step or a later one."""
        model = self.footprint
        return self.held + max(model.activations + model.recomputed, self.gradients)

    @property
    def gradients(self) -> int:
        """Alive at once."""
        model = self.footprint
        return model.two_gradients if self.optimizer == "in-backward" else model.gradients


def state_bytes(optimizer: str, footprint: Footprint, itemsize: int, budget: int) -> int:
    """Bytes of optimizer state.

    Args:
        optimizer: "adamw" (moments in the parameters' dtype), "adamw-fp32" (float32 moments, and
            master values of parameters of 16 bits), "adamw-8bit" (moments of a byte, float32 scales
            for blocks of 256), "sparse" (this package) or "in-backward" (the same, with
            `fuse_backward=True`).
        itemsize: bytes of a parameter's entry.
        budget: entries that may become active.
    """
    entries = footprint.entries
    master = itemsize < 4
    match optimizer:
        case "adamw":
            return 2 * itemsize * entries
        case "adamw-fp32":
            return (12 if master else 8) * entries
        case "adamw-8bit":
            return 2 * entries + 2 * 4 * (entries // 256)
    tiles = entries // TILE + footprint.tensors
    # position, moments, age and gradient of an active entry, its master value; scratch to append
    return (20 + (4 if master else 0) + 8) * budget + 24 * tiles


def footprint_of(model: torch.nn.Module, inputs: dict[str, Tensor], layers: int) -> Footprint:
    """Count a model on the meta device.

    Args:
        model: on the meta device, in training mode.
        inputs: of its forward pass, labels included; also on meta.
        layers: 0, or switch checkpointing on and recompute one of so many layers at a time.
    """
    params = {id(param): param for param in model.parameters() if param.requires_grad}
    owned = {param.untyped_storage()._cdata for param in model.parameters()}
    saved, recomputed = sum(_saved(model, inputs, owned)), 0
    if layers:
        recomputed = saved // layers
        with warnings.catch_warnings():  # transformers renames the method
            warnings.simplefilter("ignore", FutureWarning)
            model.gradient_checkpointing_enable()  # type: ignore[operator]
        saved = sum(_saved(model, inputs, owned))
    return Footprint(
        entries=sum(param.numel() for param in params.values()),
        tensors=len(params),
        weights=sum(param.nbytes for param in model.parameters()),
        gradients=sum(param.nbytes for param in params.values()),
        two_gradients=sum(sorted(param.nbytes for param in params.values())[-2:]),
        activations=saved,
        recomputed=recomputed,
    )


def _saved(model: torch.nn.Module, inputs: dict[str, Tensor], owned: set[int]) -> list[int]:
    """Bytes of each storage that autograd saves in a forward pass, parameters left out."""
    saved: dict[int, Any] = {}  # storages are kept, so that none is counted under another's address

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in owned:
            saved[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(**inputs)
    return [storage.nbytes() for storage in saved.values()]


def estimates(
    footprint: Footprint, itemsize: int, budget: int, optimizers: Sequence[str] = OPTIMIZERS
) -> list[Estimate]:
    """One estimate for each optimizer."""
    return [
        Estimate(name, state_bytes(name, footprint, itemsize, budget), footprint)
        for name in optimizers
    ]

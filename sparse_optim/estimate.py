"""Memory of fine-tuning, from a model's config alone: nothing is loaded, nothing is allocated.

    held = weights + optimizer state
    peak = held + the most that forward and backward hold at once

Both passes run on fake tensors, which have shapes and devices but no memory, and every storage that
an operation returns is counted while it lives: activations, temporaries (of a language model's
loss, for one) and gradients as they come; with `fuse_backward=True` each is freed at once. On the
CPU that is within 1% to 8% of measured steps (tests/test_estimate.py); on a GPU it is unmeasured.
Left out: work space within a kernel, and on a GPU the CUDA context (0.3 to 0.6 GiB), cuBLAS's work
space (8 to 32 MiB a stream), the allocator's rounding (to 512 bytes, of segments to 2 or 20 MiB)
and fragmentation: `fits` sets MARGIN aside for them. Operations are chosen as on a CPU; attention
with dropout keeps its matrices there, not on a GPU, where the figure is then an upper one.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

GIB = 1 << 30
# Nominal device memory, bytes.
GPUS = {
    "l4": 24 * GIB, "rtx4090": 24 * GIB, "a6000": 48 * GIB, "a100-40": 40 * GIB,
    "a100": 80 * GIB, "h100": 80 * GIB, "h200": 140 * GIB,
}  # fmt: skip
OPTIMIZERS = ("adamw", "adamw-fp32", "adamw-8bit", "sparse", "in-backward")
MARGIN = GIB  # of a GPU's memory: for what the estimate leaves out, and 5% for fragments
TILE = 4096  # of the GPU backends; 16 bytes of work space each, or a little more


@dataclass(frozen=True)
class Footprint:
    """A model's own bytes, whichever the optimizer.

    Attributes:
        entries, tensors: trainable scalars, and the tensors that hold them.
        weights: bytes of parameters and buffers.
        step: the most that forward and backward hold at once besides, gradients included.
        step_in_backward: the same, each gradient being freed as soon as it is there.
    """

    entries: int
    tensors: int
    weights: int
    step: int
    step_in_backward: int


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
    def step(self) -> int:
        """Gradients, activations and temporaries, the most at once."""
        model = self.footprint
        return model.step_in_backward if self.optimizer == "in-backward" else model.step

    @property
    def peak(self) -> int:
        """In the second step or a later one."""
        return self.held + self.step

    def fits(self, memory: int) -> str:
        """Whether a GPU of so many bytes holds it: "yes", "NO", or "tight" within the margin."""
        if self.peak > memory:
            return "NO"
        return "yes" if 1.05 * self.peak + MARGIN <= memory else "tight"


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


def footprint_of(build: Callable[[], tuple[torch.nn.Module, dict[str, Tensor]]]) -> Footprint:
    """Count a model on fake tensors.

    Args:
        build: makes the model, in training mode, and the inputs of a forward pass that returns a
            `loss`. What it makes has no memory.
    """
    with FakeTensorMode():
        model, inputs = build()
        trained = [param for param in model.parameters() if param.requires_grad]
        step = _step_bytes(model, inputs)
        for param in trained:
            param.grad = None
            param.register_post_accumulate_grad_hook(_free_grad)
        step_in_backward = _step_bytes(model, inputs)
    held = [*model.parameters(), *model.buffers()]
    return Footprint(
        entries=sum(param.numel() for param in trained),
        tensors=len(trained),
        weights=sum(tensor.nbytes for tensor in held),
        step=step,
        step_in_backward=step_in_backward,
    )


def _free_grad(param: Tensor) -> None:
    param.grad = None


def _step_bytes(model: torch.nn.Module, inputs: dict[str, Tensor]) -> int:
    """The most that a forward and a backward pass hold at once."""
    with _Live([*model.parameters(), *model.buffers(), *inputs.values()]) as live:
        model(**inputs).loss.backward()
    return live.peak


class _Live(TorchDispatchMode):
    """Counts the bytes of storages that operations return, as long as these live."""

    def __init__(self, known: Sequence[Tensor]) -> None:
        super().__init__()
        self.peak = self._now = 0
        # By address: storages known before live longer, and others leave as they die.
        self._known = {tensor.untyped_storage()._cdata for tensor in known}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        returned = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(returned):
            if isinstance(leaf, Tensor):
                self._count(leaf.untyped_storage())
        return returned

    def _count(self, storage: torch.UntypedStorage) -> None:
        address, size = storage._cdata, storage.nbytes()
        if address in self._known:
            return
        self._known.add(address)
        self._now += size
        self.peak = max(self.peak, self._now)
        weakref.finalize(storage, self._forget, address, size)

    def _forget(self, address: int, size: int) -> None:
        self._known.discard(address)
        self._now -= size


def estimates(
    footprint: Footprint, itemsize: int, budget: int, optimizers: Sequence[str] = OPTIMIZERS
) -> list[Estimate]:
    """One estimate for each optimizer."""
    return [
        Estimate(name, state_bytes(name, footprint, itemsize, budget), footprint)
        for name in optimizers
    ]

"""Memory of fine-tuning by optimizer, from the footprint of a model (`sparse_optim.footprint`).

    held = weights + optimizer state
    peak = held + the most that forward and backward hold at once

Left out: work space within a kernel, and on a GPU the CUDA context (0.3 to 0.6 GiB), cuBLAS's work
space (8 to 32 MiB a stream), the allocator's rounding (to 512 bytes, of segments to 2 or 20 MiB)
and fragmentation: `fits` sets MARGIN aside for them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

GIB = 1 << 30
# Nominal device memory, bytes.
GPUS = {
    "l4": 24 * GIB, "rtx4090": 24 * GIB, "a6000": 48 * GIB, "a100-40": 40 * GIB,
    "a100": 80 * GIB, "h100": 80 * GIB, "h200": 140 * GIB,
}  # fmt: skip
OPTIMIZERS = ("adamw", "adamw-fp32", "adamw-8bit", "sparse", "in-backward", "sampled")
MARGIN = GIB  # kept free on a GPU for what the estimate leaves out, beside 5% for fragments
TILE = 4096  # entries, on the GPU backends; a tile takes 16 bytes of work space, or a little more


@dataclass(frozen=True)
class Footprint:
    """Bytes that a model takes with any optimizer.

    Attributes:
        entries, tensors: trainable scalars, and the tensors that hold them.
        weights: bytes of parameters and buffers.
        step: the most that forward and backward hold at once besides, gradients included.
        step_in_backward: the same, if each gradient is freed as soon as it is computed.
        step_sampled: the same again, if layers compute no weight gradients.
    """

    entries: int
    tensors: int
    weights: int
    step: int
    step_in_backward: int
    step_sampled: int


@dataclass(frozen=True)
class Estimate:
    """Bytes of a training step with one optimizer."""

    optimizer: str
    state: int
    footprint: Footprint

    @property
    def held(self) -> int:
        """Bytes between steps, with gradients set to None."""
        return self.footprint.weights + self.state

    @property
    def step(self) -> int:
        """Bytes of gradients, activations and temporaries, the most at once."""
        model = self.footprint
        steps = {"in-backward": model.step_in_backward, "sampled": model.step_sampled}
        return steps.get(self.optimizer, model.step)

    @property
    def peak(self) -> int:
        """Bytes at the peak of the second step or a later one."""
        return self.held + self.step

    def fits(self, memory: int) -> str:
        """Whether a GPU with `memory` bytes holds it: "yes", "NO", or "tight" within the margin."""
        if self.peak > memory:
            return "NO"
        return "yes" if 1.05 * self.peak + MARGIN <= memory else "tight"


def state_bytes(optimizer: str, footprint: Footprint, itemsize: int, budget: int) -> int:
    """Bytes of optimizer state.

    Args:
        optimizer: "adamw" (moments in the parameters' dtype), "adamw-fp32" (float32 moments, and
            master values of parameters of 16 bits), "adamw-8bit" (moments of a byte, float32 scales
            for blocks of 256), "sparse" (this package), "in-backward" (the same, with
            `fuse_backward=True`) or "sampled" (with `sampled_backward=True`, on steps that unmask
            nothing: all of a set that needs no data; other runs peak at the steps that unmask).
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
    # position, moments, age and gradient of an active entry, its master value; scratch to append,
    # or its sampled gradient
    return (20 + (4 if master else 0) + 8) * budget + 24 * tiles


def estimates(
    footprint: Footprint, itemsize: int, budget: int, optimizers: Sequence[str] = OPTIMIZERS
) -> list[Estimate]:
    """One estimate for each optimizer."""
    return [
        Estimate(name, state_bytes(name, footprint, itemsize, budget), footprint)
        for name in optimizers
    ]

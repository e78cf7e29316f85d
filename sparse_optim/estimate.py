"""Memory of fine-tuning by optimizer, from the footprint of a model (`sparse_optim.footprint`).

    held = weights + optimizer state
    peak = held + the most that forward and backward hold at once

Left out: work space within a kernel, and on a GPU the CUDA context (0.3 to 0.6 GiB), cuBLAS's work
space (8 to 32 MiB a stream), the allocator's rounding (to 512 bytes, of segments to 2 or 20 MiB)
and fragmentation: `fits` sets MARGIN aside for them.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

GIB = 1 << 30
# Nominal device memory, GiB; of cards that are sold in GB (H200, B200) what is there in GiB.
GPUS = {
    "t4": 16, "v100": 16, "v100-32": 32,
    "l4": 24, "a10": 24, "a10g": 24, "a30": 24, "a40": 48, "l40": 48, "l40s": 48,
    "rtx3090": 24, "rtx4070": 12, "rtx4080": 16, "rtx4090": 24, "rtx5080": 16, "rtx5090": 32,
    "a4000": 16, "a5000": 24, "a6000": 48, "rtx6000-ada": 48, "rtx-pro-6000": 96,
    "a100-40": 40, "a100": 80, "a100-80": 80, "h100": 80, "h100-nvl": 94, "gh200": 96,
    "h200": 140, "b200": 179, "mi300x": 192,
}  # fmt: skip
# Sizes in names that are not the GiB above: of H200 and B200 in GB, of a GH200 that of its CPU.
PRINTED = {"h200": 141, "b200": 180, "gh200": 480}
# What nvidia-smi and shops add to the name of a card.
EXTRAS = re.compile(
    r"[\s_-]|nvidia|geforce|amd|instinct|rtx|quadro|tesla|blackwell|generation"
    r"|(server|workstation) edition|sxm\d?|pcie|hbm\d?e?"
)
SIZE = re.compile(r"(\d+(?:\.\d+)?)(gib|gb|g)?")
OPTIMIZERS = (
    *("adamw", "adamw-fp32", "adamw-8bit"),
    *("sparse", "in-backward", "sampled"),
    *("lora", "qlora"),
)
# How the step of an optimizer is counted, where it is not the plain one.
WAYS = {name: name for name in ("in-backward", "sampled", "lora", "qlora")}
PLAIN = "plain"
LARGEST = 1 << 20  # examples: the search for the largest batch ends there
MARGIN = GIB  # kept free on a GPU for what the estimate leaves out, beside 5% for fragments
TILE = 4096  # entries, on the GPU backends; a tile takes 16 bytes of work space, or a little more


@dataclass(frozen=True)
class Footprint:
    """Bytes that a model takes with a way of training it.

    Attributes:
        entries, tensors: trainable scalars, and the tensors that hold them.
        weights: bytes of parameters and buffers.
        step: the most that forward and backward hold at once besides, gradients included.
    """

    entries: int
    tensors: int
    weights: int
    step: int


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
    def peak(self) -> int:
        """Bytes at the peak of the second step or a later one."""
        return self.held + self.footprint.step

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
            `fuse_backward=True`), "sampled" (with `sampled_backward=True`, on steps that unmask
            nothing: all of a set that needs no data; other runs peak at the steps that unmask),
            "lora" or "qlora" (AdamW on adapters, which peft keeps in float32).
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
        case "lora" | "qlora":
            return 8 * entries
    tiles = entries // TILE + footprint.tensors
    # position, moments, age and gradient of an active entry, its master value; scratch to append,
    # or its sampled gradient
    return (20 + (4 if master else 0) + 8) * budget + 24 * tiles


def estimate_of(optimizer: str, footprint: Footprint, itemsize: int, budget: int) -> Estimate:
    """The estimate of one optimizer, from the footprint of its way of training."""
    return Estimate(optimizer, state_bytes(optimizer, footprint, itemsize, budget), footprint)


def gpu_bytes(name: str) -> int | None:
    """Bytes of a card's device memory, or of a size; None if it is neither.

    Args:
        name: a key of GPUS in any case and with any separators, also as nvidia-smi prints it: with
            maker, form (SXM4, PCIe), kind of memory and size ("NVIDIA H100 80GB HBM3"); or a size
            in GiB ("48", "48GiB") or 10^9 bytes ("48GB").

    Examples:
        >>> gpu_bytes("RTX A6000") == gpu_bytes("48GiB") == 48 * 2**30
        True
    """
    known = {_plain(key): size * GIB for key, size in GPUS.items()}
    plain = _plain(name)
    if plain in known:
        return known[plain]
    for key, memory in known.items():
        # A size beside the name of a card: it must be the card's.
        nominal = memory // GIB
        if plain in (f"{key}{nominal}", f"{key}{PRINTED.get(key, nominal)}"):
            return memory
    match = SIZE.fullmatch(name.lower().replace(" ", ""))
    if match is None:
        return None
    return round(float(match[1]) * (10**9 if match[2] == "gb" else GIB)) or None


def _plain(name: str) -> str:
    """The name without separators, makers, form, kind of memory and unit."""
    plain = EXTRAS.sub("", name.lower())
    return plain.removesuffix("gb")


def largest_batch(peak: Callable[[int], int], memory: int, batch: int) -> int:
    """The largest batch that `fits` calls "yes"; 0 if not even one example does.

    The peak is convex in the batch: the maximum of sums of tensors' sizes, which grow in proportion
    to it. So a line through two batches is above the peak between them and below it beyond them,
    and few further batches have to be counted.

    Args:
        peak: bytes at the peak, by batch.
        memory: bytes of the GPU.
        batch: a batch whose peak is known.
    """
    limit = int((memory - MARGIN) / 1.05)
    known = {each: peak(each) for each in (1, max(2, batch))}

    def meets(first: int, second: int) -> int:
        """The last batch at which the line through two batches is within the limit."""
        rise = known[second] - known[first]
        return first + (limit - known[first]) * (second - first) // rise if rise else LARGEST

    while True:
        fitting = sorted(each for each, size in known.items() if size <= limit)
        beyond = sorted(each for each, size in known.items() if size > limit)
        if not fitting:
            return 0
        low = fitting[-1]
        high = meets(*fitting[-2:]) if len(fitting) > 1 else LARGEST
        if beyond:
            low, high = meets(fitting[-1], beyond[0]), min(high, beyond[0] - 1)
        high = min(high, LARGEST)
        if low >= high:
            return min(low, LARGEST)
        guess = high if low in known else low
        known[guess] = peak(guess)

"""What the operations are handed, grouped as in csrc/core/pool.h: plain buffers, no behaviour of a
step.

Notation as in `reference`: S tensors in the pool, `num_tiles` tiles, `capacity` active entries.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import torch
from torch import Tensor

from sparse_optim.backends.targets import largest_quota

# How an entry's age is counted; see `reference.update`.
BiasCorrection = Literal["entry", "global"]

# Per-entry state, in the order in which it is stored in checkpoints.
ENTRY_FIELDS = ("position", "exp_avg", "exp_avg_sq", "unmask_step", "master")


@dataclass
class ActiveSet:
    """State of the active entries: at most `capacity`, in ascending global order.

    Attributes:
        position: (capacity,), int32, flat position within the entry's tensor.
        exp_avg, exp_avg_sq: (capacity,), float32, first and second moment.
        unmask_step: (capacity,), int32, applied step at which the entry was unmasked, from 1.
        master: (capacity,), float32 value of the entry; (0,) where every parameter is float32.
        grad: (capacity,), float32, this step's gradient, as `scan` and `append` leave it.
        offsets: (S + 1,), int64; the entries of tensor i are offsets[i]:offsets[i + 1].
        progress: (3,), int64: applied steps, active entries, skipped steps.

    20 bytes an entry in float32 models, 24 in others; 16 and 20 of them are state.
    """

    position: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    unmask_step: Tensor
    master: Tensor
    grad: Tensor
    offsets: Tensor
    progress: Tensor

    @staticmethod
    def empty(params: Sequence[Tensor], capacity: int, device: torch.device) -> ActiveSet:
        """Allocate an active set with room for `capacity` entries of `params`."""
        low_precision = any(param.dtype != torch.float32 for param in params)

        def zeros(size: int, dtype: torch.dtype) -> Tensor:
            return torch.zeros(size, dtype=dtype, device=device)

        return ActiveSet(
            position=zeros(capacity, torch.int32),
            exp_avg=zeros(capacity, torch.float32),
            exp_avg_sq=zeros(capacity, torch.float32),
            unmask_step=zeros(capacity, torch.int32),
            master=zeros(capacity if low_precision else 0, torch.float32),
            grad=zeros(capacity, torch.float32),
            offsets=zeros(len(params) + 1, torch.int64),
            progress=zeros(3, torch.int64),
        )

    def of_tensors(self, first: int, last: int) -> ActiveSet:
        """The same buffers, seen by an operation on tensors first to last - 1 alone."""
        return replace(self, offsets=self.offsets[first : last + 1])

    def segment(self, index: int) -> dict[str, Tensor]:
        """Per-entry state of tensor `index`, as views; empty for tensors added since."""
        known = index + 1 < self.offsets.numel()
        first, last = self.offsets[index : index + 2].tolist() if known else (0, 0)
        return {
            name: getattr(self, name)[first:last]
            for name in ENTRY_FIELDS
            if name != "master" or self.master.numel()
        }

    def clear(self, progress: Tensor) -> None:
        """Hold no entry, at the applied and skipped steps of `progress`."""
        self.offsets.zero_()
        self.progress.copy_(progress)
        self.progress[1] = 0

    def carry_over(self, before: ActiveSet, sizes: Tensor) -> None:
        """Entries that were also active in `before` take their state from there.

        Args:
            before: the set of another step, of the same capacity.
            sizes: (S,), int64, entries of each tensor.
        """
        index, old_index = self.global_index(sizes), before.global_index(sizes)
        if not (index.numel() and old_index.numel()):
            return
        source = torch.searchsorted(old_index, index).clamp(max=old_index.numel() - 1)
        kept = old_index[source] == index
        for name in ENTRY_FIELDS[1:]:
            values = getattr(self, name)[: index.numel()]
            if values.numel():
                values.copy_(torch.where(kept, getattr(before, name)[source], values))

    def global_index(self, sizes: Tensor) -> Tensor:
        """Global index of each active entry: (active,), int64, ascending."""
        starts = sizes.cumsum(0) - sizes
        count = int(self.progress[1])
        counts = self.offsets.diff()[: sizes.numel()]
        owner = torch.repeat_interleave(starts, counts, output_size=count)
        return owner + self.position[:count]

    def fill(self, segments: Sequence[dict[str, Tensor]], progress: Tensor) -> None:
        """Take over the segments of all S tensors, in order (what `segment` returned)."""
        counts = torch.tensor([0] + [segment["position"].numel() for segment in segments])
        self.offsets.copy_(counts.cumsum(0))
        total = int(self.offsets[-1])
        for name in ENTRY_FIELDS:
            target = getattr(self, name)
            if target.numel():
                target[:total] = torch.cat([segment[name].to(target) for segment in segments])
        self.progress.copy_(progress)


@dataclass
class Tiles:
    """Runs of consecutive entries of one tensor, and what bounds the importance of each.

    Attributes:
        size: entries in a tile; the last of a tensor may hold fewer.
        offsets: (S + 1,), int64; the tiles of tensor i are offsets[i]:offsets[i + 1].
        max: (num_tiles,), int32, bits of the largest |grad| or score among its frozen entries.
        param_bound: (num_tiles,), float32, largest |param|; (0,) unless D3's exp < 0 needs it.
    """

    size: int
    offsets: Tensor
    max: Tensor
    param_bound: Tensor

    @staticmethod
    def empty(params: Sequence[Tensor], size: int, bounded: bool, device: torch.device) -> Tiles:
        """Allocate the tiles of `params`; `bounded` keeps the largest |param| of each."""
        counts = torch.tensor([0] + [-(-param.numel() // size) for param in params])
        total = int(counts.sum())
        return Tiles(
            size=size,
            offsets=counts.cumsum(0).to(device),
            max=torch.zeros(total, dtype=torch.int32, device=device),
            param_bound=torch.zeros(total if bounded else 0, dtype=torch.float32, device=device),
        )

    def of_tensors(self, first: int, last: int, tiles: slice) -> Tiles:
        """Those of tensors first to last - 1, views; `tiles` says which they are."""
        offsets = self.offsets[first : last + 1]
        return Tiles(self.size, offsets - offsets[:1], self.max[tiles], self.param_bound[tiles])


@dataclass(frozen=True)
class Rule:
    """How `cut` ranks.

    Attributes:
        exp, eps: of D3; exp = 0 ranks what is bound as it is.
        noise: (2,), int64: seed and step of the noise that samples; (0,) does not sample.
    """

    exp: float
    eps: float
    noise: Tensor


@dataclass
class NewEntries:
    """Entries that `cut` found, in global order.

    Attributes:
        tensor: (max_quota,), int32, index of the entry's tensor in the pool.
        position: (max_quota,), int32, flat position within it.
        count: (), int64, how many there are.
        threshold: (), float32, least importance among the last ones found.
    """

    tensor: Tensor
    position: Tensor
    count: Tensor
    threshold: Tensor

    @staticmethod
    def empty(max_quota: int, device: torch.device) -> NewEntries:
        """Allocate room for the entries of one step."""
        return NewEntries(
            tensor=torch.zeros(max_quota, dtype=torch.int32, device=device),
            position=torch.zeros(max_quota, dtype=torch.int32, device=device),
            count=torch.zeros((), dtype=torch.int64, device=device),
            threshold=torch.zeros((), dtype=torch.float32, device=device),
        )


@dataclass
class StepScalars:
    """The numbers of one step, on the device.

    Attributes:
        grad_scale: (), float32, the loss scale that the gradients carry; 1 without loss scaling.
        found_inf: (), float32, 1 if any gradient is infinite or NaN.
        grad_norm: (), float64, global norm of the unscaled gradients before clipping.
        grad_factor: (), float32, what `update` multiplies gradients by.
        hyper: (num_groups, 6), float64: lr, beta1, beta2, eps, weight_decay, sign of the gradient.
        group_index: (S,), int32, row of `hyper` of each tensor.
        arrived: (), int32, blocks of a kernel that are done; 0 between kernels.
    """

    grad_scale: Tensor
    found_inf: Tensor
    grad_norm: Tensor
    grad_factor: Tensor
    hyper: Tensor
    group_index: Tensor
    arrived: Tensor

    @staticmethod
    def empty(group_index: Sequence[int], num_groups: int, device: torch.device) -> StepScalars:
        """Allocate the numbers of a step."""
        return StepScalars(
            grad_scale=torch.ones((), dtype=torch.float32, device=device),
            found_inf=torch.zeros((), dtype=torch.float32, device=device),
            grad_norm=torch.zeros((), dtype=torch.float64, device=device),
            grad_factor=torch.ones((), dtype=torch.float32, device=device),
            hyper=torch.zeros(num_groups, 6, dtype=torch.float64, device=device),
            group_index=torch.tensor(group_index, dtype=torch.int32, device=device),
            arrived=torch.zeros((), dtype=torch.int32, device=device),
        )


def max_quota(targets: Tensor, capacity: int, every: int = 1) -> int:
    """Entries that one step may unmask: twice the largest regular quota, at most `capacity`.

    The factor leaves room to make up for steps that found too few entries of non-zero importance.

    Args:
        every: steps from one that unmasks to the next.
    """
    return min(2 * largest_quota(targets, every), capacity)


def num_bytes(*owners: Any) -> int:
    """Bytes of all tensors that these dataclasses hold, each counted once."""
    return sum(
        {id(tensor): tensor.nbytes for owner in owners for tensor in _tensors(owner)}.values()
    )


def _tensors(owner: Any) -> Iterator[Tensor]:
    for field in fields(owner):
        value = getattr(owner, field.name)
        if isinstance(value, Tensor):
            yield value
        elif hasattr(value, "__dataclass_fields__"):
            yield from _tensors(value)

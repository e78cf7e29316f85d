"""The buffers of an optimizer: state of the active entries, and work space of the step."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

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
        offsets: (S + 1,), int64; entries of tensor i stand at offsets[i]:offsets[i + 1].
        progress: (3,), int64: applied steps, active entries, skipped steps.

    16 bytes an entry in float32 models, 20 in others.
    """

    position: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    unmask_step: Tensor
    master: Tensor
    offsets: Tensor
    progress: Tensor

    @staticmethod
    def empty(params: Sequence[Tensor], capacity: int, device: torch.device) -> ActiveSet:
        """Allocate an active set with room for `capacity` entries of `params`."""
        low_precision = any(param.dtype != torch.float32 for param in params)
        return ActiveSet(
            position=torch.zeros(capacity, dtype=torch.int32, device=device),
            exp_avg=torch.zeros(capacity, dtype=torch.float32, device=device),
            exp_avg_sq=torch.zeros(capacity, dtype=torch.float32, device=device),
            unmask_step=torch.zeros(capacity, dtype=torch.int32, device=device),
            master=torch.zeros(
                capacity if low_precision else 0, dtype=torch.float32, device=device
            ),
            offsets=torch.zeros(len(params) + 1, dtype=torch.int64, device=device),
            progress=torch.zeros(3, dtype=torch.int64, device=device),
        )

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
        """Entries that were active in `before`, too, take their state from there.

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


class Touched:
    """Every entry that was ever active, where entries leave the active set again.

    Sets are merged when as many are waiting as are merged already, so that a step costs no more
    than its own set: at most 16 bytes for each entry ever active, and those of one step.
    """

    def __init__(self, index: Tensor) -> None:
        self._merged = index
        self._waiting: list[Tensor] = []

    def add(self, index: Tensor) -> None:
        """Note the global indices, (n,) int64, of a step's set."""
        self._waiting.append(index)
        if sum(part.numel() for part in self._waiting) >= self._merged.numel():
            self._merge()

    def index(self) -> Tensor:
        """Global indices, (n,), int64, ascending, each once."""
        self._merge()
        return self._merged

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self._merged.nbytes + sum(part.nbytes for part in self._waiting)

    def _merge(self) -> None:
        if self._waiting:
            self._merged = torch.cat([self._merged, *self._waiting]).unique()
            self._waiting = []


@dataclass
class WorkSpace:
    """What the operations write besides the state; allocated once, sized for the greatest quota.

    Attributes: see `reference.bind`, `scan`, `clip`, `cut` and `update`, whose arguments these are.
    """

    table: Tensor
    tile_offsets: Tensor
    tile_max: Tensor
    param_bound: Tensor
    active_grad: Tensor
    new_tensor: Tensor
    new_position: Tensor
    new_count: Tensor
    threshold: Tensor
    norms: Tensor
    grad_norm: Tensor
    grad_factor: Tensor
    grad_scale: Tensor
    found_inf: Tensor
    hyper: Tensor
    group_index: Tensor
    scratch: Tensor

    @staticmethod
    def empty(
        params: Sequence[Tensor],
        num_dense: int,
        group_index: Sequence[int],
        num_groups: int,
        capacity: int,
        max_quota: int,
        tile: int,
        bounded: bool,
        scratch_bytes: int,
        device: torch.device,
    ) -> WorkSpace:
        """Allocate the work space for `params`, whose hyper-parameters stand in row group_index[i],
        beside num_dense tensors that are trained densely.

        `bounded` keeps the greatest |param| of each tile, which importances with exp < 0 need.
        """
        tiles = torch.tensor([0] + [-(-param.numel() // tile) for param in params])
        num_tiles = int(tiles.sum())
        return WorkSpace(
            table=torch.zeros(len(params), 4, dtype=torch.int64, device=device),
            tile_offsets=tiles.cumsum(0).to(device),
            tile_max=torch.zeros(num_tiles, dtype=torch.int32, device=device),
            param_bound=torch.zeros(
                num_tiles if bounded else 0, dtype=torch.float32, device=device
            ),
            active_grad=torch.zeros(capacity, dtype=torch.float32, device=device),
            new_tensor=torch.zeros(max_quota, dtype=torch.int32, device=device),
            new_position=torch.zeros(max_quota, dtype=torch.int32, device=device),
            new_count=torch.zeros((), dtype=torch.int64, device=device),
            threshold=torch.zeros((), dtype=torch.float32, device=device),
            norms=torch.zeros(len(params) + num_dense, dtype=torch.float64, device=device),
            grad_norm=torch.zeros((), dtype=torch.float64, device=device),
            grad_factor=torch.ones((), dtype=torch.float32, device=device),
            grad_scale=torch.ones((), dtype=torch.float32, device=device),
            found_inf=torch.zeros((), dtype=torch.float32, device=device),
            hyper=torch.zeros(num_groups, 6, dtype=torch.float64, device=device),
            group_index=torch.tensor(group_index, dtype=torch.int32, device=device),
            scratch=torch.zeros(scratch_bytes, dtype=torch.uint8, device=device),
        )


def max_quota(targets: Tensor, capacity: int) -> int:
    """Entries that one step may unmask: twice the greatest regular quota, at most `capacity`.

    The factor leaves room to make up for steps that found too few entries of non-zero importance.
    """
    return min(2 * int(targets.diff().max()), capacity)


def num_bytes(*owners: Any) -> int:
    """Bytes of all tensors that these dataclasses hold."""
    return sum(tensor.nbytes for owner in owners for tensor in _tensors(owner))


def _tensors(owner: Any) -> Iterable[Tensor]:
    return (getattr(owner, field.name) for field in fields(owner))

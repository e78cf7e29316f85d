"""The best frozen entries among the gradients seen so far in a step: an exact running top-k.

    candidates  <- candidates + best of the new gradients
    floor       <- the quota-th greatest importance so far, once there are so many

The best of a union are among the best of its parts, so that nothing is lost when a gradient is
freed after its own best entries were taken. A tile whose bound is below the floor holds none of
them. Candidates are cut by the backend's own `cut`, as the entries of one tensor in global order:
importances and ties are those of an ordinary step bit for bit.

16 to 20 bytes a candidate, of which there are at most four times the greatest quota and those of
one more batch. Nothing waits for the device: there, slots that were not filled hold zero gradients.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from sparse_optim.backends import scoring
from sparse_optim.backends.operands import WorkSpace
from sparse_optim.policy.importance import D3
from sparse_optim.policy.schedule import step_quota

# Units in the last place that bounds are raised by: `pow` is neither exact nor monotone.
POW_MARGIN = 16


class Candidates:
    """Entries that may be unmasked at the end of this step.

    Args:
        ops: the backend.
        importance: D3; exp 0 where scores are given in place of gradients.
        work: whose `new_tensor`, `new_position` and `new_count` are used as `cut` uses them.
        sizes: entries of each tensor of the pool.
        targets, progress: as in `reference.cut`.
    """

    def __init__(
        self,
        ops: Any,
        importance: D3,
        work: WorkSpace,
        sizes: Sequence[int],
        targets: Tensor,
        progress: Tensor,
    ) -> None:
        device = work.table.device
        self._ops, self._importance, self._work = ops, importance, work
        self._targets, self._progress = targets, progress
        self._max_quota = work.new_position.numel()
        self._most = 4 * self._max_quota
        self._on_host = device.type == "cpu"
        self._starts = torch.tensor([0, *sizes], dtype=torch.int64).cumsum(0)[:-1].to(device)
        self._slots = torch.arange(0 if self._on_host else self._max_quota, device=device)
        self._nothing = torch.zeros(1, dtype=torch.int64, device=device)
        self._table = torch.zeros(1, work.table.size(1), dtype=torch.int64, device=device)
        self._noise = torch.empty(0, dtype=torch.int64, device=device)
        self._least = torch.zeros((), dtype=torch.float32, device=device)
        most = self._most + self._max_quota
        size = ops.scratch_bytes(-(-most // ops.TILE), 0, self._max_quota)
        self._scratch = torch.zeros(size, dtype=torch.uint8, device=device)
        self.begin()

    def begin(self) -> None:
        """Prepare for a step."""
        self.clear()
        self._quota = step_quota(self._targets, self._progress, self._max_quota)
        self._floor = torch.ones((), dtype=torch.int32, device=self._least.device)

    def clear(self) -> None:
        """Forget all candidates."""
        self._index: list[Tensor] = []
        self._grad: list[Tensor] = []
        self._param: list[Tensor] = []
        self._score: list[Tensor] = []

    @property
    def wanted(self) -> bool:
        """Whether entries are to be unmasked in this step, as far as the host knows."""
        return not self._on_host or int(self._quota) > 0

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        lists = (self._index, self._grad, self._param, self._score)
        parts = [self._starts, self._slots, self._scratch, *chain.from_iterable(lists)]
        return sum(part.nbytes for part in parts)

    def hopeful(self, tile_max: Tensor, param_bound: Tensor) -> Tensor | None:
        """tile_max of tiles that may hold an entry that reaches the floor, 0 for the others.

        None where the host sees that there is no such tile: the tensors need not be added.
        """
        bound = tile_max
        if self._importance.exp != 0:
            magnitude = tile_max.view(torch.float32)
            param = param_bound if param_bound.numel() else torch.zeros_like(magnitude)
            score = scoring.importance(magnitude, param, self._importance.exp, self._importance.eps)
            bound = scoring.importance_key(score)
            bound = torch.where(bound > 0, bound + POW_MARGIN, 0)
        reach = bound >= self._floor
        if self._on_host and not reach.any():
            return None
        return torch.where(reach, tile_max, 0)

    def add(
        self,
        first: int,
        grads: Sequence[Tensor],
        scores: Sequence[Tensor] | None,
        params: Sequence[Tensor],
        tile_max: Tensor,
        param_bound: Tensor,
        tile_offsets: Tensor,
        position: Tensor,
        offsets: Tensor,
        found_inf: Tensor,
    ) -> None:
        """Take the best entries of consecutive tensors of the pool.

        Args:
            first: index of the first in the pool.
            grads, params: as in `reference.bind`, none missing.
            scores: to rank by, shaped as the gradients; None ranks gradients by D3.
            tile_max: of their tiles, as `hopeful` returned it.
            param_bound: of their tiles; see `reference.cut`.
            tile_offsets, position, offsets, found_inf: as in `reference.cut`, of these tensors.
        """
        rows = self._work.table[first : first + len(grads)]
        bound = self._ops.bind(grads if scores is None else scores, params, rows)
        self._cut(
            bound, position, offsets, tile_offsets, tile_max, param_bound, found_inf, self._least,
            self._work.scratch,
        )  # fmt: skip
        index = self._starts[first + self._filled(self._work.new_tensor).long()]
        if not index.numel():
            return
        index += self._filled(self._work.new_position)
        local = index - self._starts[first]
        self._index.append(index)
        self._grad.append(self._filled(_flat(grads)[local].float()))
        if self._importance.exp != 0:
            self._param.append(_flat(params)[local].float())
        if scores is not None:
            self._score.append(self._filled(_flat(scores)[local].float()))
        self._raise_floor()
        if sum(part.numel() for part in self._index) > self._most:
            self._keep_best(found_inf)

    def winners(self, found_inf: Tensor, threshold: Tensor) -> Tensor:
        """Write the step's new entries to the work space, as `cut` does.

        Args:
            found_inf: (), float32; 1 unmasks nothing.
            threshold: (), float32, least importance among the new entries. Mutated if there is one.

        Returns:
            their gradients, float32, in order; on a GPU followed by zeros.
        """
        self._work.new_count.zero_()
        if not self._index:
            return self._least.new_empty(0)
        self._keep_best(found_inf, threshold)
        index = self._index[0]
        tensor = torch.searchsorted(self._starts, index, right=True) - 1
        self._work.new_tensor[: index.numel()] = tensor.int()
        self._work.new_position[: index.numel()] = (index - self._starts[tensor]).int()
        return self._grad[0]

    def _cut(
        self, bound: Any, position: Tensor, offsets: Tensor, tile_offsets: Tensor,
        tile_max: Tensor, param_bound: Tensor, found_inf: Tensor, threshold: Tensor,
        scratch: Tensor,
    ) -> None:  # fmt: skip
        work, importance = self._work, self._importance
        self._ops.cut(
            bound, position, offsets, tile_offsets, tile_max, param_bound, self._targets,
            self._progress, found_inf, importance.exp, importance.eps, self._noise,
            self._ops.TILE, work.new_tensor, work.new_position, work.new_count, threshold, scratch,
        )  # fmt: skip

    def _keep_best(self, found_inf: Tensor, threshold: Tensor | None = None) -> None:
        """Reduce the candidates to the best, in global order."""
        index, order = torch.cat(self._index).sort()
        if not index.numel():
            self._work.new_count.zero_()
            return
        grad = torch.cat(self._grad)[order]
        score = torch.cat(self._score)[order] if self._score else grad
        param = torch.cat(self._param)[order] if self._param else score
        tile_max = scoring.tile_abs_max(score, self._ops.TILE).view(torch.int32)
        param_bound = param.new_empty(0)
        if self._importance.exp < 0:
            param_bound = scoring.tile_abs_max(param, self._ops.TILE)
        tiles = tile_max.numel()
        self._cut(
            self._ops.bind([score], [param], self._table), order[:0].int(),
            self._nothing.expand(2).contiguous(),
            torch.arange(0, tiles + 1, tiles, device=index.device), tile_max, param_bound,
            found_inf, self._least, self._scratch,
        )  # fmt: skip
        self._raise_floor()
        if threshold is not None:
            threshold.copy_(torch.where(self._work.new_count > 0, self._least, threshold))
        best = self._filled(self._work.new_position[: index.numel()]).long()
        self._index, self._grad = [index[best]], [self._filled(grad[best])]
        self._param = [param[best]] if self._param else []
        self._score = [self._filled(score[best])] if self._score else []

    def _filled(self, values: Tensor) -> Tensor:
        """The first `new_count` of what a cut wrote; on a GPU all, with 0 in the others' place."""
        count = self._work.new_count
        if self._on_host:
            return values[: int(count)]
        return torch.where(self._slots[: values.numel()] < count, values, 0)

    def _raise_floor(self) -> None:
        """The least of as many entries as are wanted: nothing below it can be among the best."""
        enough = self._work.new_count >= self._quota
        least = self._least.view(torch.int32)
        self._floor = torch.where(enough, torch.maximum(self._floor, least), self._floor)


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    """Their entries one after the other; of one tensor, a view."""
    flat = [tensor.detach().view(-1) for tensor in tensors]
    return flat[0] if len(flat) == 1 else torch.cat(flat)

"""The best frozen entries among the gradients seen so far in a step: an exact running top-k.

    candidates  <- candidates + best of the new gradients
    floor       <- the quota-th largest importance so far, once there are that many

The best of a union are among the best of its parts, so that nothing is lost when a gradient is
freed after its own best entries were taken. A tile whose bound is below the floor holds none of
them. Candidates are cut by the backend's own `cut`, as the entries of one tensor in global order:
importances and ties are those of an ordinary step bit for bit.

16 to 20 bytes a candidate, of which there are at most four times the largest quota and those of
one more batch. Nothing waits for the device: there, slots that were not filled hold zero gradients.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from sparse_optim.backends import scoring
from sparse_optim.backends.operands import ActiveSet, NewEntries, Tiles
from sparse_optim.engine.engine import Engine

# Units in the last place that bounds are raised by: `pow` is neither exact nor monotone.
POW_MARGIN = 16


class Candidates:
    """Entries that may be unmasked at the end of this step.

    Args:
        engine: whose schedule and rule count, and whose `work.new` is used as `cut` uses it.
    """

    def __init__(self, engine: Engine) -> None:
        device = engine.pool.device
        self._ops, self._engine = engine.ops, engine
        # Noise, if there is any, is in the scores already.
        self._rule = replace(engine.ranking.rule, noise=engine.ranking.rule.noise[:0])
        least = torch.zeros((), dtype=torch.float32, device=device)
        self._new = replace(engine.work.new, threshold=least)
        self._max_quota = self._new.position.numel()
        self._most = 4 * self._max_quota
        self._on_host = device.type == "cpu"
        sizes = engine.pool.sizes
        self._starts = sizes.cumsum(0) - sizes
        self._slots = torch.arange(0 if self._on_host else self._max_quota, device=device)
        self._nothing = torch.zeros(2, dtype=torch.int64, device=device)
        self._table = torch.zeros(1, engine.work.table.size(1), dtype=torch.int64, device=device)
        most = self._most + self._max_quota
        size = self._ops.scratch_bytes(-(-most // self._ops.TILE), 0, self._max_quota)
        self._scratch = torch.zeros(size, dtype=torch.uint8, device=device)
        self.begin()

    def begin(self) -> None:
        """Prepare for a step."""
        self.clear()
        progress, targets = self._engine.active.progress, self._engine.loud_targets
        self._quota = scoring.step_quota(targets, progress, self._max_quota)
        self._floor = torch.ones((), dtype=torch.int32, device=self._slots.device)

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

    def take(
        self,
        first: int,
        grads: Sequence[Tensor],
        scores: Sequence[Tensor] | None,
        tiles: Tiles,
        active: ActiveSet,
        found_inf: Tensor,
    ) -> None:
        """Let the entries of consecutive tensors of the pool compete.

        Args:
            first: index of the first in the pool.
            grads: theirs, none missing.
            scores: to rank by, shaped as the gradients; None ranks gradients by D3.
            tiles: theirs; scanned, or ranked by the scores.
            active: the active set of these tensors.
            found_inf: as in `reference.cut`.
        """
        reaching = self._reaching(tiles)
        if reaching is None:
            return
        params = self._engine.pool.params[first : first + len(grads)]
        rows = self._engine.work.table[first : first + len(grads)]
        bound = self._ops.bind(grads if scores is None else scores, params, rows)
        self._cut(bound, reaching, active, found_inf, self._engine.work.scratch)
        index = self._starts[first + self._filled(self._new.tensor).long()]
        if not index.numel():
            return
        index += self._filled(self._new.position)
        local = index - self._starts[first]
        self._index.append(index)
        self._grad.append(self._filled(_flat(grads)[local].float()))
        if self._rule.exp != 0:
            self._param.append(_flat(params)[local].float())
        if scores is not None:
            self._score.append(self._filled(_flat(scores)[local].float()))
        self._raise_floor()
        if sum(part.numel() for part in self._index) > self._most:
            self._keep_best(found_inf)

    def winners(self, found_inf: Tensor) -> Tensor:
        """Write the step's new entries to the engine's work space, as `cut` does.

        Args:
            found_inf: (), float32; 1 unmasks nothing.

        Returns:
            their gradients, float32, in order; on a GPU followed by zeros.
        """
        new = self._engine.work.new
        new.count.zero_()
        if not self._index:
            return self._new.threshold.new_empty(0)
        self._keep_best(found_inf, new)
        index = self._index[0]
        tensor = torch.searchsorted(self._starts, index, right=True) - 1
        new.tensor[: index.numel()] = tensor.int()
        new.position[: index.numel()] = (index - self._starts[tensor]).int()
        return self._grad[0]

    def _reaching(self, tiles: Tiles) -> Tiles | None:
        """The tiles, with a maximum of 0 where no entry can reach the floor.

        None where the host sees that there is no such tile.
        """
        bound, rule = tiles.max, self._rule
        if rule.exp != 0:
            magnitude, param = tiles.max.view(torch.float32), tiles.param_bound
            if not param.numel():
                param = torch.zeros_like(magnitude)
            score = scoring.importance(magnitude, param, rule.exp, rule.eps)
            bound = scoring.importance_key(score)
            bound = torch.where(bound > 0, bound + POW_MARGIN, 0)
        reach = bound >= self._floor
        if self._on_host and not reach.any():
            return None
        return replace(tiles, max=torch.where(reach, tiles.max, 0))

    def _cut(
        self, bound: Any, tiles: Tiles, active: ActiveSet, found_inf: Tensor, scratch: Tensor
    ) -> None:
        targets = self._engine.loud_targets
        self._ops.cut(bound, tiles, active, self._rule, targets, found_inf, self._new, scratch)

    def _keep_best(self, found_inf: Tensor, final: NewEntries | None = None) -> None:
        """Reduce the candidates to the best, in global order; `final` takes the threshold."""
        index, order = torch.cat(self._index).sort()
        if not index.numel():
            self._new.count.zero_()
            return
        grad = torch.cat(self._grad)[order]
        score = torch.cat(self._score)[order] if self._score else grad
        param = torch.cat(self._param)[order] if self._param else score
        tile, exp = self._ops.TILE, self._rule.exp
        tile_max = scoring.tile_abs_max(score, tile).view(torch.int32)
        tiles = Tiles(
            size=tile,
            offsets=torch.arange(0, tile_max.numel() + 1, tile_max.numel(), device=index.device),
            max=tile_max,
            param_bound=scoring.tile_abs_max(param, tile) if exp < 0 else param.new_empty(0),
        )
        # One tensor, of which no entry is active.
        none = replace(self._engine.active, position=order[:0].int(), offsets=self._nothing)
        bound = self._ops.bind([score], [param], self._table)
        self._cut(bound, tiles, none, found_inf, self._scratch)
        self._raise_floor()
        least, count = self._new.threshold, self._new.count
        if final is not None:
            final.threshold.copy_(torch.where(count > 0, least, final.threshold))
        best = self._filled(self._new.position[: index.numel()]).long()
        self._index, self._grad = [index[best]], [self._filled(grad[best])]
        self._param = [param[best]] if self._param else []
        self._score = [self._filled(score[best])] if self._score else []

    def _filled(self, values: Tensor) -> Tensor:
        """The first `count` of what a cut wrote; on a GPU all, with 0 in place of the others."""
        count = self._new.count
        if self._on_host:
            return values[: int(count)]
        return torch.where(self._slots[: values.numel()] < count, values, 0)

    def _raise_floor(self) -> None:
        """The least of as many entries as are wanted: nothing below it can be among the best."""
        enough = self._new.count >= self._quota
        least = self._new.threshold.view(torch.int32)
        self._floor = torch.where(enough, torch.maximum(self._floor, least), self._floor)


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    """Their entries one after the other; of one tensor, a view."""
    flat = [tensor.detach().view(-1) for tensor in tensors]
    return flat[0] if len(flat) == 1 else torch.cat(flat)

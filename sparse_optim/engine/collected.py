"""The best frozen entries among the gradients seen so far in a step, kept by the backend.

In place of `Candidates` where the backend offers it (CUDA, Triton): three to six launches a tensor,
instead of thirty to fifty. Same entries, same order, same threshold.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from sparse_optim.backends.operands import ActiveSet, Tiles
from sparse_optim.backends.registry import Collecting
from sparse_optim.engine.engine import Engine


def can_collect(engine: Engine) -> bool:
    """Whether the backend ranks gradients one at a time."""
    return hasattr(engine.ops, "collect")


class Collected:
    """Entries that may be unmasked at the end of this step; see `Candidates`.

    Args:
        engine: for which `can_collect` is true.
    """

    wanted = True  # as far as the host knows

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._ops = cast(Collecting, engine.ops)
        device = engine.pool.device
        self._max_quota = engine.work.new.position.numel()
        self._grad = torch.zeros(self._max_quota, dtype=torch.float32, device=device)
        size = self._ops.collected_bytes(self._max_quota)
        self._collected = torch.zeros(size, dtype=torch.uint8, device=device)
        self._any = False

    def begin(self) -> None:
        """Prepare for a step."""
        self.clear()
        engine = self._engine
        self._ops.collect_begin(
            engine.active, engine.loud_targets, self._max_quota, self._collected
        )

    def clear(self) -> None:
        """Forget all candidates."""
        self._any = False

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self._grad.nbytes + self._collected.nbytes

    def take(
        self,
        first: int,
        grads: Sequence[Tensor],
        scores: Sequence[Tensor] | None,
        tiles: Tiles,
        active: ActiveSet,
        found_inf: Tensor,
    ) -> None:
        """Let the entries of consecutive tensors compete; see `Candidates`.

        Their gradients are bound in the engine's table, or scores and gradients in that of scores.
        """
        work, ranking, scored = self._engine.work, self._engine.ranking, scores is not None
        table = ranking.table if scored else work.table
        self._any = True
        self._ops.collect(
            table[first : first + len(grads)], tiles, active, ranking.rule, scored, first,
            self._max_quota, self._collected, work.scratch,
        )  # fmt: skip

    def winners(self, found_inf: Tensor) -> Tensor:
        """Write the step's new entries to the engine's work space; their gradients, in order."""
        new = self._engine.work.new
        if not self._any:
            new.count.zero_()
            return self._grad[:0]
        self._ops.collect_end(found_inf, new, self._grad, self._collected)
        return self._grad

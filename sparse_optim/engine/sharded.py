"""The engine over sharded parameters: each process steps over its shards, all agree on the rest.

    scan    each process its own shards; norms and the non-finite test are summed
    cut     each process finds the winners of its shards, as if there were no others; the k-th
            largest of all is found (`kth_largest`); those below it go

The first k of all are among the first k of each process, so that this is exact. Every process that
holds a replica decides alike, by the same 64 bits of importance and place.

`active.progress` counts this process's entries, `progress` those of all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from sparse_optim.backends import scoring
from sparse_optim.backends.operands import ENTRY_FIELDS, ActiveSet, Rule, max_quota, num_bytes
from sparse_optim.backends.reference import importance_of_word, rank_words
from sparse_optim.engine.engine import Engine, Method
from sparse_optim.engine.exact_norms import exact_norms
from sparse_optim.engine.kth_largest import kth_largest
from sparse_optim.engine.pool import Gradients, Pool
from sparse_optim.engine.ranking import NOISE_ENTRIES, scores_of, warn_of_scores
from sparse_optim.engine.scalars import hyper_rows
from sparse_optim.engine.shards import Shards, digest_of
from sparse_optim.engine.touched import Touched


def engine_for(pool: Pool, method: Method, targets: Tensor, backend: str) -> Engine:
    """The engine of a pool, sharded or not; see `Engine`."""
    kind = Engine if pool.shards is None else ShardedEngine
    return kind(pool, method, targets, backend)


class ShardedEngine(Engine):
    """An engine of which each process has one, for its shards; all take every step together.

    See `Engine`. Building it is collective, as are steps, `whole_active` and `restored`.

    Raises:
        ValueError: the selection replaces its set at each step, or the importance needs whole
            tensors.
        RuntimeError: the processes have other schedules, importances, selections, norms or
            backends; at the first step, other hyper-parameters.
    """

    def __init__(
        self,
        pool: Pool,
        method: Method,
        targets: Tensor,
        backend: str,
        active: ActiveSet | None = None,
        touched: Touched | None = None,
    ) -> None:
        shards = pool.shards
        assert shards is not None
        self.shards: Shards = shards
        if method.selection.replaces:
            raise ValueError(
                f"sharded parameters need a set that only grows: use Increment or Static, got "
                f"{method.selection!r}"
            )
        if not method.traits.elementwise:
            raise ValueError(
                f"{method.importance!r} may need whole tensors, and each process has shards of "
                "them: use D3, Snip, Magnitude or Random, or give it traits = "
                "Traits(elementwise=True) if it scores each entry by itself"
            )
        counts = torch.zeros(3, dtype=torch.int64, device=pool.device)
        if active is not None:
            counts[1] = torch.where(self._owned, active.offsets.diff(), 0).sum()
            shards.add(counts)
            counts[1] -= active.progress[1]
        self._elsewhere = counts  # active entries that this process does not hold
        super().__init__(pool, method, targets, backend, active, touched)
        progress = self.progress.tolist()
        shards.check_agreed(
            [*digest_of(self.targets.tolist()), *progress], pool.device, "budget or the schedule"
        )
        choices = [
            method.importance,
            method.selection,
            method.bias_correction,
            method.norm,
            method.shard_invariant,
            backend,
        ]
        shards.check_agreed(
            digest_of(choices),
            pool.device,
            "importance, selection, norm, shard_invariant, bias_correction or backend",
        )
        self._counted = shards.owned  # norms that are this process's to count
        self._compared = False  # what may differ from step to step
        self._max_quota = max_quota(self.targets, self.budget, method.selection.every)
        quota = self.work.new.position.numel()
        room = ActiveSet.empty(pool.local, quota, pool.device)
        self._winners = replace(room, master=torch.zeros_like(room.grad))

    @property
    def progress(self) -> Tensor:
        """Counts of the whole pool, in all processes; see `Engine`."""
        return self.active.progress + self._elsewhere

    @property
    def _owned(self) -> Tensor:
        """Of the pool's tensors, (S,), bool; see `Shards`."""
        return self.shards.owned[: len(self.shards.blocks)]

    def begin(
        self,
        groups: Sequence[dict[str, Any]],
        grad_scale: Tensor | None = None,
        found_inf: Tensor | None = None,
    ) -> None:
        """See `Engine`; the first step compares hyper-parameters, later ones trust schedulers."""
        if not self._compared:
            rows = [float(number) for row in hyper_rows(groups) for number in row]
            self.shards.check_agreed(
                digest_of(rows), self.pool.device, "lr, betas, eps, weight_decay or maximize"
            )
        super().begin(groups, grad_scale, found_inf)

    def clip(self, max_grad_norm: float | None) -> None:
        """See `Engine`."""
        if not self._compared:
            digest = digest_of(max_grad_norm)
            self.shards.check_agreed(digest, self.pool.device, "max_grad_norm")
            self._compared = True
        super().clip(max_grad_norm)

    def written_anywhere(self) -> bool:
        """See `Engine`; collective."""
        written = torch.tensor(int(self.written_by_others), device=self.pool.device)
        self.shards.add(written)
        return bool(written)

    def bind(self, dense: Sequence[Tensor]) -> Gradients:
        """The gradients of this process's shards, checked; see `Source`."""
        grads = super().bind(dense)
        return replace(grads, given=any(p.grad is not None for p in self.shards.params))

    def measure(self, dense: Sequence[Tensor]) -> None:
        """See `Engine`; of the active entries and dense gradients of all processes."""
        active, last = self.active, len(self.pool.params) - 1
        if last >= 0:
            entries = torch.arange(active.grad.numel(), device=active.grad.device)
            tensor = torch.searchsorted(active.offsets[1:], entries, right=True).clamp(max=last)
            counted_grad = torch.where(self._owned[tensor], active.grad, 0.0)
            self.active = replace(active, grad=counted_grad)
            self._counted = self._counted.clone()
            self._counted[last] = True  # the norm of all active entries
        try:
            super().measure(dense)
        finally:
            self.active, self._counted = active, self.shards.owned

    def settle_norms(self, norms: Tensor, *tensors: Sequence[Tensor]) -> None:
        """Put the norms of whole tensors in place of those of shards; see `Engine`."""
        shards, counted = self.shards, self._counted[-norms.numel() :]
        shards.add_norms(norms, self.work.scalars.found_inf, counted)
        if self.method.shard_invariant:
            norms.copy_(exact_norms(list(chain(*tensors)), shards, counted))

    def cut(self, grads: Gradients) -> None:
        """`reference.cut` over the whole pool; `work.new` takes what this process holds of it."""
        work, bound, tiles, rule = self.work, grads.bound, self.work.tiles, self.ranking.rule
        if self.ranking.scored:
            if not self.unmasks() or bool(work.scalars.found_inf):
                self._found = work.new.count.zero_().clone()
                return
            # A name keeps the scores alive: the kernels hold their addresses.
            scores, error = [], None
            try:
                scores = self._scores(grads)
            except Exception as found:  # of the user's importance
                error = found
            self.shards.raise_together(error, self.pool.device)
            rule, tiles = Rule(0.0, 1.0, rule.noise[:0]), self.ranking.tiles
            bound = self.ops.bind(scores, self.pool.local, self.ranking.table)
            self.ops.rank(bound, tiles, self.active, rule.noise, work.scratch)
            left = tiles.max.any().long().view(1)
            self.shards.add(left)
            # Of whole tensors, so that all processes look at the same ones.
            there = [param if param.grad is not None else left[:0] for param in self.pool.params]
            warn_of_scores(self.method.importance, self.pool, there, any_left=bool(left))
        everyone = replace(self.active, progress=self.progress)
        self.ops.cut(
            bound, tiles, everyone, rule, self.loud_targets, work.scalars.found_inf, work.new,
            work.scratch,
        )  # fmt: skip
        self._keep_winners(bound, rule)

    def _scores(self, grads: Gradients) -> list[Tensor]:
        """Dense scores of this process's shards, with noise where entries are sampled."""
        self.ranking.set_step(self.active.progress[0])
        scores = scores_of(self.method.importance, self.pool.names, self.pool.local, grads.pool)
        noise = self.ranking.rule.noise
        if not noise.numel():
            return scores
        return [self._perturbed(score, noise, index) for index, score in enumerate(scores)]

    def _perturbed(self, score: Tensor, noise: Tensor, index: int) -> Tensor:
        """The scores of a shard with the noise of its places in the whole tensor."""
        drawn = []
        for begin in range(0, score.numel(), NOISE_ENTRIES):
            piece = score.reshape(-1)[begin : begin + NOISE_ENTRIES].float()
            position = torch.arange(begin, begin + piece.numel(), device=score.device)
            whole = self.shards.whole_position(torch.full_like(position, index), position)
            drawn.append(scoring.perturbed_at(piece, noise, index, whole))
        return torch.cat(drawn).view(score.shape) if drawn else score.float()

    def _keep_winners(self, bound: Any, rule: Rule) -> None:
        """Of the winners of this process's shards, keep those that win among all processes."""
        work, new, winners = self.work, self.work.new, self._winners
        winners.offsets.zero_()
        winners.progress.zero_()
        self.ops.append(bound, new, winners, work.scratch)  # gathers their gradients and values
        score = scoring.importance(winners.grad, winners.master, rule.exp, rule.eps)
        place = self.shards.starts[new.tensor] + self.shards.whole_position(
            new.tensor, new.position
        )
        words = rank_words(scoring.importance_key(score), place)
        found = torch.arange(words.numel(), device=words.device) < new.count
        quota = scoring.step_quota(self.loud_targets, self.progress, self._max_quota)
        quota = torch.where(work.scalars.found_inf > 0, 0, quota)
        counted = found & self._owned[new.tensor]
        self._found, least = kth_largest(words, counted, quota, self._max_quota, self.shards)
        kept = found & (words >= least)
        order = torch.argsort((~kept).byte(), stable=True)
        new.tensor.copy_(new.tensor[order])
        new.position.copy_(new.position[order])
        new.count.copy_(kept.sum())
        least = importance_of_word(least)
        new.threshold.copy_(torch.where(self._found > 0, least, new.threshold))

    def append(self, grads: Gradients) -> None:
        """`reference.append` of the new entries of this process; counts those of all."""
        self._make_room()
        super().append(grads)
        self._elsewhere[1] += self._found - self.work.new.count

    def _make_room(self) -> None:
        """Move to larger buffers where more than this process's share become active.

        Waits for the device, in loud steps alone.
        """
        before = self.active
        needed = int(before.progress[1] + self.work.new.count)
        if needed <= before.position.numel():
            return
        room = min(self.pool.most(self.budget), needed + needed // 2)
        held = int(before.progress[1])
        grown = ActiveSet.empty(self.pool.local, room, self.pool.device)
        for name in (*ENTRY_FIELDS, "grad"):
            values = getattr(before, name)
            if values.numel():
                getattr(grown, name)[:held] = values[:held]
        self.active = replace(grown, offsets=before.offsets, progress=before.progress)
        tiles, quota = self.work.tiles.max.numel(), self.work.new.position.numel()
        size = self.ops.scratch_bytes(tiles, room, quota)
        self.work.scratch = torch.zeros(size, dtype=torch.uint8, device=self.pool.device)

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers of this process."""
        return super().nbytes + num_bytes(self._winners)

    def restored(
        self,
        segments: Sequence[dict[str, Tensor]],
        progress: Tensor,
        *state: Any,
        **more: Any,
    ) -> Engine:
        """In the state of a checkpoint of any number of processes; see `Engine`.

        Args:
            segments: of whole tensors.
            progress: of all processes.
        """
        mine = []
        for index, segment in enumerate(segments):
            position = segment["position"].to(self.pool.device)
            inside, local = self.shards.cut_out(index, position)
            kept = {name: value.to(self.pool.device)[inside] for name, value in segment.items()}
            mine.append({**kept, "position": local.int()})
        counts = progress.clone()
        counts[1] = sum(segment["position"].numel() for segment in mine)
        return super().restored(mine, counts, *state, **more)

    def whole_active(self) -> tuple[ActiveSet, Tensor]:
        """The active set of all processes, and the values of its entries, (active,), float32.

        Positions are those of whole tensors. Collective; takes memory for the whole budget.
        """
        active, pool, count = self.active, self.pool, int(self.active.progress[1])
        number, device = len(pool.params), pool.device
        counts = active.offsets.diff()
        tensor = torch.repeat_interleave(
            torch.arange(number, device=device), counts, output_size=count
        )
        values = torch.empty(count, dtype=torch.float32, device=device)
        for index, param in enumerate(pool.local):
            part = self.segment(index)
            values[part] = param.detach().reshape(-1)[active.position[part].long()].float()
        low_precision = any(param.dtype != torch.float32 for param in pool.params)
        fields = [name for name in ENTRY_FIELDS[1:] if name != "master" or low_precision]
        columns = [getattr(active, name)[:count].view(torch.int32) for name in fields]
        where = self.shards.whole_position(tensor, active.position[:count])
        rows = torch.stack([tensor.int(), where.int(), *columns, values.view(torch.int32)], dim=1)[
            self._owned[tensor]
        ]
        found = torch.cat([rows[:0], *self.shards.pieces(rows)])
        found = found[(found[:, 0].long() << 32 | found[:, 1].long()).argsort()]
        everyone = ActiveSet.empty(pool.params, self.budget, device)
        total = found.size(0)
        for name, column in zip(["position", *fields], found[:, 1:-1].unbind(1), strict=True):
            target = getattr(everyone, name)
            target[:total] = column.contiguous().view(target.dtype)
        sizes = torch.bincount(found[:, 0].long(), minlength=number)
        everyone.offsets[1:] = sizes.cumsum(0)
        everyone.progress.copy_(self.progress)
        return everyone, found[:, -1].contiguous().view(torch.float32)

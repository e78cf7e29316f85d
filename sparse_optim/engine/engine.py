"""The engine: the active set of a pool, and one step over it.

    begin   copy the step's scalars to the device
    select  scan, cut, append: this step's winners join the active set
    clip    the norm of the gradients, and the factor that clips and unscales them
    update  AdamW on the active entries

A step is loud if it may unmask entries, else quiet: once the budget is spent, and in all but every
`every`-th call before. Loudness is known on the host before the forward pass.

It knows tensors and no torch.optim. An engine never changes its pool, its targets or its budget:
`resized`, `with_pool` and `restored` build another one, so that a failure (out of memory, a
checkpoint that does not fit) leaves this one as it was.

A source of gradients offers `bind`, `select`, `end` and `discard`. The engine is the source that
reads `.grad`; `fused_backward` is another.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import chain, count
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from sparse_optim.backends import scoring
from sparse_optim.backends.operands import (
    ActiveSet,
    BiasCorrection,
    NewEntries,
    StepScalars,
    Tiles,
    max_quota,
    num_bytes,
)
from sparse_optim.backends.registry import Backend, load
from sparse_optim.backends.targets import ahead, budget_of, total_steps
from sparse_optim.engine.completion import Completion
from sparse_optim.engine.exact_norms import exact_norms
from sparse_optim.engine.pool import Gradients, Pool, bind_gradients, bind_stand_ins
from sparse_optim.engine.ranking import Ranking, noise_seed, scores_of, warn_of_scores
from sparse_optim.engine.scalars import Rows, hyper_rows, write_hyper, write_scalar
from sparse_optim.engine.touched import Touched
from sparse_optim.policy.importance import Importance, Traits, traits_of
from sparse_optim.policy.selection import Selection

# What the global norm is taken of: all gradients, or those of active entries and dense parameters.
Norm = Literal["all", "active"]

_set_versions = count()  # no two active sets have the same


@dataclass(frozen=True)
class Method:
    """What is unmasked, how an entry's age is counted, and what the norm is taken of.

    Attributes:
        importance: ranks the entries.
        selection: says how many become active, and when.
        bias_correction: "entry" or "global"; see `reference.update`.
        norm: "all" takes the global norm of every gradient; "active" of what moves in this step
            (the masked gradient of Equation 3), once this step's entries have joined.
        shard_invariant: whether the norm has the same bits however parameters are sharded.
    """

    importance: Importance
    selection: Selection
    bias_correction: BiasCorrection = "entry"
    norm: Norm = "all"
    shard_invariant: bool = False

    @cached_property
    def traits(self) -> Traits:
        """Of the importance."""
        return traits_of(self.importance)


def is_complete(method: Method, budget: int, progress: Sequence[int]) -> bool:
    """Whether nothing will be unmasked any more, by applied steps and active entries."""
    selection, (step, active, _) = method.selection, progress
    if selection.replaces:
        return False
    # A static set of fixed scores is complete after one step, even if it found too few above 0.
    if selection.one_step and method.traits.fixed and step > 0:
        return True
    return active >= budget


class Source(Protocol):
    """Where a step's gradients come from."""

    def bind(self, dense: Sequence[Tensor]) -> Gradients:
        """This step's gradients, checked, with those of the dense parameters."""
        ...

    def select(self, grads: Gradients) -> None:
        """Read all gradients once; this step's winners join the active set."""
        ...

    def end(self) -> None:
        """The step is done."""
        ...

    def discard(self) -> None:
        """There was nothing to do, or the user dropped the gradients."""
        ...


@dataclass
class WorkSpace:
    """What the operations write besides the active set; sized for the largest quota.

    Attributes:
        table: (S, 4), int64; see `reference.bind`.
        tiles, new, scalars: see `operands`.
        norms: (S + D,), float64; see `reference.scan`.
        scratch: uint8.
    """

    table: Tensor
    tiles: Tiles
    new: NewEntries
    scalars: StepScalars
    norms: Tensor
    scratch: Tensor

    @staticmethod
    def empty(pool: Pool, capacity: int, quota: int, bounded: bool, ops: Backend) -> WorkSpace:
        """Allocate for steps that unmask at most `quota` entries.

        Args:
            bounded: keep the largest |param| of each tile, which D3 with exp < 0 needs.
        """
        tiles = Tiles.empty(pool.local, ops.TILE, bounded, pool.device)
        norms = len(pool.params) + pool.num_dense
        scratch = ops.scratch_bytes(tiles.max.numel(), capacity, quota)
        return WorkSpace(
            table=torch.zeros(len(pool.params), 4, dtype=torch.int64, device=pool.device),
            tiles=tiles,
            new=NewEntries.empty(quota, pool.device),
            scalars=StepScalars.empty(pool.group_index, pool.num_groups, pool.device),
            norms=torch.zeros(norms, dtype=torch.float64, device=pool.device),
            scratch=torch.zeros(scratch, dtype=torch.uint8, device=pool.device),
        )


class Engine:
    """One step over the active set of a pool; see the module.

    Args:
        pool: whose entries are ranked together.
        method: what is unmasked.
        targets: cumulative targets (see `backends.targets`); the last one is the budget.
        backend: name of the backend.
        active: the entries that are active already (default: none), with room for the budget.
        touched: those that were ever active, where entries leave the set again.

    Attributes:
        pool, method, targets, backend: as given; targets on the device.
        budget, total_steps: of the targets.
        loud_targets: targets until the next loud step: what this one unmasks up to.
        calls: steps taken, applied or skipped, counted on the host.
        set_version: changes with the active set.
        active: the active set. spare: a second one, for selections that replace theirs.
        work: buffers of a step. ranking: buffers of dense scores.
        touched: entries that were ever active.
        first_tiles: index of each tensor's first tile, on the host.
        known_hyper: rows of hyper-parameters that the device was given last.

    Raises:
        ValueError: the importance does not fit the names of the pool.
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
        assert (pool.shards is None) == (type(self) is Engine), "engine_for chooses the class"
        self.pool, self.method, self.backend = pool, method, backend
        traits, selection = method.traits, method.selection
        self.targets, self.budget = targets.to(pool.device), budget_of(targets)
        self.loud_targets = ahead(self.targets, selection.every - 1)
        self.total_steps, capacity = total_steps(targets), pool.capacity(self.budget)
        self._surely_empty = active is None  # until the first step: known without a device read
        if active is None:
            active = ActiveSet.empty(pool.local, capacity, pool.device)
        if touched is None:
            touched = Touched.empty(pool.entries if selection.replaces else 0, pool.device)
        self.active, self.touched = active, touched
        self.first_tiles = pool.first_tiles(self.ops.TILE)
        exp, _ = traits.in_kernel or (0.0, 1.0)
        bounded = exp < 0 and noise_seed(traits, selection) is None
        quota = max_quota(self.targets, pool.most(self.budget), selection.every)
        room = active.position.numel()
        self.work = WorkSpace.empty(pool, room, quota, bounded, self.ops)
        self.ranking = Ranking.of(traits, selection, self.work.table, self.work.tiles)
        spare = capacity if selection.replaces else 0
        self.spare = ActiveSet.empty(pool.local, spare, pool.device)
        if selection.replaces:  # this step's gradients, whichever of both sets is the active one
            self.spare.grad = self.active.grad
        counts = [0, 0, 0] if self._surely_empty else self.progress.tolist()
        self.calls, self.set_version = counts[0] + counts[2], next(_set_versions)
        self._offsets: tuple[int, list[int]] = (-1, [])
        # No method of this engine: what refers to itself lives until the garbage collector comes.
        known = partial(is_complete, method, self.budget)
        self.completion = Completion(known, pool.device.type, known(counts))
        self.known_hyper: Rows = []
        self._own_writes = 0  # by which this engine's steps have raised all versions
        self._versions: Sequence[int | None] = self._read_versions()
        self._reread = True  # the next step looks at every parameter
        self._stepped = False  # only what is written after a step is written by others
        self._written = False
        if traits.check_names is not None:
            traits.check_names(pool.names)

    @property
    def ops(self) -> Backend:
        """The operations of the backend."""
        return load(self.backend)

    @property
    def progress(self) -> Tensor:
        """Counts of the whole pool: (3,), int64, as in `ActiveSet`."""
        return self.active.progress

    @property
    def loud(self) -> bool:
        """Whether the next step may unmask entries, as far as the host knows."""
        return self.calls % self.method.selection.every == 0 and not self.completion.known

    # A step, in order.

    def bind(self, dense: Sequence[Tensor]) -> Gradients:
        """The gradients in `.grad`, checked; see `Source`."""
        bound, grads = bind_gradients(self.ops, self.pool, self.work.table)
        return Gradients(bound, grads, dense)

    def bind_stand_ins(self, present: Sequence[bool], dense: Sequence[Tensor]) -> Gradients:
        """Gradients of which `append` and `update` see only whether there is one.

        Args:
            present: of each tensor; the parameter itself then stands for its gradient.
            dense: gradients of the dense parameters.
        """
        bound, grads = bind_stand_ins(self.ops, self.pool, self.work.table, present)
        return Gradients(bound, grads, dense)

    def read(self, position: Tensor, offsets: Tensor) -> Tensor:
        """The bits of entries of the parameters, (n,) int32, as `reference.gather` gives them.

        Args:
            position, offsets: of the entries, as there.
        """
        table, words = torch.zeros_like(self.work.table), torch.empty_like(position)
        bound, _ = bind_stand_ins(self.ops, self.pool, table, [False] * len(self.pool.params))
        self.ops.gather(bound, position, offsets, words)
        return words

    def begin(
        self,
        groups: Sequence[dict[str, Any]],
        grad_scale: Tensor | None = None,
        found_inf: Tensor | None = None,
    ) -> None:
        """Copy this step's scalars to the device; take over parameters that others have written.

        Args:
            groups: param groups, for their hyper-parameters.
            grad_scale: one element, the loss scale that the gradients carry; None for 1.
            found_inf: one element, 1 skips the step; None for 0.
        """
        scalars, rows = self.work.scalars, hyper_rows(groups)
        write_hyper(scalars.hyper, groups, rows if rows != self.known_hyper else None)
        self.known_hyper = rows
        write_scalar(scalars.grad_scale, grad_scale, 1.0)
        write_scalar(scalars.found_inf, found_inf, 0.0)
        self.notice_writes()

    def select(self, grads: Gradients) -> None:
        """Scan, cut, append; see `Source`."""
        loud, norm = self.loud, self.method.norm
        with self._fresh_set():
            if norm == "active":
                self.active.grad.zero_()
            if loud or norm == "all":
                self.scan(grads)
            else:
                self.gather(grads.pool)
            if loud:
                self.cut(grads)
                self.append(grads)
            else:
                self.work.new.count.zero_()
        if norm == "active":
            self.measure(grads.dense)

    def clip(self, max_grad_norm: float | None) -> None:
        """The norm of the gradients, and the factor that `update` multiplies them by."""
        limit = math.inf if max_grad_norm is None else max_grad_norm
        scalars = self.work.scalars
        self.ops.clip(
            self.work.norms, scalars.grad_scale, limit, scalars.grad_norm, scalars.grad_factor
        )

    def update(self, grads: Gradients) -> None:
        """AdamW on the active entries; counts the step, or counts it as skipped."""
        self.ops.update(grads.bound, self.active, self.work.scalars, self.method.bias_correction)
        # Operations write behind autograd's back: bump the versions that it checks, by one each.
        torch.autograd.graph.increment_version(self.pool.params)
        self._own_writes += 1
        self._surely_empty, self._stepped = False, True
        self.calls += 1
        self.completion.note(self.progress)

    def end(self) -> None:
        """Nothing is left to do where gradients stay in `.grad`; see `Source`."""

    def discard(self) -> None:
        """Nothing was taken; see `Source`."""

    # Its operations, for sources.

    def scan(self, grads: Gradients) -> None:
        """`reference.scan` over the whole pool."""
        work = self.work
        self.ops.scan(
            grads.bound, grads.dense, work.tiles, self.active, work.norms, work.scalars.found_inf,
            work.scratch,
        )  # fmt: skip
        self.settle_norms(work.norms, grads.pool, grads.dense)

    def cut(self, grads: Gradients) -> None:
        """`reference.cut` over the whole pool, or what is needed to rank by dense scores.

        Dense scores read counts from the device: one synchronisation.
        """
        work, ranking, tiles, bound = self.work, self.ranking, self.work.tiles, grads.bound
        if ranking.scored:
            if not self.unmasks() or bool(work.scalars.found_inf):
                work.new.count.zero_()
                return
            importance, tiles = self.method.importance, ranking.tiles
            ranking.set_step(self.active.progress[0])
            # A name keeps the scores alive: the kernels hold their addresses.
            scores = scores_of(importance, self.pool.names, self.pool.local, grads.pool)
            bound = self.ops.bind(scores, self.pool.local, ranking.table)
            self.ops.rank(bound, tiles, self.active, ranking.rule.noise, work.scratch)
            warn_of_scores(importance, self.pool, grads.pool, any_left=bool(tiles.max.any()))
        self.ops.cut(
            bound, tiles, self.active, ranking.rule, self.loud_targets, work.scalars.found_inf,
            work.new, work.scratch,
        )  # fmt: skip

    def append(self, grads: Gradients) -> None:
        """`reference.append` of the new entries."""
        self.ops.append(grads.bound, self.work.new, self.active, self.work.scratch)
        self.set_version = next(_set_versions)

    def gather(self, grads: Sequence[Tensor]) -> None:
        """active.grad <- gradients at the active entries; those of tensors without one stay.

        Args:
            grads: of the pool; empty where missing.
        """
        for index, grad in enumerate(grads):
            part = self.segment(index)
            if grad.numel() and part.stop > part.start:
                position = self.active.position[part].long()
                self.active.grad[part] = grad.reshape(-1)[position].float()

    def measure(self, dense: Sequence[Tensor]) -> None:
        """Norms and non-finite test of active.grad and the dense gradients, in place of all."""
        work, last = self.work, len(self.pool.params)
        ours, first = ([self.active.grad], last - 1) if last else ([], 0)
        work.norms[:first].zero_()
        nothing = self.ops.bind([], [], work.table[:0])
        self.ops.scan(
            nothing, [*ours, *dense], work.tiles.of_tensors(0, 0, slice(0, 0)),
            self.active.of_tensors(0, 0), work.norms[first:], work.scalars.found_inf,
            work.scratch,
        )  # fmt: skip
        self.settle_norms(work.norms[first:], ours, dense)

    def settle_norms(self, norms: Tensor, *tensors: Sequence[Tensor]) -> None:
        """Put exact norms in place of those of a scan, where shards are to have the same.

        Args:
            norms: (n,), float64. Mutated.
            tensors: n in all, whose norms they are.
        """
        if norms.numel() and self.method.shard_invariant:
            norms.copy_(exact_norms(list(chain(*tensors))))

    def segment(self, index: int) -> slice:
        """Where the active entries of a tensor are; waits for the device after a loud step."""
        version, offsets = self._offsets
        if version != self.set_version:
            offsets = self.active.offsets.tolist()
            self._offsets = (self.set_version, offsets)
        return slice(*offsets[index : index + 2])

    def unmask_fixed(self) -> None:
        """Unmask a static set whose scores need no gradient, before the first step."""
        given = [
            param.detach() if param.requires_grad else param.new_empty(0)
            for param in self.pool.local
        ]
        self.pool.check_unchanged()
        bound = self.ops.bind(given, self.pool.local, self.work.table)
        grads = Gradients(bound, given, [])
        self.work.scalars.found_inf.zero_()
        self.cut(grads)
        self.append(grads)
        self.completion.known = True

    @property
    def may_unmask_fixed(self) -> bool:
        """Whether `unmask_fixed` can take the place of the first step's selection."""
        selection, traits = self.method.selection, self.method.traits
        return selection.one_step and traits.fixed and self.calls == 0 and self.loud

    def unmasks(self) -> bool:
        """Whether the next step is to unmask anything; reads counts from the device."""
        progress = self.progress
        if is_complete(self.method, self.budget, progress.tolist()):
            return False
        return bool(scoring.step_quota(self.loud_targets, progress, max_quota=1))

    def notice_writes(self) -> None:
        """Take over parameter values that others have written since the last step."""
        versions = self._read_versions()
        written = self._written_since(versions)
        self._written = self._has_foreign(written)
        if self._keeps_values and (written or self._reread):
            self.refresh(None if self._reread else written)
        self._versions, self._reread = versions, False

    @property
    def written_by_others(self) -> bool:
        """Whether parameters were written after the first step by other code, as autograd sees it;
        entries may have moved then that are not active."""
        return self._has_foreign(self._written_since(self._read_versions()))

    def written_anywhere(self) -> bool:
        """`written_by_others`, in any process."""
        return self.written_by_others

    def _has_foreign(self, written: Iterable[int]) -> bool:
        known = (self._versions[index] is not None for index in written)
        return self._written or (self._stepped and any(known))

    def _read_versions(self) -> list[int]:
        return self.pool.versions(self._own_writes)

    def _written_since(self, versions: list[int]) -> list[int]:
        """The parameters that are not of the version that was seen last."""
        if versions == self._versions:
            return []
        known = zip(versions, self._versions, strict=True)
        return [index for index, (now, seen) in enumerate(known) if now != seen]

    def trust_values(self) -> None:
        """Accept what others have written: the caller knows that it moved active entries alone."""
        self._written = False
        self.accept_values()

    @torch.no_grad()
    def refresh(self, indices: Iterable[int] | None = None) -> None:
        """Take over the values of these tensors of the pool (default: of all)."""
        self.pool.check_unchanged()
        bound, local = self.work.tiles.param_bound, self.pool.local
        for index in range(len(local)) if indices is None else indices:
            param = local[index]
            if bound.numel():
                first, last = self.first_tiles[index : index + 2]
                bound[first:last] = scoring.tile_abs_max(param, self.ops.TILE)
            if self.active.master.numel() and not self._surely_empty:
                state = self.active.segment(index)
                value = param.view(-1)[state["position"].long()]
                stale = state["master"].to(param.dtype) != value
                state["master"][stale] = value[stale].float()
        self.accept_values()

    def accept_values(self) -> None:
        """Treat the parameters' values as seen: the next step looks only at what changes."""
        self._surely_empty = self._reread = False
        self._versions = self._read_versions()

    # Other engines with the same entries.

    def resized(self, method: Method, targets: Tensor) -> Engine:
        """The active entries under another budget or schedule."""
        active = self._copied_active(self.pool, budget_of(targets))
        same = type(self)
        return self._derived(same(self.pool, method, targets, self.backend, active, self.touched))

    def with_pool(self, pool: Pool) -> Engine:
        """The active entries in a pool that begins with this one.

        Raises:
            ValueError: the new parameters are on another device, for which this backend was not
                chosen.
        """
        if pool.device != self.pool.device:
            raise ValueError(
                f"the new parameters are on {pool.device}, but the optimizer was built for "
                f"{self.pool.device}: use one optimizer per device"
            )
        active = self._copied_active(pool, self.budget)
        touched = self.touched.grown(pool.entries) if self.method.selection.replaces else None
        same = type(self)
        return self._derived(same(pool, self.method, self.targets, self.backend, active, touched))

    def restored(
        self,
        segments: Sequence[dict[str, Tensor]],
        progress: Tensor,
        targets: Tensor,
        threshold: Tensor,
        touched: Touched | None,
        written: bool = False,
        known: Sequence[bool] = (),
    ) -> Engine:
        """In the state of a checkpoint, which was checked.

        Args:
            segments: of each tensor, as `ActiveSet.segment` returned them.
            progress, targets: as in `ActiveSet` and in the constructor.
            threshold: (), float32, as in `NewEntries`.
            touched: entries that were ever active, where entries leave the set again.
            written: as `written_by_others`.
            known: as `Completion.flags`; empty for what the counts say.
        """
        pool = self.pool
        active = self._filled(pool, budget_of(targets), segments, progress)
        engine: Engine = type(self)(
            pool, self.method, targets.clone(), self.backend, active, touched
        )
        engine.work.new.threshold.copy_(threshold)
        engine._written = written
        if known:
            engine.completion.flags = known
        return engine

    def drain(self) -> None:
        """Wait for the current stream, before these buffers are freed.

        torch hands memory out again on the stream that it was allocated on, which need not be the
        one that steps, and copies into another engine's buffers, are queued on.
        """
        if self.pool.device.type == "cuda":
            torch.cuda.current_stream(self.pool.device).synchronize()

    def _derived(self, engine: Engine) -> Engine:
        """The engine, with what this one's last step left to be read."""
        engine.work.new.threshold.copy_(self.work.new.threshold)
        engine.work.scalars.grad_norm.copy_(self.work.scalars.grad_norm)
        new = len(engine.pool.params) - len(self.pool.params)  # of them no step is known
        engine._own_writes = self._own_writes
        engine._versions = [*self._versions, *[None] * new]
        engine._stepped, engine._written = self._stepped, self._written
        return engine

    # What is held.

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers."""
        held = num_bytes(self.active, self.work, self.spare, self.ranking)
        return held + self.touched.nbytes + self.targets.nbytes

    def __getstate__(self) -> dict[str, Any]:
        """A copy's parameters count their versions anew."""
        return {**vars(self), "_reread": True, "_written": self.written_by_others}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Note the versions of this copy's parameters."""
        vars(self).update(state)
        self._versions = self._read_versions()

    @property
    def _keeps_values(self) -> bool:
        """Whether anything here was computed from parameter values that others may overwrite."""
        return bool(self.work.tiles.param_bound.numel() or self.active.master.numel())

    @contextmanager
    def _fresh_set(self) -> Iterator[None]:
        """Rank into the spare set if the selection replaces its set; errors and skips undo it."""
        if not self.method.selection.replaces:
            yield
            return
        before, self.active = self.active, self.spare
        try:
            self.active.clear(before.progress)
            yield
            if self.work.scalars.found_inf:
                self.active = before
                return
            self.set_version = next(_set_versions)
            sizes = self.pool.sizes
            self.active.carry_over(before, sizes)
            self.touched.add(self.active.global_index(sizes))
        except BaseException:
            self.active = before
            raise
        self.spare = before

    def _copied_active(self, pool: Pool, budget: int) -> ActiveSet:
        """The active entries, copied into buffers for another pool or budget."""
        self.pool.check_unchanged()
        segments = [self.active.segment(index) for index in range(len(pool.params))]
        for param, segment in zip(pool.local, segments, strict=True):
            values = param.detach().view(-1)[segment["position"].long()]
            segment.setdefault("master", values.float())
        return self._filled(pool, budget, segments, self.active.progress)

    @staticmethod
    def _filled(
        pool: Pool, budget: int, segments: Sequence[dict[str, Tensor]], progress: Tensor
    ) -> ActiveSet:
        """An active set for a budget, with the segments of a pool."""
        held = sum(segment["position"].numel() for segment in segments)
        active = ActiveSet.empty(pool.local, max(pool.capacity(budget), held), pool.device)
        active.fill(segments, progress)
        return active

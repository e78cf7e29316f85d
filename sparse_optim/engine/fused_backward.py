"""Selection inside the backward pass: each gradient is scanned when it is produced, then freed.

    hook       scan: tile maxima, gradients of active entries, norm of the tensor, non-finite test
               its best frozen entries join the candidates (large tensors at once, small ones
               together, once they are BATCH_BYTES): by `cut`, or by `collect` on GPUs
               param.grad <- None
    step()     the best of the candidates; append; clip; update

Norm, selection, moments and weights are those of an ordinary step, bit for bit, on every backend.
At most two gradients are alive at once, where autograd itself holds no more. Clipping and loss
scaling stay exact, since nothing moves before `step()`, which consumes all gradients, including
those of groups with unmask="all". When nothing is left to unmask, only the ranking ends: every
gradient is still read, since a non-finite one anywhere must skip the step.

Importances other than D3 score each tensor as its gradient comes. They read counts from the device,
as in an ordinary step: those of static sets (PaFi, Fish, random masks) no more than once a step.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from sparse_optim.backends.operands import ActiveSet, Tiles
from sparse_optim.backends.registry import Collecting
from sparse_optim.engine.candidates import Candidates
from sparse_optim.engine.collected import Collected, can_collect
from sparse_optim.engine.engine import Engine
from sparse_optim.engine.pool import Gradients, readable_gradients
from sparse_optim.engine.ranking import perturbed, scores_of, warn_of_scores
from sparse_optim.engine.replicas import is_distributed

# Gradients below this wait for one another: ranking takes up to 0.1 ms a call, however small they
# are.
BATCH_BYTES = 1 << 20


def check_not_distributed() -> None:
    """Raise RuntimeError where several processes train together."""
    if is_distributed():
        raise RuntimeError(
            "fuse_backward=True does not work with several processes: gradients would be taken "
            "before DistributedDataParallel averages them; leave fuse_backward False "
            "(sampled_backward=True works)"
        )


def would_lose(what: str, option: str) -> RuntimeError:
    """The error for a change while gradients were taken that no step has used."""
    return RuntimeError(
        f"{what} between backward() and step() would lose the gradients that {option}=True has "
        "taken: call step() or zero_grad() first"
    )


def nothing_came(option: str) -> RuntimeError:
    """The error for a second step on the gradients of one backward pass."""
    return RuntimeError(
        f"no gradient has come since the last step(): with {option}=True a step consumes the "
        "gradients, and cannot be repeated. Call backward() before step(), or zero_grad() after "
        "the last one to say that there are none"
    )


class _Hook:
    """Hands a parameter's gradient over; takes nothing once the source is gone."""

    def __init__(self, owner: FusedBackward, index: int) -> None:
        self.owner = weakref.ref(owner)
        self.index = index

    def __call__(self, param: Tensor) -> None:
        owner = self.owner()
        if owner is not None and param.grad is not None:
            owner.take(self.index)


class FusedBackward:
    """The source of gradients that takes each of them during the backward pass.

    Args:
        engine: whose pool gets hooks, and whose buffers are written.
        dense: parameters trained densely beside the pool; a step also consumes their gradients.

    Attributes:
        stepped: a step has consumed the gradients, and none has come since.

    Raises:
        ValueError: another source takes the gradients of a parameter already.
        RuntimeError: several processes train together.
    """

    def __init__(self, engine: Engine, dense: Sequence[Tensor]) -> None:
        check_not_distributed()
        self._engine, self._dense = engine, dense
        device = engine.pool.device
        self._parts = [_Part.of(engine, index) for index in range(len(engine.pool.params))]
        self._found_inf = torch.zeros((), dtype=torch.float32, device=device)
        self._candidates = Collected(engine) if can_collect(engine) else Candidates(engine)
        self._handles: dict[int, RemovableHandle] = {}
        weakref.finalize(self, _remove, self._handles)
        self.discard()
        self.attach()

    def attach(self) -> None:
        """Register hooks where they are missing and can be: on what requires gradients."""
        pool = self._engine.pool
        for index, (param, name) in enumerate(zip(pool.params, pool.names, strict=True)):
            if index in self._handles or not param.requires_grad:
                continue
            if any(hook.owner() is not None for hook in _hooks_of(param)):
                self.detach()
                raise ValueError(
                    f"another optimizer with fuse_backward=True takes the gradients of {name}: "
                    "delete it, or set its fuse_backward = False"
                )
            hook = _Hook(self, index)
            self._handles[index] = param.register_post_accumulate_grad_hook(hook)

    def detach(self) -> None:
        """Remove the hooks: gradients stay in `.grad` from now on."""
        _remove(self._handles)

    @property
    def holds_any(self) -> bool:
        """Whether gradients were taken that no step has used."""
        return any(self._taken)

    def check_idle(self, what: str) -> None:
        """Raise RuntimeError if gradients were taken that no step has used."""
        if self.holds_any:
            raise would_lose(what, "fuse_backward")

    def discard(self) -> None:
        """Forget what was taken, as `zero_grad()` forgets gradients."""
        self._taken = [False] * len(self._parts)
        self._waiting: dict[int, Tensor] = {}
        self._candidates.clear()
        self._begun = self._ranks = self.stepped = False
        self._error: str | None = None

    @property
    def nbytes(self) -> int:
        """Bytes held beside the engine's own buffers."""
        return self._candidates.nbytes

    @torch.no_grad()
    def take(self, index: int) -> None:
        """Scan the gradient of a tensor of the pool, keep what may be needed, and free the rest.

        Raises:
            RuntimeError: a gradient of this tensor was taken already.
            TypeError, ValueError: as `readable_gradients`.
        """
        self.check_first(index, self._taken[index])
        pool, part = self._engine.pool, self._parts[index]
        pool.check_unchanged(index)
        [grad] = readable_gradients([part.param], [pool.names[index]])
        self.begin()
        part.param.grad = None
        self._taken[index] = True
        if grad.numel() == 0:
            return
        grad = grad.detach()
        self._scan(part, grad)
        if not self._ranks:
            return
        if grad.nbytes >= BATCH_BYTES:
            self._rank(index, [grad])
            return
        self._waiting[index] = grad
        if sum(waiting.nbytes for waiting in self._waiting.values()) >= BATCH_BYTES:
            self._rank_waiting()

    def collect(self) -> list[bool]:
        """Take gradients that came without a hook, and rank what waits.

        Returns:
            of each tensor of the pool, whether a gradient was taken for this step.

        Raises:
            RuntimeError: a gradient was written after it had been taken.
        """
        self._raise_error()
        self._engine.pool.check_unchanged()
        for index, part in enumerate(self._parts):
            if part.param.grad is not None:
                self.take(index)
        self.attach()
        self._rank_waiting()
        return self._taken

    def bind(self, dense: Sequence[Tensor]) -> Gradients:
        """`collect`, for a step; see `Source`.

        Returns:
            in place of the pool's gradients, for `append` and `update`: the parameter itself where
            there is a gradient in this step, else an empty tensor.

        Raises:
            RuntimeError: a gradient was written after it had been taken, or none has come since
                the last step.
        """
        taken = self.collect()
        self._check_not_again()
        return self._engine.bind_stand_ins(taken, dense)

    def select(self, grads: Gradients) -> None:
        """What scan, cut and append do in an ordinary step; see `Source`."""
        engine = self._engine
        work, active = engine.work, engine.active
        found_inf = work.scalars.found_inf
        self.begin()
        nothing = engine.ops.bind([], [], work.table[:0])
        engine.ops.scan(
            nothing, grads.dense, work.tiles.of_tensors(0, 0, slice(0, 0)), active.of_tensors(0, 0),
            work.norms[len(self._parts) :], self._found_inf, work.scratch,
        )  # fmt: skip
        engine.settle_norms(work.norms[len(self._parts) :], grads.dense)
        found_inf.copy_(torch.maximum(found_inf, self._found_inf))
        grad = self._candidates.winners(found_inf)
        if engine.ranking.scored and self._ranks and not bool(found_inf):
            importance, any_left = engine.method.importance, bool(work.new.count)
            warn_of_scores(importance, engine.pool, grads.pool, any_left)
        engine.append(grads)
        if grad.numel():
            new = active.unmask_step == active.progress[0] + 1
            active.grad.masked_scatter_(new, grad)
        if engine.method.norm == "active":
            engine.measure(grads.dense)

    def end(self) -> None:
        """All gradients are consumed: those of dense parameters may not accumulate alone."""
        for param in self._dense:
            param.grad = None
        self.discard()
        self.stepped = True

    def begin(self) -> None:
        """Prepare for a step, before its first gradient."""
        if self._begun:
            return
        check_not_distributed()
        engine = self._engine
        if engine.method.norm == "active":
            engine.active.grad.zero_()
        engine.work.norms.zero_()
        self._found_inf.zero_()
        self._candidates.begin()
        if engine.ranking.scored:
            self._ranks = engine.loud and engine.unmasks()
            engine.ranking.set_step(engine.active.progress[0])
        else:
            self._ranks = engine.loud and self._candidates.wanted
        if self._ranks:
            engine.notice_writes()
        self._begun = True

    @property
    def found_inf(self) -> Tensor:
        """(), float32, 1 if a gradient that was taken for this step is infinite or NaN."""
        return self._found_inf

    def check_first(self, index: int, taken: bool) -> None:
        """Raise RuntimeError, now and at step(), if a tensor's gradient was taken already."""
        if taken and self._error is None:
            self._error = (
                f"{self._engine.pool.names[index]} got a second gradient before step() or "
                "zero_grad(). With fuse_backward=True the first one is gone, so that gradients "
                "cannot be accumulated (nor averaged by DistributedDataParallel): take a step "
                "after each backward(), or set optimizer.fuse_backward = False. zero_grad() "
                "discards what was taken"
            )
        self._raise_error()

    def _raise_error(self) -> None:
        if self._error is not None:
            raise RuntimeError(self._error)

    def _check_not_again(self) -> None:
        no_dense = all(param.grad is None for param in self._dense)
        if self.stepped and not self.holds_any and no_dense:
            raise nothing_came("fuse_backward")

    def _scan(self, part: _Part, grad: Tensor) -> None:
        ops, work = self._engine.ops, self._engine.work
        if hasattr(ops, "scan_one"):
            cast(Collecting, ops).scan_one(
                grad, part.param, part.table, part.tiles, part.active, part.norm, self._found_inf,
                work.scalars.arrived, work.scratch,
            )  # fmt: skip
        else:
            bound = ops.bind([grad], [part.param], part.table)
            ops.scan(bound, [], part.tiles, part.active, part.norm, self._found_inf, work.scratch)
        self._engine.settle_norms(part.norm, [grad])

    def _rank_waiting(self) -> None:
        """Rank small gradients together, as far as they are neighbours in the pool."""
        for first, last in _runs(sorted(self._waiting)):
            self._rank(first, [self._waiting[index] for index in range(first, last)])
        self._waiting = {}

    def _rank(self, first: int, grads: list[Tensor]) -> None:
        """Take the best frozen entries of the gradients of tensors first, first + 1, ..."""
        engine, last, scores = self._engine, first + len(grads), None
        pool, work, ranking = engine.pool, engine.work, engine.ranking
        if ranking.scored and bool(self._found_inf):  # the step will be skipped
            return
        active = engine.active.of_tensors(first, last)
        tiles = self._parts[first].tiles
        if ranking.scored or len(grads) > 1:
            numbers = slice(engine.first_tiles[first], engine.first_tiles[last])
            tiles = ranking.tiles.of_tensors(first, last, numbers)
        if ranking.scored:
            names, params = pool.names[first:last], pool.params[first:last]
            scores = scores_of(engine.method.importance, names, params, grads)
            noise = ranking.rule.noise
            if noise.numel():
                scores = perturbed(scores, noise, first)
            # In place of parameters, which nobody reads here, gradients: `Collected` keeps them.
            bound = engine.ops.bind(scores, grads, ranking.table[first:last])
            engine.ops.rank(bound, tiles, active, noise[:0], work.scratch)
        self._candidates.take(first, grads, scores, tiles, active, self._found_inf)


@dataclass(frozen=True)
class _Part:
    """A tensor of the pool, and its parts of the engine's buffers."""

    param: Tensor
    table: Tensor
    tiles: Tiles
    active: ActiveSet
    norm: Tensor

    @staticmethod
    def of(engine: Engine, index: int) -> _Part:
        work, numbers = engine.work, slice(*engine.first_tiles[index : index + 2])
        return _Part(
            param=engine.pool.params[index],
            table=work.table[index : index + 1],
            tiles=work.tiles.of_tensors(index, index + 1, numbers),
            active=engine.active.of_tensors(index, index + 1),
            norm=work.norms[index : index + 1],
        )


def _remove(handles: dict[int, RemovableHandle]) -> None:
    """Remove the hooks, and forget them."""
    for handle in handles.values():
        handle.remove()
    handles.clear()


def _hooks_of(param: Tensor) -> Iterator[_Hook]:
    hooks = param._post_accumulate_grad_hooks or {}
    return (hook for hook in hooks.values() if isinstance(hook, _Hook))


def _runs(indices: Sequence[int]) -> Iterator[tuple[int, int]]:
    """(first, last + 1) of each run of consecutive numbers in an ascending sequence."""
    start = 0
    for end in range(1, len(indices) + 1):
        if end == len(indices) or indices[end] != indices[end - 1] + 1:
            yield indices[start], indices[end - 1] + 1
            start = end

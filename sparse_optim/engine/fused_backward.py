"""Selection inside the backward pass: each gradient is scanned when it is produced, then freed.

    hook       scan: tile maxima, gradients of active entries, norm of the tensor, non-finite test
               cut:  its best frozen entries join the candidates (large tensors at once, small ones
               together, once they are BATCH_BYTES)
               param.grad <- None
    step()     the best of the candidates; append; clip; update

Norm, selection, moments and weights are those of an ordinary step, bit for bit, on every backend.
At most two gradients are alive at once, where autograd itself holds no more. Clipping and loss
scaling stay exact, since nothing moves before `step()`, which uses all gradients up, those of
groups with unmask="all", too. When nothing is left to unmask, only the ranking ends: every gradient
is still read, since a non-finite one anywhere must skip the step.

Importances other than D3 score each tensor as its gradient comes. They read counts from the device,
as in an ordinary step: those of static sets (PaFi, Fish, random masks) no more than once a step.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from sparse_optim.engine.candidates import Candidates
from sparse_optim.engine.ranking import scores_of_part, set_noise, unmasks, warn_of_scores
from sparse_optim.optim.groups import readable_grads
from sparse_optim.policy.importance import D3

if TYPE_CHECKING:
    from sparse_optim.optim.masked_adamw import MaskedAdamW

# Gradients below this wait for one another: ranking takes 0.1 ms a call, however small they are.
BATCH_BYTES = 1 << 20


def switched(optimizer: MaskedAdamW, wanted: bool) -> InBackward | None:
    """Register hooks or remove them, for `optimizer.fuse_backward = wanted`.

    Returns:
        what the optimizer shall take gradients with; None if it shall not.

    Raises:
        ValueError, RuntimeError: it cannot, or gradients were taken that no step has used.
    """
    now = optimizer._in_backward
    if wanted == (now is not None):
        return now
    if now is not None:
        now.check_idle("a change of fuse_backward")
        now.detach()
        return None
    _check_fusable(optimizer.selection, optimizer.capturable)
    if optimizer.max_grad_norm is None:
        warnings.warn(
            "fuse_backward=True without max_grad_norm: nothing clips gradients, since "
            "clip_grad_norm_ finds none and returns 0. Pass max_grad_norm to the optimizer "
            "(math.inf for no clipping)",
            UserWarning,
            stacklevel=4,
        )
    return InBackward(optimizer)


def _check_fusable(selection: Any, capturable: bool) -> None:
    """Raise ValueError where selection cannot happen inside the backward pass."""
    if selection.replaces:
        raise ValueError(
            "fuse_backward=True needs a set that only grows: use Increment or Static, got "
            f"{selection!r}"
        )
    if capturable:
        raise ValueError("fuse_backward=True cannot be captured in a CUDA graph: use one of both")
    _check_not_distributed()


def _check_not_distributed() -> None:
    distributed = torch.distributed
    started = distributed.is_available() and distributed.is_initialized()
    if started and distributed.get_world_size() > 1:
        raise RuntimeError(
            "fuse_backward=True does not work with several processes: gradients would be taken "
            "before DistributedDataParallel averages them; leave fuse_backward False"
        )


class _Hook:
    """Hands a parameter's gradient over; takes nothing once the optimizer is gone."""

    def __init__(self, owner: InBackward, index: int) -> None:
        self.owner = weakref.ref(owner)
        self.index = index

    def __call__(self, param: Tensor) -> None:
        owner = self.owner()
        if owner is not None and param.grad is not None:
            owner.take(self.index)


class InBackward:
    """What an optimizer with `fuse_backward=True` has taken from the backward pass of this step.

    Args:
        optimizer: whose pool gets hooks, and whose buffers are written. Not kept alive.

    Raises:
        ValueError: another optimizer takes the gradients of a parameter already.
    """

    def __init__(self, optimizer: MaskedAdamW) -> None:
        self._optimizer: MaskedAdamW = weakref.proxy(optimizer)
        pool, work, device = optimizer._pool, optimizer._work, optimizer._device
        self._sources = [_Source(optimizer, index) for index in range(len(pool))]
        self._found_inf = torch.zeros((), dtype=torch.float32, device=device)
        self._budget = int(optimizer._targets[-1])
        # A copy on the host, of the last step or the one before: what is complete stays complete.
        self._progress = torch.zeros(3, dtype=torch.int64, pin_memory=device.type == "cuda")
        self._progress.copy_(optimizer._active.progress, non_blocking=True)
        self._scored = not isinstance(optimizer.importance, D3)
        self._candidates = Candidates(
            optimizer._ops, optimizer.importance if isinstance(optimizer.importance, D3) else D3(),
            work, [param.numel() for param in pool], optimizer._targets,
            optimizer._active.progress,
        )  # fmt: skip
        self.discard()
        self._handles: dict[int, RemovableHandle] = {}
        self._attach()

    def _attach(self) -> None:
        """Register hooks where they are missing and can be: on what requires gradients."""
        pool, names = self._optimizer._pool, self._optimizer._names
        for index, (param, name) in enumerate(zip(pool, names, strict=True)):
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
        for handle in self._handles.values():
            handle.remove()
        self._handles = {}

    @property
    def holds_any(self) -> bool:
        """Whether gradients were taken that no step has used."""
        return any(self._taken)

    def check_idle(self, what: str) -> None:
        """Raise RuntimeError if gradients were taken that no step has used."""
        if self.holds_any:
            raise RuntimeError(
                f"{what} between backward() and step() would lose the gradients that "
                "fuse_backward=True has taken: call step() or zero_grad() first"
            )

    def discard(self) -> None:
        """Forget what was taken, as `zero_grad()` forgets gradients."""
        self._taken = [False] * len(self._sources)
        self._waiting: dict[int, Tensor] = {}
        self._candidates.clear()
        self._begun = self._ranks = self._stepped = False
        self._error: str | None = None

    @property
    def nbytes(self) -> int:
        """Bytes held beside the optimizer's own buffers."""
        return self._candidates.nbytes

    @torch.no_grad()
    def take(self, index: int) -> None:
        """Scan the gradient of a tensor of the pool, keep what may be needed, and free the rest.

        Raises:
            RuntimeError: a gradient of this tensor was taken already.
            TypeError, ValueError: as `readable_grads`.
        """
        self._check_first(index)
        optimizer, source = self._optimizer, self._sources[index]
        [grad] = readable_grads([source.param], [optimizer._names[index]])
        self._begin()
        source.param.grad = None
        self._taken[index] = True
        if grad.numel() == 0:
            return
        grad = grad.detach()
        self._scan(source, grad)
        if not self._ranks:
            return
        if grad.nbytes >= BATCH_BYTES:
            self._rank(index, [grad])
            return
        self._waiting[index] = grad
        if sum(waiting.nbytes for waiting in self._waiting.values()) >= BATCH_BYTES:
            self._rank_waiting()

    def take_rest(self) -> tuple[Any, list[Tensor]]:
        """Take gradients that came without a hook, and rank what waits.

        Returns:
            what stands for the gradients in `append` and `update`, bound and as a list: for each
            tensor of the pool its parameter where there is a gradient in this step, else an empty
            tensor.

        Raises:
            RuntimeError: a gradient was written after it had been taken, or none has come since
                the last step.
        """
        self._check_scaler()
        for index, source in enumerate(self._sources):
            if source.param.grad is not None:
                self.take(index)
        self._check_not_again()
        self._attach()
        self._rank_waiting()
        optimizer = self._optimizer
        grads = [
            source.param.detach() if taken else source.param.new_empty(0)
            for source, taken in zip(self._sources, self._taken, strict=True)
        ]
        return optimizer._ops.bind(grads, optimizer._pool, optimizer._work.table), grads

    def finish(self, bound: Any, grads: Sequence[Tensor], dense_grads: Sequence[Tensor]) -> None:
        """What `scan`, `cut` and `append` do in an ordinary step.

        Args:
            bound, grads: as `take_rest` returned them.
            dense_grads: of groups with unmask="all".
        """
        optimizer = self._optimizer
        work, active = optimizer._work, optimizer._active
        self._begin()
        nothing = optimizer._ops.bind([], [], work.table[:0])
        optimizer._ops.scan(
            nothing, dense_grads, active.position, active.offsets[:1], work.tile_offsets[:1],
            optimizer._ops.TILE, work.tile_max[:0], work.active_grad,
            work.norms[len(self._sources) :], self._found_inf, work.scratch,
        )  # fmt: skip
        work.found_inf.copy_(torch.maximum(work.found_inf, self._found_inf))
        grad = self._candidates.winners(work.found_inf, work.threshold)
        if self._scored and self._ranks and not bool(work.found_inf):
            warn_of_scores(optimizer, grads, any_left=bool(work.new_count))
        optimizer._append(bound)
        if grad.numel():
            new = active.unmask_step == active.progress[0] + 1
            work.active_grad.masked_scatter_(new, grad)

    def end(self) -> None:
        """The step is done, and all gradients are used up: dense ones may not accumulate alone."""
        self._progress.copy_(self._optimizer._active.progress, non_blocking=True)
        for param in self._optimizer._dense:
            param.grad = None
        self.discard()
        self._stepped = True

    def _begin(self) -> None:
        """Prepare for a step, before its first gradient."""
        if self._begun:
            return
        _check_not_distributed()
        self._optimizer._work.norms.zero_()
        self._found_inf.zero_()
        self._candidates.begin()
        if self._scored:
            self._ranks = unmasks(self._optimizer)
            set_noise(self._optimizer)
        else:
            self._ranks = int(self._progress[1]) < self._budget and self._candidates.wanted
        if self._ranks:
            self._optimizer._notice_writes()
        self._begun = True

    def _check_first(self, index: int) -> None:
        if self._taken[index] and self._error is None:
            self._error = (
                f"{self._optimizer._names[index]} got a second gradient before step() or "
                "zero_grad(). With fuse_backward=True the first one is gone, so that gradients "
                "cannot be accumulated (nor averaged by DistributedDataParallel): take a step "
                "after each backward(), or set optimizer.fuse_backward = False. zero_grad() "
                "discards what was taken"
            )
        if self._error is not None:
            raise RuntimeError(self._error)

    def _check_not_again(self) -> None:
        dense = self._optimizer._dense
        if self._stepped and not self.holds_any and all(param.grad is None for param in dense):
            raise RuntimeError(
                "no gradient has come since the last step(): with fuse_backward=True a step uses "
                "the gradients up, and cannot be repeated. Call backward() before step(), or "
                "zero_grad() after the last one to say that there are none"
            )

    def _check_scaler(self) -> None:
        optimizer: Any = self._optimizer
        if self._error is not None:
            raise RuntimeError(self._error)
        scaled = getattr(optimizer, "grad_scale", None) is not None
        if scaled and not getattr(optimizer, "_tells_found_inf", False):
            raise RuntimeError(
                "torch.amp.GradScaler finds no gradients to inspect with fuse_backward=True, so "
                "that it would never lower its scale: use sparse_optim.optim.grad_scaler.GradScaler"
            )

    def _scan(self, source: _Source, grad: Tensor) -> None:
        work, ops = self._optimizer._work, self._optimizer._ops
        ops.scan(
            ops.bind([grad], [source.param], source.table), [], self._optimizer._active.position,
            source.offsets, source.tile_offsets, ops.TILE, source.tile_max, work.active_grad,
            source.norm, self._found_inf, work.scratch,
        )  # fmt: skip

    def _rank_waiting(self) -> None:
        """Rank small gradients together, as far as they are neighbours in the pool."""
        for first, last in _runs(sorted(self._waiting)):
            self._rank(first, [self._waiting[index] for index in range(first, last)])
        self._waiting = {}

    def _rank(self, first: int, grads: list[Tensor]) -> None:
        """Take the best frozen entries of the gradients of tensors first, first + 1, ..."""
        if self._scored and bool(self._found_inf):  # the step will be skipped
            return
        optimizer, last = self._optimizer, first + len(grads)
        work, active = optimizer._work, optimizer._active
        tiles = slice(optimizer._first_tile[first], optimizer._first_tile[last])
        param_bound = work.param_bound[tiles]
        tile_offsets = work.tile_offsets[first : last + 1] - work.tile_offsets[first]
        offsets, params = active.offsets[first : last + 1], optimizer._pool[first:last]
        tile_max, scores = work.tile_max[tiles], scores_of_part(optimizer, first, grads)
        if scores is not None:
            ranking = optimizer._ranking
            tile_max = ranking.tile_max[tiles]
            optimizer._ops.rank(
                optimizer._ops.bind(scores, params, ranking.table[first:last]), active.position,
                offsets, tile_offsets, ranking.noise[:0], optimizer._ops.TILE, tile_max,
                work.scratch,
            )  # fmt: skip
        hopeful = self._candidates.hopeful(tile_max, param_bound)
        if hopeful is not None:
            self._candidates.add(
                first, grads, scores, params, hopeful, param_bound, tile_offsets, active.position,
                offsets, self._found_inf,
            )  # fmt: skip


class _Source:
    """A tensor of the pool, and its parts of the optimizer's buffers."""

    def __init__(self, optimizer: MaskedAdamW, index: int) -> None:
        work, tiles = optimizer._work, optimizer._first_tile[index : index + 2]
        self.param = optimizer._pool[index]
        self.table = work.table[index : index + 1]
        self.offsets = optimizer._active.offsets[index : index + 2]
        self.tile_offsets = work.tile_offsets[index : index + 2] - work.tile_offsets[index]
        self.tile_max = work.tile_max[tiles[0] : tiles[1]]
        self.norm = work.norms[index : index + 1]


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

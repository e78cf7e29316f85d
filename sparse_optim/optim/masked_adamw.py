"""MaskedAdamW: the torch.optim face of the engine."""

from __future__ import annotations

import logging
import operator
import weakref
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from itertools import chain
from threading import Lock
from typing import Any

import torch
from torch import Tensor
from torch._compile import _disable_dynamo  # torch.compiler.disable imports the compiler

from sparse_optim.backends.operands import BiasCorrection
from sparse_optim.backends.registry import BackendName
from sparse_optim.delta import Delta
from sparse_optim.delta._fingerprint import BaseFingerprints
from sparse_optim.engine.blocks import is_sharded, local_of
from sparse_optim.engine.choose import choose
from sparse_optim.engine.engine import Engine, Method, Norm, Source
from sparse_optim.engine.fused_backward import FusedBackward
from sparse_optim.engine.pool import readable_gradients
from sparse_optim.engine.replicas import has_group
from sparse_optim.engine.sampled import SampledBackward, dense_gradients
from sparse_optim.engine.scalars import check_capture
from sparse_optim.engine.sharded import ShardedEngine, engine_for
from sparse_optim.optim import checkpoint, state
from sparse_optim.optim.attach import Attachment, find_layers
from sparse_optim.optim.dense_groups import plan_dense_step, start_dense, take_dense_step
from sparse_optim.optim.gradient_watch import GradientWatch
from sparse_optim.optim.groups import (
    check_max_grad_norm,
    check_method,
    check_new_group,
    check_not_in_zero,
    check_rejected,
    check_takes_gradients,
    check_unsharded,
    normalize_group,
    resolve_norm,
    split_groups,
)
from sparse_optim.optim.left_out import LeftOut
from sparse_optim.optim.readout import (
    Layout,
    Moved,
    delta_of,
    layout_of,
    metrics_of,
    moved_entries,
)
from sparse_optim.optim.whole import hasher_of, whole_of
from sparse_optim.policy.importance import Importance, traits_of
from sparse_optim.policy.selection import Selection, resolve_budget

logger = logging.getLogger(__name__)


class MaskedAdamW(torch.optim.Optimizer):
    """AdamW that moves only the entries which an importance and a selection unmask.

    Each step ranks all frozen entries of the pool together, unmasks the most important ones, and
    updates the active entries. Frozen entries keep their initial bits; weight decay does not touch
    them. Moments (and float32 master values of 16-bit parameters) exist for active entries only.

    On a GPU, a step queues all its work on the current stream. Use one stream for the optimizer:
    where `step()`, `extend()`, `add_param_group()` and `load_state_dict()` are called on another
    one than before, let it wait for that first (`wait_stream`), as for any tensor.

    Parameters may be sharded (DTensors: `fully_shard`, tensor parallelism): all processes build the
    optimizer alike and step together. The budget is that of the whole model, and what is unmasked
    is the same for any number of processes (see `sparse_optim.engine.sharded`).

    Args:
        params: parameters, named parameters, or param groups. A group may set `lr`, `betas`, `eps`,
            `weight_decay`, `maximize`, and `unmask`:
            "rank" (default): its entries compete for the budget;
            "all": trained densely, outside the budget, as torch.optim.AdamW does (a fresh head);
            "none": stays frozen, and counts in no norm.
        lr: float or one-element tensor, parameter units per step.
        betas, eps, weight_decay: as in torch.optim.AdamW.
        amsgrad, differentiable: only False.
        importance: ranks the entries: `D3`, another class of `sparse_optim.policy.importance`, or
            a function of (name, param, grad). D3 alone needs no extra pass and no dense scores.
        selection: `Increment`, `Static`, `Repeat` or `Stochastic`.
        max_grad_norm: clip gradients to this global norm, within the step and without writing
            `.grad`; None does not clip. Use it instead of `clip_grad_norm_`.
        norm: "all" takes the global norm of every gradient; "active" of the gradients that move
            something in this step: those of active entries and of dense groups. Default: "active"
            with sampled_backward, which has no others, else "all".
        bias_correction: "entry" counts Adam's step from the entry's unmasking; "global" from the
            first step, as dense AdamW under a mask does.
        backend: "cpp", "cuda", "triton", "reference", or "auto": the fastest one that is installed
            and agrees with the reference on the device.
        maximize: ascend instead of descend.
        capturable: allow `step()` to be captured in a CUDA graph, with the backends that never wait
            for the device ("cuda", "triton"). Take a step before the capture. A replay reads an lr
            that is a tensor on the device; other hyper-parameters stay. Unmasking goes on.
        foreach, fused: accepted for compatibility with AdamW; the step is always fused.
        fuse_backward: take each gradient when the backward pass has produced it, and free it: no
            gradient buffer (see `sparse_optim.engine.fused_backward`). `clip_grad_norm_` then sees
            no gradients, clips nothing and returns 0: use `max_grad_norm`. The results are the
            same bit for bit. Works with any importance, with `Increment` or `Static`, in a single
            process, without gradient accumulation.
        model: whose layers `sampled_backward` uses; held weakly.
        sampled_backward: in steps that unmask nothing (a complete set; with `every=r` all but every
            r-th), Linear, Conv1D and Embedding layers of `model` compute weight gradients at active
            entries alone: the training step then costs little more than one without weight
            gradients. Selections are the same; gradients are equal up to the order of summation.
            `step()` consumes the gradients. Works with `Increment` or `Static`; with
            `fuse_backward` no dense gradient is ever held. May be changed between steps. In several
            processes, first call init_process_group(), then build the optimizer, then
            DistributedDataParallel(model): it leaves the gradients of these weights to `step()`,
            which averages those of active entries alone in such steps.
        shard_invariant: with clipping and in dense groups, too, any number of processes that share
            sharded parameters gives the same bits as one process; without, the same up to rounding.
            Set it in all runs to be compared. Costs about ten more passes over the gradients.

    Raises:
        ValueError, TypeError: names the argument or parameter, what arrived and what to do.

    Reference: Agarwal et al. 2025, Step-by-Step Unmasking, TACL 13:1767-1788.
    """

    _step_supports_amp_scaling = True
    _fused_backward: FusedBackward | None = None
    _sampled: SampledBackward | None = None
    _attachment: Attachment | None = None
    _left_out: LeftOut | None = None
    _model: weakref.ref[torch.nn.Module] | None = None
    _told_length = False
    scaler_reads_scan = False
    """Set by `sparse_optim.amp.GradScaler` while it steps: it takes `found_inf` from the scan."""

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        importance: Importance,
        selection: Selection,
        max_grad_norm: float | None = None,
        norm: Norm | None = None,
        bias_correction: BiasCorrection = "entry",
        backend: BackendName = "auto",
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        fuse_backward: bool = False,
        model: torch.nn.Module | None = None,
        sampled_backward: bool = False,
        shard_invariant: bool = False,
    ) -> None:
        check_method(importance, selection, bias_correction)
        check_not_in_zero()
        self.max_grad_norm = max_grad_norm
        defaults = {
            "lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "amsgrad": amsgrad,
            "maximize": maximize, "unmask": "rank",
        }  # fmt: skip
        super().__init__(params, defaults)
        pool, self._dense = split_groups(self.param_groups)
        self._listed, self._asked = self._list_params(), backend
        chosen = choose(backend, pool.device)
        waits = selection.replaces or traits_of(importance).in_kernel is None
        check_rejected(capturable, differentiable, pool.device, chosen, waits)
        if capturable:
            check_unsharded("capturable", pool)
        self.capturable = capturable
        ranked = any(group["unmask"] == "rank" for group in self.param_groups)
        budget = resolve_budget(selection.budget, pool.rankable_entries) if ranked else 0
        self._base = BaseFingerprints().extended(pool.params, hasher_of(pool))
        self._given_norm = norm
        method = Method(
            importance, selection, bias_correction, resolve_norm(norm, sampled_backward),
            shard_invariant,
        )  # fmt: skip
        self._model = None if model is None else weakref.ref(model)
        self._engine = engine_for(pool, method, selection.targets(budget), chosen)
        self._watch = GradientWatch()
        self._stepping = Lock()
        self._show_state(self._engine)
        self.fuse_backward = fuse_backward
        self.sampled_backward = sampled_backward

    @property
    def engine(self) -> Engine:
        """What does the work: buffers and operations, for tests and measurements.

        `extend`, `load_state_dict` and `add_param_group` put another one in its place.
        """
        return self._engine

    @property
    def backend(self) -> str:
        """Name of the backend that runs."""
        return self._engine.backend

    @property
    def importance(self) -> Importance:
        """What ranks the entries."""
        return self._engine.method.importance

    @property
    def selection(self) -> Selection:
        """How many entries become active, and when."""
        return self._engine.method.selection

    @property
    def bias_correction(self) -> BiasCorrection:
        """How an entry's age is counted: "entry" or "global"."""
        return self._engine.method.bias_correction

    @property
    def max_grad_norm(self) -> float | None:
        """Gradients are clipped to this global norm; None does not clip. May be changed."""
        return self._max_grad_norm

    @max_grad_norm.setter
    def max_grad_norm(self, norm: float | None) -> None:
        check_max_grad_norm(norm)
        self._max_grad_norm = norm

    @property
    def norm(self) -> Norm:
        """What the global norm is taken of."""
        return self._engine.method.norm

    @property
    def shard_invariant(self) -> bool:
        """Whether the results have the same bits however parameters are sharded."""
        return self._engine.method.shard_invariant

    @property
    def fuse_backward(self) -> bool:
        """Whether gradients are taken during the backward pass; may be changed between steps."""
        return self._fused_backward is not None

    @fuse_backward.setter
    def fuse_backward(self, wanted: bool) -> None:
        if wanted == self.fuse_backward:
            return
        self._check_idle("a change of fuse_backward")
        fused = None
        if wanted:
            check_unsharded("fuse_backward", self._engine.pool)
            check_takes_gradients(
                "fuse_backward", self.selection, self.capturable, self.max_grad_norm
            )
            fused = FusedBackward(self._engine, self._dense.params)
        elif self._fused_backward is not None:
            self._fused_backward.detach()
        self._fused_backward = fused
        if self.sampled_backward:
            self._attach(self._engine)

    @property
    def sampled_backward(self) -> bool:
        """Whether layers give gradients of active entries alone; may be changed between steps."""
        return self._sampled is not None

    @sampled_backward.setter
    def sampled_backward(self, wanted: bool) -> None:
        if wanted == self.sampled_backward:
            return
        self._check_idle("a change of sampled_backward")
        norm = resolve_norm(self._given_norm, wanted)
        if wanted:
            check_unsharded("sampled_backward", self._engine.pool)
            check_takes_gradients(
                "sampled_backward", self.selection, self.capturable, self.max_grad_norm
            )
            self._attach(self._engine)
        else:
            self._detach()
        self._engine.method = replace(self._engine.method, norm=norm)

    def _attach(self, engine: Engine) -> None:
        """Let the model's layers sample, by another engine or another inner source than before."""
        model = None if self._model is None else self._model()
        if model is None:
            raise ValueError(
                "sampled_backward=True needs the model whose layers give the gradients: pass "
                "model=model to the optimizer, and keep the model"
            )
        before = self._sampled
        self._detach()
        layers = find_layers(model, engine.pool.params)
        if not layers:
            raise ValueError(
                "sampled_backward=True, but no Linear, Conv1D or Embedding layer of the model has "
                "a weight that the optimizer ranks. Pass the model that holds the parameters"
            )
        if has_group():
            self._left_out = LeftOut.of(model)
            layers = self._left_out.choose(model, layers, engine.pool.params)
        inner = self._fused_backward or engine
        self._sampled = SampledBackward(engine, inner, self._dense.params, list(layers))
        self._sampled.stepped = before is not None and before.stepped
        self._attachment = Attachment(model, layers, self._sampled)
        if self._left_out is not None:
            self._left_out.take(model, self._sampled, self)

    def _detach(self) -> None:
        if self._attachment is not None:
            self._attachment.detach()
        self._sampled = self._attachment = None

    def dense_gradients(self) -> AbstractContextManager[None]:
        """A context in which forward passes give ordinary gradients for all entries.

        For calibration, Hessian-vector products and other uses of autograd than training with
        `sampled_backward=True`; does nothing without.
        """
        model = None if self._model is None else self._model()
        return nullcontext() if model is None else dense_gradients(model)

    @property
    def _source(self) -> Source:
        """Where gradients come from: `.grad`, the backward pass, or the layers."""
        return self._sampled or self._fused_backward or self._engine

    @property
    def holds_gradients(self) -> bool:
        """Whether the next step will find a gradient."""
        if self._taker is not None and self._taker.holds_any:
            return True
        params = (*self._engine.pool.params, *self._dense.params)
        return any(param.grad is not None and param.grad.numel() for param in params)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget all gradients, including those that the backward pass has handed over."""
        super().zero_grad(set_to_none)
        self._source.discard()

    @_disable_dynamo
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Unmask this step's quota of entries, then take one AdamW step on the active entries.

        A non-finite gradient anywhere skips the step as a whole: no parameter, moment, count or
        schedule moves; `metrics()["skipped_steps"]` counts it.
        """
        loss = None if closure is None else torch.enable_grad()(closure)()
        if not self._stepping.acquire(blocking=False):
            raise RuntimeError("step() is running in another thread: use one optimizer a thread")
        try:
            self._step()
        finally:
            self._stepping.release()
        return loss

    def _step(self) -> None:
        self._take_over()
        engine, source = self._engine, self._source
        self._check_step()
        if self._left_out is not None:
            self._left_out.begin_step(engine, self._sampled)
        grads = source.bind(readable_gradients(self._dense.params, self._dense.names))
        has_gradients = grads.any
        self._watch.note(has_gradients)
        if not has_gradients:
            source.discard()
            return
        # Nothing has moved if this, or what selects entries below, fails for want of memory.
        dense = plan_dense_step(
            self, grads.dense, self._scales_gradients, engine.method.shard_invariant
        )
        self._base.finalize(engine.pool.params)
        engine.begin(self.param_groups, self._given("grad_scale"), self._given("found_inf"))
        try:
            source.select(grads)  # scan, cut, append
            engine.clip(self.max_grad_norm)
            engine.update(grads)
            take_dense_step(dense, engine.work.scalars.grad_factor, engine.work.scalars.found_inf)
            source.end()
        finally:
            if self.state[self._owner][state.POSITION] is not engine.active.position:
                # The active set is another one now, or in larger buffers.
                self.state[self._owner].update(state.active_state(engine.active))

    def _given(self, name: str) -> Tensor | None:
        """`grad_scale` or `found_inf`, which torch.amp.GradScaler sets and deletes."""
        given = getattr(self, name, None)
        return None if given is None else whole_of(given)

    @property
    def _scales_gradients(self) -> bool:
        return self.max_grad_norm is not None or self._given("grad_scale") is not None

    def _check_step(self) -> None:
        """Raise RuntimeError where a step would move nothing, or could not be replayed, or would
        miss infinities.
        """
        self._check_state()
        if not self._owner.requires_grad:  # the pool's state moves to one that is not frozen
            self._show_state(self._engine)
        check_capture(
            self._engine.pool.device, self.capturable, self._base.final, self.param_groups,
            self._engine.known_hyper,
        )  # fmt: skip
        scaled = self._given("grad_scale") is not None
        if self._taker is not None and scaled and not self.scaler_reads_scan:
            raise RuntimeError(
                "torch.amp.GradScaler finds no gradients to inspect with fuse_backward=True or "
                "sampled_backward=True, so that it would never lower its scale: use "
                "sparse_optim.amp.GradScaler"
            )

    def _take_over(self) -> None:
        """Before the first step, train the sharded parameters that a wrapper (accelerate's FSDP2)
        has put into `param_groups`, in place of those that the optimizer was built with.

        Raises:
            RuntimeError: it holds other parameters for another reason.
        """
        listed = self._listed
        now = chain.from_iterable(group["params"] for group in self.param_groups)
        number = sum(len(group["params"]) for group in self.param_groups)
        if number == len(listed) and all(map(operator.is_, now, listed)):
            return
        held = self._list_params()
        same_shapes = [param.shape for param in held] == [param.shape for param in self._listed]
        were, are = ([is_sharded(param) for param in some] for some in (self._listed, held))
        if self._engine.calls or any(were) or not all(are) or not same_shapes:
            raise RuntimeError(
                "param_groups holds other parameters than the optimizer was built with (wrappers "
                "may replace them), so that it would train none of them. Wrap the model first, "
                "then build the optimizer; add_param_group() adds parameters"
            )
        for group in self.param_groups:
            check_new_group(group)
        self._check_idle("other parameters")
        if self._taker is not None:
            raise RuntimeError(
                "param_groups holds other parameters than the optimizer was built with: with "
                "fuse_backward or sampled_backward, wrap the model first, then build the optimizer"
            )
        pool, dense = split_groups(self.param_groups)
        if self.capturable:
            check_unsharded("capturable", pool)
        chosen, engine = choose(self._asked, pool.device), self._engine
        engine = engine_for(pool, engine.method, engine.targets, chosen)
        self._base = BaseFingerprints().extended(pool.params, hasher_of(pool))
        self._dense, self._listed, self.state = dense, held, defaultdict(dict)
        self._adopt(engine)

    def _show_state(self, engine: Engine) -> None:
        """Let `state` show the engine's buffers, and hold moments for each dense parameter."""
        owner = state.owner_of(self.param_groups)
        shown = defaultdict(dict, state.index_states(engine))
        for param in self._listed:
            shown[param]  # a parameter that stays frozen has an empty state: torch asks for one
        for param in self._dense.params:
            shown[param] = state.without_ours(self.state.get(param, {})) or start_dense(param)
        fingerprints = self._base.values if self._base.final else []
        shown[owner].update(state.pool_state(engine, fingerprints))
        self.state, self._owner = shown, owner

    def _check_state(self) -> None:
        """Raise RuntimeError if somebody has emptied or replaced `state`."""
        shown = self.state[self._owner].get(state.PROGRESS) if self._owner in self.state else None
        dense = all("exp_avg" in self.state.get(param, {}) for param in self._dense.params)
        if shown is not self._engine.active.progress or not dense:
            raise RuntimeError(
                "optimizer.state was cleared or replaced, but the pool's state is in the "
                "optimizer's own buffers: use load_state_dict(), or build a new optimizer"
            )

    def _check_length(self) -> None:
        """Say once where the schedule was made for another number of steps."""
        step, active, _ = self._engine.progress.tolist()
        total, budget = self._engine.total_steps, self._engine.budget
        if self._told_length or total == 1 or step in (0, total):
            return
        self._told_length = True
        logger.warning(
            "total_steps is %d, but %d steps were taken: %d of %d entries are unmasked. It is the "
            "number of optimizer steps of the whole run (Trainer: state.max_steps); extend() "
            "changes it, unmask_steps spends the budget sooner",
            total, step, active, budget,
        )  # fmt: skip

    def _list_params(self) -> list[Tensor]:
        """The parameters of all groups, to see whether somebody has replaced them."""
        return [param for group in self.param_groups for param in group["params"]]

    @property
    def _taker(self) -> SampledBackward | FusedBackward | None:
        """What takes gradients in the backward pass."""
        return self._sampled or self._fused_backward

    def _check_idle(self, what: str) -> None:
        if self._taker is not None:
            self._taker.check_idle(what)

    def _adopt(self, engine: Engine) -> None:
        """Go on with another engine; if its hooks cannot be registered, with the one at hand."""
        self._engine.drain()
        before, shown, sampled = self._fused_backward, self.state, self.sampled_backward
        self._show_state(engine)
        try:
            if before is not None:
                before.detach()
                self._fused_backward = FusedBackward(engine, self._dense.params)
                self._fused_backward.stepped = before.stepped
            if sampled:
                self._attach(engine)
        except BaseException:
            self._fused_backward, self.state = before, shown
            if before is not None:
                before.attach()
            raise
        self._engine = engine

    def _undo(self, before: dict[str, Any]) -> None:
        """Be what `vars` was before a change that failed."""
        vars(self).update(before)
        if self.sampled_backward:
            self._attach(self._engine)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; its entries join the pool after all others. The budget stays as it is.

        Raises:
            ValueError, TypeError: as the constructor; the optimizer is then unchanged.
        """
        group = normalize_group(param_group)
        check_new_group({**self.defaults, **group})
        if not hasattr(self, "_engine"):  # torch's constructor adds the first groups
            super().add_param_group(group)
            return
        self._check_idle("add_param_group()")
        self._take_over()
        super().add_param_group(group)
        before = dict(vars(self))
        try:
            pool, self._dense = split_groups(self.param_groups)
            self._base, self._listed = (
                self._base.extended(pool.params, hasher_of(pool)),
                self._list_params(),
            )
            engine = self._engine
            if (pool.shards is None) == (engine.pool.shards is None):
                self._adopt(engine.with_pool(pool))
            else:  # the first parameters that are ranked, and they are sharded
                self._adopt(engine_for(pool, engine.method, engine.targets, engine.backend))
        except BaseException:  # also when memory runs out
            self._undo(before)
            self.param_groups.pop()
            raise

    def refresh(self) -> None:
        """Take over parameter values written from outside, as after `model.load_state_dict`.

        Writes that autograd sees are noticed; call this after writing through `param.data`. After
        the first step it also says that those writes moved no frozen entry, as when a checkpoint
        of this run came back (`load_best_model_at_end`): `delta()` then trusts the parameters.
        """
        self._engine.refresh()
        self._engine.trust_values()
        self._base.invalidate()

    def extend(self, *, budget: int | float | None = None, total_steps: int | None = None) -> None:
        """Change the budget or the steps in the middle of a run; what is active stays active.

        Args:
            budget: the new budget, entries or share of the pool; not below the active entries.
            total_steps: the new length of the run, counted from its beginning.

        Raises:
            ValueError: if the budget is below the entries that are active already, or the steps
                below those that were taken.
        """
        self._take_over()
        engine = self._engine
        engine.pool.check_unchanged()
        current, steps = engine.budget, engine.total_steps
        selection = self.selection.extended(
            current if budget is None else budget, total_steps, current_steps=steps
        )
        entries = resolve_budget(selection.budget, engine.pool.rankable_entries)
        step, num_active, _ = engine.progress.tolist()
        if entries < num_active:
            raise ValueError(f"budget {entries} is below the {num_active} entries already active")
        if total_steps is not None and total_steps < step:
            raise ValueError(f"total_steps {total_steps} is below the {step} steps already taken")
        self._check_idle("extend()")
        method = replace(engine.method, selection=selection)
        resized, before = engine.resized(method, selection.targets(entries)), dict(vars(self))
        try:
            self._adopt(resized)
        except BaseException:
            self._undo(before)
            raise

    def state_dict(self) -> dict[str, Any]:
        """State in torch's form; `sparse_optim.optim.state` says what is in it.

        What belongs to the pool is a copy; as with torch.optim, dense moments are not. With sharded
        parameters all processes call it, and the pool's state is that of all of them: any number of
        processes can load it.
        """
        self._take_over()
        self._engine.pool.check_unchanged()
        self._check_state()
        self._show_state(self._engine)
        packed = super().state_dict()
        packed["state"] = {key: state.copied(value) for key, value in packed["state"].items()}
        if isinstance(self._engine, ShardedEngine):
            owner = next(key for key, param in enumerate(self._listed) if param is self._owner)
            packed["state"][owner].update(state.whole_state(self._engine))
        return packed

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Resume bit for bit. The checkpoint's budget and schedule win; `extend` changes them.

        Raises:
            ValueError: the state does not fit these parameters; the optimizer is then unchanged,
                as it is when memory runs out.
        """
        self._check_idle("load_state_dict()")
        self._take_over()
        before = dict(vars(self))
        prepare = self._optimizer_load_state_dict_pre_hooks
        finish = self._optimizer_load_state_dict_post_hooks
        state_dict = dict(state_dict)
        for change in prepare.values():
            changed = change(self, state_dict)
            state_dict = state_dict if changed is None else changed
        ours, torchs = checkpoint.split(self._engine, self.param_groups, state_dict)
        loaded = checkpoint.restore(self._engine, ours)  # the largest allocations come first
        try:
            # torch would call the hooks once our state is out, and before it is back.
            self._optimizer_load_state_dict_pre_hooks = OrderedDict()
            self._optimizer_load_state_dict_post_hooks = OrderedDict()
            super().load_state_dict(torchs)
            if ours.fingerprints:
                self._base = BaseFingerprints(ours.fingerprints, hasher_of(loaded.pool))
            elif self._base.final:  # no step had been taken: the base is what the next step finds
                hasher = hasher_of(loaded.pool)
                self._base = BaseFingerprints().extended(loaded.pool.params, hasher)
                self._base.invalidate()
            self._adopt(loaded)
        except BaseException:
            self._undo(before)
            raise
        self._optimizer_load_state_dict_pre_hooks = prepare
        self._optimizer_load_state_dict_post_hooks = finish
        for look in finish.values():
            look(self)

    def __getstate__(self) -> dict[str, Any]:
        """What copy.deepcopy and pickle keep: torch's own state, and ours."""
        self._check_idle("a copy")
        if self._engine.pool.shards is not None:
            raise TypeError(
                "an optimizer of sharded parameters belongs to its process group and cannot be "
                "copied or pickled: save its state_dict()"
            )
        kept = {
            name: value
            for name, value in self.__dict__.items()
            if not name.startswith(("_optimizer_", "_zero_grad_", "_stepping"))
            and not hasattr(type(self), name)  # a scheduler's wrapper around `step`
        }
        kept["_fused_backward"] = self.fuse_backward
        return {**super().__getstate__(), **kept}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Hooks are not copied: a copy registers its own on its own parameters."""
        super().__setstate__(state)
        if "_fused_backward" in state:
            self._stepping = Lock()
            fused = state["_fused_backward"]
            source = FusedBackward(self._engine, self._dense.params) if fused else None
            self._fused_backward = source
            self._show_state(self._engine)

    @property
    def grad_norm(self) -> Tensor:
        """Global gradient norm of the last step before clipping, 0-dim float64."""
        return self._engine.work.scalars.grad_norm

    def active_entries(self) -> dict[str, Tensor]:
        """Flat positions (int64, ascending) of the active entries of each tensor in the pool; of
        sharded parameters, within this process's shards."""
        return {
            name: self._engine.active.segment(index)["position"].long()
            for index, name in enumerate(self._engine.pool.names)
        }

    def metrics(self) -> dict[str, int | float]:
        """A flat dict of numbers for trackers: counts, norms, bytes; reads the device once.

        Of sharded parameters, counts are those of all processes, but `active/NAME` and bytes those
        of this one's shards: nothing is communicated.
        """
        dense = (state.without_ours(self.state[param]) for param in self._dense.params)
        taken = self._taker.nbytes if self._taker else 0
        moments = sum(local_of(tensor).nbytes for each in dense for tensor in each.values())
        return metrics_of(self._engine, taken + moments)

    @torch.no_grad()
    def delta(self, model: torch.nn.Module | None = None, *, finished: bool = True) -> Delta:
        """What fine-tuning changed so far: active entries, and dense groups whole.

        With sharded parameters all processes call it, and each gets the delta of the whole model:
        save it in one of them.

        Args:
            model: gives the names, where the optimizer was not built from named parameters; tied
                names; and buffers that training may move (running statistics), which are stored
                whole. Without it a delta has parameters alone.
            finished: whether the run is over. False, for a snapshot: no warning that fewer steps
                than `total_steps` were taken.

        Raises:
            ValueError: a parameter has no name, or is not the model's.
            RuntimeError: other code has written parameters since the first step, so that the
                delta might lack entries; the message says what to do.

        Logs a warning, once, where `total_steps` is not the number of steps that were taken.
        """
        self._check_unwritten()
        if finished:
            self._check_length()
        return delta_of(self._engine, self._layout(model, self._base.values))

    def layout(self, model: torch.nn.Module | None = None) -> Layout:
        """The tensors that `moved` and `delta` speak of, by name; see `delta` for `model`.

        Raises:
            ValueError: a parameter has no name, or is not the model's.
        """
        self._take_over()
        pool, prints = self._engine.pool, self._base.values
        if not self._base.final:  # until the first step, other weights may be loaded
            prints = hasher_of(pool).fingerprints(pool.params, range(len(pool.params)))
        return self._layout(model, prints)

    def _layout(self, model: torch.nn.Module | None, fingerprints: Sequence[str]) -> Layout:
        return layout_of(self._engine.pool, self._dense, self.param_groups, fingerprints, model)

    def moved(self) -> Moved:
        """The entries of ranked groups that may have moved so far, and their values.

        O(B); with `Repeat` and `Stochastic`, a bit for each entry of the model is read, too. With
        sharded parameters all processes call it, and each gets the entries of all.

        Raises:
            RuntimeError: as `delta`.
        """
        self._take_over()
        self._check_unwritten()
        self._engine.pool.check_unchanged()
        return moved_entries(self._engine)

    def _check_unwritten(self) -> None:
        """Raise RuntimeError if other code has written parameters since the first step."""
        if self._engine.written_anywhere():
            raise RuntimeError(
                "other code has written the parameters since the optimizer's first step "
                "(load_state_dict, DDP's Join, weight averaging), and the optimizer does not know "
                "which entries. If only values of this run came back (load_best_model_at_end), "
                "call optimizer.refresh() first; else take "
                "sparse_optim.delta.Delta.from_models(base, model) (of a sharded model, with its "
                "full_tensor()s)"
            )

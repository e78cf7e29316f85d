"""MaskedAdamW, and IncrementalMaskedAdamW (ID3) as its front door."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from sparse_optim.backends import registry as backends
from sparse_optim.backends.operands import ActiveSet, Touched, WorkSpace
from sparse_optim.delta import Delta
from sparse_optim.delta._fingerprint import BaseFingerprints
from sparse_optim.engine import buffers
from sparse_optim.engine.fused_backward import InBackward, switched
from sparse_optim.engine.ranking import Ranking, rank
from sparse_optim.engine.replacing import replace_active_set
from sparse_optim.engine.scalars import Rows, check_capture, hyper_rows, write_hyper, write_scalar
from sparse_optim.optim import checkpoint
from sparse_optim.optim.dense_groups import plan_dense_step, take_dense_step
from sparse_optim.optim.groups import (
    bind_grads,
    check_method,
    check_new_group,
    check_rejected,
    check_together,
    found_gradients,
    normalize_group,
    readable_grads,
)
from sparse_optim.optim.readout import delta_of, metrics_of
from sparse_optim.policy.importance import D3, Importance
from sparse_optim.policy.selection import Selection, resolve_budget


class MaskedAdamW(torch.optim.Optimizer):
    """AdamW that moves only the entries which an importance and a selection unmask.

    Each step ranks all still-frozen entries of the pool together, unmasks the most important ones,
    and updates the active entries. Frozen entries keep their initial bits, whatever the weight
    decay. Moments (and float32 master values of 16-bit parameters) exist for active entries only.

    Args:
        params: parameters, named parameters, or param groups. A group may set `lr`, `betas`, `eps`,
            `weight_decay`, `maximize`, and `unmask`:
            "rank" (default): its entries compete for the budget;
            "all": trained densely as by torch.optim.AdamW, outside the budget (a fresh head);
            "none": stays frozen, and counts in no norm.
        lr: float or one-element tensor, parameter units per step.
        betas, eps, weight_decay: as in torch.optim.AdamW; amsgrad, differentiable: only False.
        importance: ranks the entries: `D3`, another of `sparse_optim.policy.importance`, or a
            function of (name, param, grad). Only D3 is ranked without a pass and scores of its own.
        selection: `Increment`, `Static`, `Repeat` or `Stochastic`.
        max_grad_norm: clip gradients to this global norm, within the step and without touching
            `.grad`. Use it instead of `clip_grad_norm_`; with both, gradients are clipped twice.
        bias_correction: "entry" counts Adam's step from the entry's own unmasking; "global" from
            the first step, as dense AdamW under a mask does.
        backend: "cpp", "cuda", "triton", "reference", or "auto": the fastest that is installed and
            agrees with the reference on the device.
        maximize: ascend instead of descend.
        capturable: allow `step()` to be captured in a CUDA graph, by the backends that never wait
            for the device ("cuda", "triton"). Take a step before the capture. A replay reads an lr
            that is a tensor on the device; other hyper-parameters stay. Unmasking goes on.
        foreach, fused: accepted as arguments of AdamW; the step is always fused.
        fuse_backward: take each gradient when the backward pass has produced it, and free it: no
            gradient buffer (see `engine.fused_backward`). `clip_grad_norm_` then sees no gradients,
            clips nothing and returns 0: clip by `max_grad_norm` (`math.inf` for no clipping). The
            same results bit for bit; no gradient accumulation. Any importance, `Increment` or
            `Static`, one process.

    Raises:
        ValueError, TypeError: names the argument or parameter, what arrived, what to do.

    Reference: Agarwal et al. 2025, Step-by-Step Unmasking, TACL 13:1767-1788.
    """

    _step_supports_amp_scaling = True
    _in_backward: InBackward | None = None
    _steps_without_gradients: int | None = 0
    _work: WorkSpace  # this and those below are set by `buffers.allocate`
    _ranking: Ranking
    _spare: ActiveSet
    _first_tile: list[int]
    _versions: list[int]

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
        bias_correction: str = "entry",
        backend: str = "auto",
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        fuse_backward: bool = False,
    ) -> None:
        check_method(importance, selection, max_grad_norm, bias_correction)
        self.importance = importance
        self.selection = selection
        self.max_grad_norm = max_grad_norm
        self.bias_correction = bias_correction
        defaults = {
            "lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "amsgrad": amsgrad,
            "maximize": maximize, "unmask": "rank",
        }  # fmt: skip
        super().__init__(params, defaults)
        self.backend = backends.resolve(backend, self._device)
        waits = selection.replaces or not isinstance(importance, D3)
        check_rejected(capturable, differentiable, self._device, self.backend, waits)
        self.capturable = capturable
        ranked = any(group["unmask"] == "rank" for group in self.param_groups)
        budget = resolve_budget(selection.budget, self._pool_size()) if ranked else 0
        self._targets = selection.targets(budget).to(self._device)
        self._base = BaseFingerprints().extended(self._pool)
        self._hyper: Rows = []  # what the device knows of the groups' numbers
        self._active = ActiveSet.empty(self._pool, budget, self._device)
        self._touched = Touched(torch.empty(0, dtype=torch.int64, device=self._device))
        buffers.allocate(self)
        self.fuse_backward = fuse_backward

    @property
    def fuse_backward(self) -> bool:
        """Whether gradients are taken during the backward pass; may be changed between steps."""
        return self._in_backward is not None

    @fuse_backward.setter
    def fuse_backward(self, wanted: bool) -> None:
        self._in_backward = switched(self, wanted)

    def _check_idle(self, what: str) -> None:
        if self._in_backward is not None:
            self._in_backward.check_idle(what)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget all gradients, those that `fuse_backward=True` has taken, too."""
        super().zero_grad(set_to_none)
        if self._in_backward is not None:
            self._in_backward.discard()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Unmask this step's quota of entries, then take one AdamW step on the active entries.

        A non-finite gradient anywhere skips the step as a whole: no parameter, moment, count or
        schedule moves; `metrics()["skipped_steps"]` counts it.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        check_capture(
            self._device, self.capturable, self._base.settled, self.param_groups, self._hyper
        )
        fused = self._in_backward
        if fused:
            bound, grads = fused.take_rest()
        else:
            bound, grads = bind_grads(self._ops.bind, self._pool, self._names, self._work.table)
        dense_grads = readable_grads(self._dense, self._dense_names)
        if not found_gradients(self, grads + dense_grads):
            if fused:
                fused.discard()
            return loss
        is_scaled = self.max_grad_norm is not None or getattr(self, "grad_scale", None) is not None
        dense = plan_dense_step(self, dense_grads, is_scaled)
        self._prepare()
        if fused:
            fused.finish(bound, grads, dense_grads)
        elif self.selection.replaces:
            replace_active_set(self, bound, grads, dense_grads)
        else:
            self._scan(bound, dense_grads)
            self._cut(bound, grads)
            self._append(bound)
        self._clip()
        self._update(bound)
        take_dense_step(dense, self._work.grad_factor, self._work.found_inf)
        if fused:
            fused.end()
        return loss

    def _prepare(self) -> None:
        """Copy this step's scalars to the device; notice parameters that others have written."""
        work = self._work
        rows = hyper_rows(self.param_groups)
        write_hyper(work.hyper, self.param_groups, rows if rows != self._hyper else None)
        self._hyper = rows
        # Set and deleted by torch.amp.GradScaler around each step.
        write_scalar(work.grad_scale, getattr(self, "grad_scale", None), 1.0)
        write_scalar(work.found_inf, getattr(self, "found_inf", None), 0.0)
        self._base.settle(self._pool)
        self._notice_writes()

    def _notice_writes(self) -> None:
        """Take over parameter values that others have written since the last step."""
        if self._keeps_values:
            known = zip(self._pool, self._versions, strict=True)
            written = [i for i, (param, version) in enumerate(known) if param._version != version]
            buffers.refresh(self, written)

    def _scan(self, bound: Any, dense_grads: Sequence[Tensor]) -> None:
        active, work = self._active, self._work
        self._ops.scan(
            bound, dense_grads, active.position, active.offsets, work.tile_offsets, self._ops.TILE,
            work.tile_max, work.active_grad, work.norms, work.found_inf, work.scratch,
        )  # fmt: skip

    def _cut(self, bound: Any, grads: list[Tensor]) -> None:
        active, work = self._active, self._work
        if (ranked := rank(self, bound, grads)) is None:
            work.new_count.zero_()
            return
        self._ops.cut(
            ranked.bound, active.position, active.offsets, work.tile_offsets, ranked.tile_max,
            work.param_bound, self._targets, active.progress, work.found_inf, ranked.exp,
            ranked.eps, ranked.noise, self._ops.TILE, work.new_tensor, work.new_position,
            work.new_count, work.threshold, work.scratch,
        )  # fmt: skip

    def _append(self, bound: Any) -> None:
        active, work = self._active, self._work
        self._ops.append(
            bound, work.new_tensor, work.new_position, work.new_count, active.position,
            active.exp_avg, active.exp_avg_sq, active.unmask_step, active.master,
            work.active_grad, active.offsets, active.progress, work.scratch,
        )  # fmt: skip

    def _clip(self) -> None:
        work, limit = self._work, self.max_grad_norm or math.inf
        self._ops.clip(work.norms, work.grad_scale, limit, work.grad_norm, work.grad_factor)

    def _update(self, bound: Any) -> None:
        active, work = self._active, self._work
        self._ops.update(
            bound, active.position, active.offsets, work.active_grad, work.grad_factor,
            work.found_inf, work.hyper, work.group_index, self.bias_correction, active.exp_avg,
            active.exp_avg_sq, active.unmask_step, active.master, active.progress,
        )  # fmt: skip
        # Compiled operators write behind autograd's back: bump the versions that it checks.
        torch.autograd.graph.increment_version(self._pool)
        if self._keeps_values:
            self._versions = [param._version for param in self._pool]

    @property
    def _keeps_values(self) -> bool:
        """Whether anything here was computed from parameter values that others may overwrite."""
        return bool(self._work.param_bound.numel() or self._active.master.numel())

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; its entries join the pool after all others. The budget stays as it is.

        Raises:
            ValueError, TypeError: as the constructor; the optimizer is then unchanged.
        """
        group = normalize_group(param_group)
        check_new_group({**self.defaults, **group})
        self._check_idle("add_param_group()")
        super().add_param_group(group)
        try:
            self._index_params()
            if hasattr(self, "_active"):
                base = self._base.extended(self._pool)
                grown = buffers.moved(self, self._active.position.numel())
                buffers.reallocate(self, self._targets, grown)
                self._base = base
        except BaseException:  # out of memory, too
            self.param_groups.pop()
            if self.param_groups:
                self._index_params()
            raise

    def _index_params(self) -> None:
        """List the pool (groups of unmask="rank") and the dense parameters, with names."""
        pool, dense = [], []
        for row, group in enumerate(self.param_groups):
            names = group.get("param_names") or [
                f"group{row}.param{number}" for number in range(len(group["params"]))
            ]
            for name, param in zip(names, group["params"], strict=True):
                if group["unmask"] == "rank":
                    pool.append((name, param, row))
                elif group["unmask"] == "all":
                    dense.append((name, param, row))
        names = [name for name, *_ in pool + dense]
        check_together([param for _, param, _ in pool + dense], names)
        self._names, self._dense_names = names[: len(pool)], names[len(pool) :]
        self._pool = [param for _, param, _ in pool]
        self._dense = [param for _, param, _ in dense]
        self._group_index = [row for _, _, row in pool]
        self._device = next(iter(self._pool + self._dense), torch.empty(0)).device

    def _pool_size(self) -> int:
        """Entries that may be unmasked: those of the pool that require gradients."""
        return sum(param.numel() for param in self._pool if param.requires_grad)

    @property
    def _ops(self) -> Any:
        return backends.operations(self.backend)

    def refresh(self) -> None:
        """Take over parameter values written from outside, as after `model.load_state_dict`.

        Writes that autograd sees are noticed; call this after writing through `param.data`.
        """
        buffers.refresh(self, range(len(self._pool)))
        self._base.doubt()

    def extend(self, *, budget: int | float | None = None, total_steps: int | None = None) -> None:
        """Change the budget or the steps in the middle of a run; what is active stays active.

        Args:
            budget: the new budget, entries or share of the pool; not below the active entries.
            total_steps: the new length of the run, counted from its beginning.

        Raises:
            ValueError: if the budget is below the entries that are active already.
        """
        buffers.extend(self, budget, total_steps)

    def state_dict(self) -> dict[str, Any]:
        """State in torch's form, plus "unmask" (counts, schedule, fingerprints) under "state".

        Per-entry state of a parameter: position (int32), exp_avg, exp_avg_sq, unmask_step, master.
        """
        packed = checkpoint.pack(self)
        self.state.update(packed)
        try:
            return super().state_dict()
        finally:
            for key in packed:
                del self.state[key]

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Resume bit for bit. The checkpoint's budget and schedule win; `extend` changes them.

        Raises:
            ValueError: the state does not fit these parameters; the optimizer is then unchanged,
                as it is when memory runs out.
        """
        self._check_idle("load_state_dict()")
        checkpoint.load(self, state_dict, super().load_state_dict)

    def __getstate__(self) -> dict[str, Any]:
        """What copy.deepcopy and pickle keep: torch's own state, and ours."""
        kept = {
            name: value
            for name, value in self.__dict__.items()
            if not name.startswith(("_optimizer_", "_zero_grad_"))
            and not hasattr(type(self), name)  # a scheduler's wrapper around `step`
        }
        # A copy's parameters count their versions anew: none of them is known.
        kept["_versions"] = [-1] * len(self._pool)
        self._check_idle("a copy")
        kept["_in_backward"] = self.fuse_backward
        return {**super().__getstate__(), **kept}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Hooks are not copied: a copy registers its own on its own parameters."""
        super().__setstate__(state)
        if "_in_backward" in state:
            self._in_backward = InBackward(self) if state["_in_backward"] else None

    @property
    def grad_norm(self) -> Tensor:
        """Global gradient norm of the last step before clipping, 0-dim float64."""
        return self._work.grad_norm

    def active_entries(self) -> dict[str, Tensor]:
        """Flat positions (int64, ascending) of the active entries of each tensor in the pool."""
        return {
            name: self._active.segment(index)["position"].long()
            for index, name in enumerate(self._names)
        }

    def metrics(self) -> dict[str, int | float | str]:
        """A flat dict for trackers: counts, norms, bytes; reads the device once."""
        return metrics_of(self)

    @torch.no_grad()
    def delta(self, model: torch.nn.Module | None = None) -> Delta:
        """What fine-tuning changed so far: active entries, and dense groups whole.

        Args:
            model: gives the names, where the optimizer was not built from named parameters.

        Raises:
            ValueError: a parameter has no name, or no step has been taken yet.
        """
        return delta_of(self, model)

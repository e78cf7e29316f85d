"""Engine state <-> state_dict: what is written, and the checks of what is read.

torch's own loader would cast positions and float32 moments to the parameter's dtype, so per-entry
state is taken out before torch sees the rest.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from sparse_optim.backends.operands import ENTRY_FIELDS
from sparse_optim.engine.engine import Engine
from sparse_optim.optim.groups import check_group_options

logger = logging.getLogger(__name__)

MAX_STEPS = 2**31 - 1  # unmask_step is int32
UNMASK = "unmask"  # key under "state" of what belongs to no single parameter


@dataclass(frozen=True)
class EngineState:
    """What `split` found and checked.

    Attributes:
        segments: per-entry state of each tensor of the pool, as `ActiveSet.segment` gives it.
        progress, targets, threshold: as in `Engine`.
        fingerprints: of the base's tensors; none if no step had been taken.
        touched: entries that were ever active; None if the selection keeps its set.
    """

    segments: list[dict[str, Tensor]]
    progress: Tensor
    targets: Tensor
    threshold: Tensor
    fingerprints: list[str]
    touched: Tensor | None


def pack(engine: Engine, fingerprints: Sequence[str]) -> dict[Any, dict[str, Any]]:
    """Per-entry state under each pool parameter, and counts and schedule under "unmask"; copies."""
    engine.pool.check_unchanged()
    active = engine.active
    packed: dict[Any, dict[str, Any]] = {
        param: {name: value.clone() for name, value in active.segment(index).items()}
        for index, param in enumerate(engine.pool.params)
    }
    packed[UNMASK] = {
        "progress": active.progress.clone(),
        "targets": engine.targets.clone(),
        "threshold": engine.work.new.threshold.clone(),
        "fingerprints": list(fingerprints),
    }
    if engine.method.selection.replaces:
        packed[UNMASK]["touched"] = engine.touched.index().clone()
    return packed


def split(
    engine: Engine, param_groups: Sequence[dict[str, Any]], state_dict: dict[str, Any]
) -> tuple[EngineState, dict[str, Any]]:
    """Separate our state from what torch's loader handles; check ours against the parameters.

    Returns:
        (ours, the rest as a state_dict)

    Raises:
        ValueError: what does not fit, and what to do.
    """
    if not {"param_groups", "state"} <= set(state_dict):
        raise ValueError(f"not a state_dict of an optimizer: it has only {sorted(state_dict)}")
    groups, state = state_dict["param_groups"], state_dict["state"]
    theirs, ours = ([len(group["params"]) for group in some] for some in (groups, param_groups))
    if theirs != ours:
        raise ValueError(
            "the checkpoint's parameter groups do not match the optimizer's: "
            f"{theirs} against {ours} parameters"
        )
    _check_order(groups, param_groups)
    if UNMASK not in state:
        raise ValueError(
            "the checkpoint is not one of MaskedAdamW (state['unmask'] is missing); "
            "a dense AdamW checkpoint cannot be resumed sparsely"
        )
    selection = engine.method.selection
    if selection.replaces != ("touched" in state[UNMASK]):
        raise ValueError(
            "the checkpoint's selection is of another kind than the optimizer's "
            f"{selection}: one replaces its set at each step, the other keeps it"
        )
    modes = [group.get("unmask") for group in groups]
    if modes != [group["unmask"] for group in param_groups]:
        ours = [group["unmask"] for group in param_groups]
        raise ValueError(f"the checkpoint's groups have unmask={modes}, the optimizer's {ours}")
    keys = chain.from_iterable(group["params"] for group in groups)
    owners = chain.from_iterable(group["params"] for group in param_groups)
    key_of = {id(param): key for key, param in zip(keys, owners, strict=True)}
    pool, keep_master = engine.pool, bool(engine.active.master.numel())
    segments = []
    for param, name in zip(pool.params, pool.names, strict=True):
        segment = state.get(key_of[id(param)], {})
        _check_segment(segment, param, name, keep_master)
        segments.append(segment)
    _check_totals(state[UNMASK], segments, sum(param.numel() for param in pool.params))
    known = {key_of[id(param)] for param in pool.params} | {UNMASK}
    rest = {key: value for key, value in state.items() if key not in known}
    for group in param_groups:
        for param in group["params"] if group["unmask"] == "all" else ():
            if dense := state.get(key_of[id(param)]):
                _check_dense(dense, param)
                step = torch.as_tensor(dense["step"], dtype=torch.float32, device=param.device)
                rest[key_of[id(param)]] = {**dense, "step": step}
    run = {"touched": None, **state[UNMASK]}
    fields = ("progress", "targets", "threshold", "fingerprints", "touched")
    found = EngineState(segments, **{name: run[name] for name in fields})
    return found, {**state_dict, "state": rest, "param_groups": _whole(groups, param_groups)}


def restore(engine: Engine, state: EngineState) -> Engine:
    """An engine in a state that `split` checked; the one given stays as it is."""
    before, targets = engine.targets, state.targets
    if not torch.equal(targets.cpu(), before.cpu()):
        logger.warning(
            "the checkpoint's schedule (budget %d, %d steps) replaces the constructor's "
            "(budget %d, %d steps); extend() changes it",
            int(targets[-1]), targets.numel() - 1, int(before[-1]), before.numel() - 1,
        )  # fmt: skip
    return engine.restored(state.segments, state.progress, targets, state.threshold, state.touched)


def _whole(
    groups: Sequence[dict[str, Any]], param_groups: Sequence[dict[str, Any]]
) -> list[dict[str, Any]]:
    """The checkpoint's groups, with the optimizer's options where an older version had none."""
    whole = []
    for group, now in zip(groups, param_groups, strict=True):
        options = {name: value for name, value in now.items() if name != "params"}
        whole.append({**options, **group})
        try:
            check_group_options(whole[-1])
        except (TypeError, ValueError) as error:
            raise ValueError(f"checkpoint, param_groups: {error}") from None
    return whole


def _check(good: bool, problem: str) -> None:
    if not good:
        raise ValueError(f"checkpoint: {problem}. Is the file damaged, or of another model?")


def _check_tensor(value: object, name: str, dtype: torch.dtype, dims: int = 1) -> None:
    found = f"{value.dtype}, {value.dim()} dimensions" if isinstance(value, Tensor) else repr(value)
    good = isinstance(value, Tensor) and value.dtype == dtype and value.dim() == dims
    _check(good, f"{name} must be {dtype} with {dims} dimensions, found {found[:60]}")


def _check_moments(exp_avg: Tensor, exp_avg_sq: Tensor, owner: str) -> None:
    _check(bool(exp_avg.isfinite().all()), f"exp_avg of {owner} is not finite")
    good = bool((exp_avg_sq.isfinite() & (exp_avg_sq >= 0)).all())
    _check(good, f"exp_avg_sq of {owner} is negative or not finite")


def _check_order(groups: Sequence[dict[str, Any]], param_groups: Sequence[dict[str, Any]]) -> None:
    """Refuse names that have changed places; other names (a wrapper's prefix) say nothing."""
    saved, here = (
        [name for group in some for name in group.get("param_names", ())]
        for some in (groups, param_groups)
    )
    if len(saved) != len(here):
        return
    known = set(here)
    for ours, theirs in zip(here, saved, strict=True):
        if ours != theirs and theirs in known:
            raise ValueError(
                f"the checkpoint's parameters are in another order: {theirs!r} is where the "
                f"optimizer has {ours!r}. State is matched by place: pass the parameters in the "
                "order in which they were when the checkpoint was saved"
            )


def _check_segment(segment: dict[str, Tensor], param: Tensor, name: str, keep_master: bool) -> None:
    """Check the per-entry state of one tensor of the pool."""
    wanted = [field for field in ENTRY_FIELDS if field != "master" or keep_master]
    if any(field not in segment for field in wanted):
        raise ValueError(f"checkpoint of {name}: expected {wanted}, found {sorted(segment)}")
    for field in wanted:
        integers = field in ("position", "unmask_step")
        _check_tensor(
            segment[field], f"{field} of {name}", torch.int32 if integers else torch.float32
        )
    lengths = {len(segment[field]) for field in wanted}
    _check(len(lengths) == 1, f"the tensors of {name} have different lengths")
    position = segment["position"].long()
    inside = bool(((position >= 0) & (position < param.numel())).all())
    if not inside or bool((position.diff() <= 0).any()):
        raise ValueError(
            f"checkpoint of {name}: positions are not ascending within 0..{param.numel() - 1}; "
            "is this the same model?"
        )
    _check_moments(segment["exp_avg"], segment["exp_avg_sq"], name)


def _check_dense(state: dict[str, Any], param: Tensor) -> None:
    """Check the state of a parameter that is trained densely."""
    who = f"a dense parameter of shape {tuple(param.shape)}"
    for name in ("step", "exp_avg", "exp_avg_sq"):
        _check(name in state, f"{name} of {who} is missing")
    step = torch.as_tensor(state["step"])
    good = step.numel() == 1 and bool(step.isfinite() & (step >= 0))
    _check(good, f"step of {who} is {state['step']!r}")
    for name in ("exp_avg", "exp_avg_sq"):
        value = state[name]
        good = isinstance(value, Tensor) and value.shape == param.shape
        _check(good and value.is_floating_point(), f"{name} of {who} has another shape or dtype")
    _check_moments(state["exp_avg"], state["exp_avg_sq"], who)


def _check_totals(
    unmask: dict[str, Any], segments: list[dict[str, Tensor]], pool_entries: int
) -> None:
    """Check counts, schedule and fingerprints, and that they fit the segments."""
    missing = {"progress", "targets", "threshold", "fingerprints"} - set(unmask)
    if missing:
        raise ValueError(f"checkpoint: state['unmask'] lacks {sorted(missing)}")
    progress, targets, threshold = unmask["progress"], unmask["targets"], unmask["threshold"]
    _check_tensor(progress, "progress", torch.int64)
    _check_tensor(targets, "targets", torch.int64)
    _check_tensor(threshold, "threshold", torch.float32, dims=0)
    _check(progress.numel() == 3, f"progress has {progress.numel()} numbers, expected 3")
    _check(bool(threshold >= 0), f"threshold is {float(threshold)}")
    step, active, skipped = progress.tolist()
    good = 0 <= step < MAX_STEPS and 0 <= skipped < MAX_STEPS
    _check(good, f"it counts {step} applied and {skipped} skipped steps")
    fingerprints = unmask["fingerprints"]
    good = isinstance(fingerprints, list) and len(fingerprints) in (0, len(segments))
    good = good and all(isinstance(each, str) for each in fingerprints)
    _check(good, f"expected {len(segments)} fingerprints, or none")
    falls = targets.numel() < 2 or bool((targets.diff() < 0).any())
    if falls or int(targets[0]) != 0 or int(targets[-1]) > pool_entries:
        raise ValueError(
            f"checkpoint: targets do not rise from 0 to a budget of at most {pool_entries} entries"
        )
    total = sum(segment["position"].numel() for segment in segments)
    if total != active or total > int(targets[-1]):
        raise ValueError(
            f"checkpoint: {total} active entries, but it counts {active} of a budget of "
            f"{int(targets[-1])}"
        )
    for segment in segments:
        unmasked = segment["unmask_step"]
        _check(
            bool(((unmasked >= 1) & (unmasked <= step)).all()),
            f"entries were unmasked outside of steps 1 to {step}",
        )
    if "touched" in unmask:
        touched = unmask["touched"]
        _check_tensor(touched, "touched", torch.int64)
        inside = bool(((touched >= 0) & (touched < pool_entries)).all())
        _check(inside and not bool((touched.diff() <= 0).any()), "touched is not ascending")

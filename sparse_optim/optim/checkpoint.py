"""Read a state_dict into an engine: both formats, and every check of what is read.

`sparse_optim.optim.state` describes format 2. Format 1 had the per-entry state under each
parameter, and the rest under "unmask", which is no parameter.

torch's own loader would cast positions and float32 moments to the parameter's dtype, so our state
is taken out before torch sees the rest.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, pairwise
from typing import Any

import torch
from torch import Tensor

from sparse_optim.backends.operands import ENTRY_FIELDS
from sparse_optim.backends.targets import (
    budget_of,
    check_targets,
    is_formula,
    same_targets,
    total_steps,
)
from sparse_optim.engine.engine import Engine
from sparse_optim.engine.touched import Touched
from sparse_optim.optim.groups import check_group_options
from sparse_optim.optim.state import DIGEST_BYTES, INDEX, OURS, PROGRESS, without_ours
from sparse_optim.optim.whole import placed_like, whole_of

logger = logging.getLogger(__name__)

MAX_STEPS = 2**31 - 1  # unmask_step is int32
FORMAT_1 = "unmask"
OTHERS_FROZEN = (
    "checkpoint: the pool's state is missing. torch.distributed.checkpoint leaves out the state of "
    "frozen parameters: freeze the same ones (requires_grad) as when it was saved, before the "
    "optimizer is built"
)

Segments = list[dict[str, Tensor]]


@dataclass(frozen=True)
class EngineState:
    """What `split` found and checked.

    Attributes:
        segments: per-entry state of each tensor of the pool, as `ActiveSet.segment` gives it.
        progress, targets, threshold: as in `Engine`.
        fingerprints: of the base's tensors; none if no step had been taken.
        touched: entries that were ever active; None if the selection keeps its set.
        written: whether other code had written parameters.
        known: as `Completion.flags`; empty where the checkpoint has none.
    """

    segments: Segments
    progress: Tensor
    targets: Tensor
    threshold: Tensor
    fingerprints: list[str]
    touched: Touched | None
    written: bool
    known: list[bool]


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
    _check(all("params" in group for group in groups), "a group has no 'params'")
    theirs, ours = ([len(group["params"]) for group in some] for some in (groups, param_groups))
    if theirs != ours:
        raise ValueError(
            "the checkpoint's parameter groups do not match the optimizer's: "
            f"{theirs} against {ours} parameters"
        )
    _check_names(groups, param_groups)
    keys = list(chain.from_iterable(group["params"] for group in groups))
    params = chain.from_iterable(group["params"] for group in param_groups)
    key_of = {id(param): key for key, param in zip(keys, params, strict=True)}
    of_pool = [state.get(key_of[id(param)], {}) for param in engine.pool.params]
    for key, each in state.items():
        _check(isinstance(each, dict), f"the state of {key!r} is a {type(each).__name__}")
    if not any(key == FORMAT_1 or PROGRESS in each for key, each in state.items()):
        if any(INDEX in each for each in state.values()):
            raise ValueError(OTHERS_FROZEN)
        raise ValueError(
            f"the checkpoint is not one of MaskedAdamW (no parameter's state has {PROGRESS!r}); "
            "a dense AdamW checkpoint cannot be resumed sparsely"
        )
    modes, wanted = ([group.get("unmask") for group in some] for some in (groups, param_groups))
    if modes != wanted:
        raise ValueError(f"the checkpoint's groups have unmask={modes}, the optimizer's {wanted}")
    if FORMAT_1 in state:
        run, segments = _read_format_1(state[FORMAT_1], engine), of_pool
    else:
        run = _read_run(state, engine)
        _check_places(of_pool, engine)
        segments = _cut_segments(run, engine)
    selection = engine.method.selection
    if selection.replaces != ("touched" in run):
        raise ValueError(
            "the checkpoint's selection is of another kind than the optimizer's "
            f"{selection}: one replaces its set at each step, the other keeps it"
        )
    keep_master = bool(engine.active.master.numel())
    for segment, param, name in zip(segments, engine.pool.params, engine.pool.names, strict=True):
        _check_segment(segment, param, name, keep_master)
    _check_totals(run, segments, engine.pool.entries)
    found = EngineState(
        segments, run["progress"], run["targets"], run["threshold"], run["fingerprints"],
        run.get("touched"), bool(run.get("written", False)), _read_known(run, engine),
    )  # fmt: skip
    rest = {}
    for group in param_groups:
        for param in group["params"] if group["unmask"] == "all" else ():
            dense = without_ours(state.get(key_of[id(param)], {}))
            if not dense and FORMAT_1 not in state:  # format 1 had none before the first step
                _check(not param.requires_grad, "the state of a dense parameter is missing")
            if dense:
                _check_dense(dense, param)
                step = torch.as_tensor(dense["step"], dtype=torch.float32, device=param.device)
                moments = {
                    name: torch.empty_like(param).copy_(placed_like(param, dense[name]))
                    for name in ("exp_avg", "exp_avg_sq")
                }
                rest[key_of[id(param)]] = {**dense, "step": step.clone(), **moments}
    return found, {**state_dict, "state": rest, "param_groups": _whole(groups, param_groups)}


def _read_run(state: dict[Any, dict[str, Any]], engine: Engine) -> dict[str, Any]:
    """The pool's state, which one parameter's state holds (format 2), by the engine's names."""
    runs = [each for each in state.values() if PROGRESS in each]
    _check(len(runs) == 1, f"{len(runs)} parameters hold the pool's state, expected 1")
    run = {str(name).removeprefix(OURS): value for name, value in runs[0].items()}
    if any(isinstance(value, dict) for value in run.values()):  # as flat states come back
        raise ValueError(OTHERS_FROZEN)
    number = len(engine.pool.params)
    wanted = {*ENTRY_FIELDS, "offsets", "targets", "threshold", "base"} - {"master"}
    if missing := wanted - set(run):
        raise ValueError(f"checkpoint: the pool's state lacks {sorted(missing)}")
    written = torch.as_tensor(run.get("written", 0))
    _check(written.numel() == 1, f"written has {written.numel()} numbers, expected 1")
    base = run["base"]
    good = isinstance(base, Tensor) and base.dtype == torch.uint8
    _check(good and base.shape == (number, DIGEST_BYTES), f"expected {number} fingerprints")
    taken = bool(base.any())
    run["fingerprints"] = [bytes(row).hex() for row in base.tolist()] if taken else []
    if engine.method.selection.replaces and "touched" in run:
        bits, size = run["touched"], engine.touched.bits.numel()
        _check_tensor(bits, "touched", torch.uint8)
        _check(bits.numel() == size, f"touched has {bits.numel()} bytes, expected {size}")
        run["touched"] = Touched(bits.to(engine.pool.device, copy=True))
    return run


def _read_known(run: dict[str, Any], engine: Engine) -> list[bool]:
    if "known" not in run or not engine.completion.lag:
        return []
    _check_tensor(run["known"], "known", torch.uint8)
    found, wanted = run["known"].numel(), engine.completion.lag + 1
    _check(found == wanted, f"known has {found} flags, expected {wanted}")
    return [bool(flag) for flag in run["known"].tolist()]


def _check_places(states: Sequence[dict[str, Any]], engine: Engine) -> None:
    """Refuse parameters of the pool that were at other places in it."""
    for place, (state, param, name) in enumerate(
        zip(states, engine.pool.params, engine.pool.names, strict=True)
    ):
        if isinstance(state.get(INDEX), dict):
            raise ValueError(OTHERS_FROZEN)
        if INDEX not in state:  # torch.distributed.checkpoint leaves frozen parameters out
            _check(not param.requires_grad, f"the state of {name} is missing")
            continue
        index = state[INDEX]
        good = isinstance(index, (int, Tensor)) and torch.as_tensor(index).numel() == 1
        good = good and not torch.as_tensor(index).is_floating_point()
        _check(good, f"the place of {name} is {index!r}")
        if int(index) != place:
            raise ValueError(
                f"the checkpoint's parameters are in another order: {name} was at place "
                f"{int(index)} of the pool, not {place}. Pass the parameters in the order in which "
                "they were when the checkpoint was saved"
            )


def _cut_segments(run: dict[str, Any], engine: Engine) -> Segments:
    """Per-entry state of each tensor, of the buffers that hold that of all (format 2)."""
    offsets, number = run["offsets"], len(engine.pool.params)
    _check_tensor(offsets, "offsets", torch.int64)
    _check(
        offsets.numel() == number + 1, f"it is for {offsets.numel() - 1} tensors, expected {number}"
    )
    fields = [name for name in ENTRY_FIELDS if name in run]
    for name in fields:
        integers = name in ("position", "unmask_step")
        _check_tensor(run[name], name, torch.int32 if integers else torch.float32)
    bounds, least = offsets.tolist(), min(run[name].numel() for name in fields)
    rising = bounds[0] == 0 and all(first <= last for first, last in pairwise(bounds))
    _check(rising and bounds[-1] <= least, f"offsets do not rise from 0 to at most {least}")
    return [{name: run[name][first:last] for name in fields} for first, last in pairwise(bounds)]


def _read_format_1(run: dict[str, Any], engine: Engine) -> dict[str, Any]:
    """What a checkpoint of format 1 says of the whole pool."""
    if missing := {"progress", "targets", "threshold", "fingerprints"} - set(run):
        raise ValueError(f"checkpoint: state['unmask'] lacks {sorted(missing)}")
    fingerprints, number = run["fingerprints"], len(engine.pool.params)
    good = isinstance(fingerprints, list) and len(fingerprints) in (0, number)
    good = good and all(isinstance(each, str) for each in fingerprints)
    _check(good, f"expected {number} fingerprints, or none")
    if not engine.method.selection.replaces or "touched" not in run:
        return run
    touched, entries = run["touched"], engine.pool.entries
    _check_tensor(touched, "touched", torch.int64)
    inside = bool(((touched >= 0) & (touched < entries)).all())
    _check(inside and not bool((touched.diff() <= 0).any()), "touched is not ascending")
    return {**run, "touched": Touched.of(touched.to(engine.pool.device), entries)}


def restore(engine: Engine, state: EngineState) -> Engine:
    """An engine in a state that `split` checked; the one given stays as it is."""
    before, targets = engine.targets, state.targets
    if not same_targets(targets, before):
        theirs = budget_of(targets), total_steps(targets)
        ours = budget_of(before), total_steps(before)
        spread = ", spent in other steps" if theirs == ours else ""
        logger.warning(
            "the checkpoint's schedule (budget %d, %d steps%s) replaces the constructor's "
            "(budget %d, %d steps); extend() changes it",
            *(*theirs, spread, *ours),
        )
    return engine.restored(
        state.segments, state.progress, targets, state.threshold, state.touched, state.written,
        state.known,
    )  # fmt: skip


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
    good = good and value.layout is torch.strided and not value.is_meta  # type: ignore[attr-defined]
    _check(good, f"{name} must be {dtype} with {dims} dimensions, found {found[:60]}")


def _check_moments(exp_avg: Tensor, exp_avg_sq: Tensor, owner: str) -> None:
    # Of sharded moments all processes get the same answer.
    _check(bool(whole_of(exp_avg.isfinite().all())), f"exp_avg of {owner} is not finite")
    good = bool(whole_of((exp_avg_sq.isfinite() & (exp_avg_sq >= 0)).all()))
    _check(good, f"exp_avg_sq of {owner} is negative or not finite")


def _check_names(groups: Sequence[dict[str, Any]], param_groups: Sequence[dict[str, Any]]) -> None:
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
    good = isinstance(state["step"], (int, float, Tensor))
    step = torch.as_tensor(state["step"] if good else -1)
    good = good and step.numel() == 1 and bool(step.isfinite() & (step >= 0))
    _check(good, f"step of {who} is {state['step']!r}")
    for name in ("exp_avg", "exp_avg_sq"):
        value = state[name]
        good = isinstance(value, Tensor) and value.layout is torch.strided and not value.is_meta
        good = good and value.shape == param.shape
        _check(good and value.is_floating_point(), f"{name} of {who} has another shape or dtype")
    _check_moments(state["exp_avg"], state["exp_avg_sq"], who)


def _check_totals(run: dict[str, Any], segments: Segments, pool_entries: int) -> None:
    """Check counts and schedule, and that they fit the segments."""
    progress, targets, threshold = run["progress"], run["targets"], run["threshold"]
    _check_tensor(progress, "progress", torch.int64)
    is_2d = isinstance(targets, Tensor) and is_formula(targets)
    _check_tensor(targets, "targets", torch.int64, dims=2 if is_2d else 1)
    _check_tensor(threshold, "threshold", torch.float32, dims=0)
    _check(progress.numel() == 3, f"progress has {progress.numel()} numbers, expected 3")
    _check(bool(threshold >= 0), f"threshold is {float(threshold)}")
    step, active, skipped = progress.tolist()
    good = 0 <= step < MAX_STEPS and 0 <= skipped < MAX_STEPS
    _check(good, f"it counts {step} applied and {skipped} skipped steps")
    try:
        check_targets(targets, pool_entries)
    except ValueError as error:
        raise ValueError(f"checkpoint: {error}") from None
    total = sum(segment["position"].numel() for segment in segments)
    if total != active or total > budget_of(targets):
        raise ValueError(
            f"checkpoint: {total} active entries, but it counts {active} of a budget of "
            f"{budget_of(targets)}"
        )
    for segment in segments:
        unmasked = segment["unmask_step"]
        _check(
            bool(((unmasked >= 1) & (unmasked <= max(step, 1))).all()),
            f"entries were unmasked outside of steps 1 to {max(step, 1)}",
        )

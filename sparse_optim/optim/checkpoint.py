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

logger = logging.getLogger(__name__)

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
    groups, state = state_dict["param_groups"], state_dict["state"]
    theirs, ours = ([len(group["params"]) for group in some] for some in (groups, param_groups))
    if theirs != ours:
        raise ValueError(
            "the checkpoint's parameter groups do not match the optimizer's: "
            f"{theirs} against {ours} parameters"
        )
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
        raise ValueError(f"the checkpoint's groups have unmask={modes}, the optimizer's differ")
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
    run = {"touched": None, **state[UNMASK]}
    fields = ("progress", "targets", "threshold", "fingerprints", "touched")
    found = EngineState(segments, **{name: run[name] for name in fields})
    return found, {**state_dict, "state": rest}


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


def _check_segment(segment: dict[str, Tensor], param: Tensor, name: str, keep_master: bool) -> None:
    wanted = [field for field in ENTRY_FIELDS if field != "master" or keep_master]
    if any(field not in segment for field in wanted):
        raise ValueError(f"checkpoint of {name}: expected {wanted}, found {sorted(segment)}")
    position = segment["position"]
    if position.dtype != torch.int32:
        raise ValueError(
            f"checkpoint of {name}: position is {position.dtype}; expected torch.int32"
        )
    if len({segment[field].shape for field in wanted}) != 1 or position.dim() != 1:
        raise ValueError(f"checkpoint of {name}: its tensors have different lengths")
    if position.numel():
        ascending = bool((position.diff() > 0).all())
        if not ascending or int(position[0]) < 0 or int(position[-1]) >= param.numel():
            raise ValueError(
                f"checkpoint of {name}: positions are not ascending within 0..{param.numel() - 1}; "
                "is this the same model?"
            )


def _check_totals(
    unmask: dict[str, Any], segments: list[dict[str, Tensor]], pool_entries: int
) -> None:
    missing = {"progress", "targets", "threshold", "fingerprints"} - set(unmask)
    if missing:
        raise ValueError(f"checkpoint: state['unmask'] lacks {sorted(missing)}")
    progress, targets = unmask["progress"], unmask["targets"]
    if progress.shape != (3,) or unmask["threshold"].numel() != 1:
        raise ValueError(f"checkpoint: progress has shape {tuple(progress.shape)}; expected (3,)")
    if len(unmask["fingerprints"]) not in (0, len(segments)):
        raise ValueError(
            f"checkpoint: {len(unmask['fingerprints'])} fingerprints for {len(segments)} tensors"
        )
    falls = targets.dim() != 1 or targets.numel() < 2 or bool((targets.diff() < 0).any())
    if falls or int(targets[0]) < 0 or int(targets[-1]) > pool_entries:
        raise ValueError(
            f"checkpoint: targets do not rise from 0 to a budget of at most {pool_entries} entries"
        )
    total = sum(segment["position"].numel() for segment in segments)
    if total != int(progress[1]) or total > int(targets[-1]):
        raise ValueError(
            f"checkpoint: {total} active entries, but it counts {int(progress[1])} "
            f"of a budget of {int(targets[-1])}"
        )

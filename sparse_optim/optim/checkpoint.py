"""state_dict and delta of a MaskedAdamW: what is written, and the checks of what is read.

torch's own loader would cast positions and float32 moments to the parameter's dtype, so per-entry
state is taken out before torch sees the rest.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sparse_optim.backends.operands import ENTRY_FIELDS, ActiveSet, Touched
from sparse_optim.delta._fingerprint import BaseFingerprints
from sparse_optim.engine import buffers

if TYPE_CHECKING:
    from sparse_optim.optim.masked_adamw import MaskedAdamW

logger = logging.getLogger(__name__)

UNMASK = "unmask"  # key under "state" of what belongs to no single parameter


def pack(optimizer: MaskedAdamW) -> dict[Any, dict[str, Any]]:
    """Per-entry state under each pool parameter, and counts and schedule under "unmask"; copies."""
    active = optimizer._active
    packed: dict[Any, dict[str, Any]] = {
        param: {name: value.clone() for name, value in active.segment(index).items()}
        for index, param in enumerate(optimizer._pool)
    }
    packed[UNMASK] = {
        "progress": active.progress.clone(),
        "targets": optimizer._targets.clone(),
        "threshold": optimizer._work.threshold.clone(),
        "fingerprints": list(optimizer._base.values) if optimizer._base.settled else [],
    }
    if optimizer.selection.replaces:
        packed[UNMASK]["touched"] = optimizer._touched.index().clone()
    return packed


def split(
    optimizer: MaskedAdamW, state_dict: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Separate our state from what torch's loader handles; check ours against the parameters.

    Returns:
        ({"unmask": ..., "segments": one dict for each tensor of the pool}, the rest as a
        state_dict)

    Raises:
        ValueError: what does not fit, and what to do.
    """
    groups, state = state_dict["param_groups"], state_dict["state"]
    if [len(group["params"]) for group in groups] != [
        len(group["params"]) for group in optimizer.param_groups
    ]:
        raise ValueError(
            "the checkpoint's parameter groups do not match the optimizer's: "
            f"{[len(group['params']) for group in groups]} against "
            f"{[len(group['params']) for group in optimizer.param_groups]} parameters"
        )
    if UNMASK not in state:
        raise ValueError(
            "the checkpoint is not one of MaskedAdamW (state['unmask'] is missing); "
            "a dense AdamW checkpoint cannot be resumed sparsely"
        )
    if optimizer.selection.replaces != ("touched" in state[UNMASK]):
        raise ValueError(
            "the checkpoint's selection is of another kind than the optimizer's "
            f"{optimizer.selection}: one replaces its set at each step, the other keeps it"
        )
    modes = [group.get("unmask") for group in groups]
    if modes != [group["unmask"] for group in optimizer.param_groups]:
        raise ValueError(f"the checkpoint's groups have unmask={modes}, the optimizer's differ")
    keys = chain.from_iterable(group["params"] for group in groups)
    owners = chain.from_iterable(group["params"] for group in optimizer.param_groups)
    key_of = {id(param): key for key, param in zip(keys, owners, strict=True)}
    segments = []
    for param, name in zip(optimizer._pool, optimizer._names, strict=True):
        segment = state.get(key_of[id(param)], {})
        _check_segment(segment, param, name, keep_master=bool(optimizer._active.master.numel()))
        segments.append(segment)
    _check_totals(state[UNMASK], segments, sum(param.numel() for param in optimizer._pool))
    ranked = {key_of[id(param)] for param in optimizer._pool}
    rest = {key: value for key, value in state.items() if key != UNMASK and key not in ranked}
    return {UNMASK: state[UNMASK], "segments": segments}, {**state_dict, "state": rest}


def load(
    optimizer: MaskedAdamW, state_dict: dict[str, Any], load_torchs: Callable[[Any], None]
) -> None:
    """Adopt a checkpoint as a whole, or, where it does not fit or memory runs out, nothing of it.

    Args:
        load_torchs: `torch.optim.Optimizer.load_state_dict`, for groups and dense parameters.
    """
    ours, torchs = split(optimizer, state_dict)
    before = dict(vars(optimizer))
    try:
        load_torchs(torchs)
        unpack(optimizer, ours)
    except BaseException:
        vars(optimizer).update(before)
        raise


def unpack(optimizer: MaskedAdamW, ours: dict[str, Any]) -> None:
    """Adopt what `split` checked."""
    unmask, before = ours[UNMASK], optimizer._targets
    targets, capacity = unmask["targets"], int(unmask["targets"][-1])
    if not torch.equal(targets.cpu(), before.cpu()):
        logger.warning(
            "the checkpoint's schedule (budget %d, %d steps) replaces the constructor's "
            "(budget %d, %d steps); extend() changes it",
            capacity, targets.numel() - 1, int(before[-1]), before.numel() - 1,
        )  # fmt: skip
    # Whatever can run out of memory comes first.
    loaded = ActiveSet.empty(optimizer._pool, capacity, optimizer._device)
    loaded.fill(ours["segments"], unmask["progress"])
    master, touched = loaded.master.clone(), optimizer._touched
    if "touched" in unmask:
        touched = Touched(unmask["touched"].to(optimizer._device, copy=True))
    buffers.reallocate(optimizer, targets.clone(), loaded)
    loaded.master.copy_(master)  # the parameters that it was compared with may be yet to be loaded
    optimizer._touched = touched
    optimizer._work.threshold.copy_(unmask["threshold"])
    if unmask["fingerprints"]:  # else no step had been taken: the base is what is here then
        optimizer._base = BaseFingerprints(unmask["fingerprints"])
    # Not now: the model may be loaded after the optimizer. The next step looks at the parameters.
    optimizer._versions = [-1] * len(optimizer._pool)


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

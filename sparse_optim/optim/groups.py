"""Param groups: normalised, checked, and split into the pool and the dense parameters.

Every message names what was wrong and what to do.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from types import FrameType, FunctionType
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from sparse_optim.backends.operands import BiasCorrection
from sparse_optim.engine.blocks import is_sharded
from sparse_optim.engine.engine import Norm
from sparse_optim.engine.pool import Pool, check_param, check_together
from sparse_optim.engine.shards import Shards
from sparse_optim.policy.importance import Importance, traits_of
from sparse_optim.policy.selection import Selection
from sparse_optim.warn import warn_user

Unmask = Literal["rank", "all", "none"]
BIAS_CORRECTIONS = get_args(BiasCorrection)
UNMASK_MODES = get_args(Unmask)


@dataclass(frozen=True)
class DenseParams:
    """Parameters of groups with unmask="all": trained densely, outside the budget."""

    params: tuple[Tensor, ...]
    names: tuple[str, ...]


def split_groups(param_groups: Sequence[dict[str, Any]]) -> tuple[Pool, DenseParams]:
    """The pool (groups with unmask="rank") and the dense parameters (unmask="all").

    Raises:
        ValueError: as `check_together`.
        TypeError, RuntimeError: as `Shards`.
    """
    pool: list[tuple[Tensor, str, int]] = []
    dense: list[tuple[Tensor, str]] = []
    frozen: dict[str, Tensor] = {}
    for row, group in enumerate(param_groups):
        names = group.get("param_names") or [
            f"group{row}.param{number}" for number in range(len(group["params"]))
        ]
        for param, name in zip(group["params"], names, strict=True):
            if group["unmask"] == "rank":
                pool.append((param, name, row))
            elif group["unmask"] == "all":
                dense.append((param, name))
            else:
                frozen[name] = param
    params, names, rows = zip(*pool, strict=True) if pool else ((), (), ())
    dense_params, dense_names = zip(*dense, strict=True) if dense else ((), ())
    together = [*params, *dense_params]
    check_together(together, [*names, *dense_names], frozen if together else None)
    device = next(iter(together), torch.empty(0)).device
    shards = Shards(params, names, dense_params) if any(map(is_sharded, together)) else None
    split = Pool(params, names, rows, len(param_groups), len(dense), device, shards)
    return split, DenseParams(dense_params, dense_names)


def normalize_group(group: dict[str, Any]) -> dict[str, Any]:
    """Copy a param group, its parameters listed once each (tied weights count once)."""
    if not isinstance(group, dict):
        raise TypeError(f"param_group must be a dict, got {type(group).__name__}")
    given = group.get("params")
    if given is None:
        raise ValueError("param_group has no 'params'")
    if isinstance(given, (set, frozenset)):
        raise TypeError("parameters must come in an order that stays: pass a list, not a set")
    listed = [given] if isinstance(given, Tensor) else list(given)
    once: dict[int, Any] = {}
    for item in listed:
        tensor = item[1] if isinstance(item, tuple) else item
        once.setdefault(id(tensor), item)
    return {**group, "params": list(once.values())}


def check_group_options(group: dict[str, Any]) -> None:
    """Raise ValueError where an option is out of range or not supported."""
    lr, betas = group["lr"], group["betas"]
    if isinstance(lr, Tensor) and lr.numel() != 1:
        raise ValueError(f"lr: a tensor must hold one element, got shape {tuple(lr.shape)}")
    if not lr >= 0:
        raise ValueError(f"lr must be at least 0, got {float(lr)}")
    if len(betas) != 2 or not all(0 <= float(beta) < 1 for beta in betas):
        raise ValueError(f"betas must be two numbers from 0 up to but not including 1, got {betas}")
    if not group["eps"] >= 0:
        raise ValueError(f"eps must be at least 0, got {group['eps']}")
    if not group["weight_decay"] >= 0:
        raise ValueError(f"weight_decay must be at least 0, got {group['weight_decay']}")
    if not isinstance(group.get("maximize", False), bool):
        raise ValueError(f"maximize must be True or False, got {group['maximize']!r}")
    if group["unmask"] not in UNMASK_MODES:
        raise ValueError(f"unmask must be one of {UNMASK_MODES}, got {group['unmask']!r}")
    if group.get("amsgrad"):
        raise ValueError(
            "amsgrad=True is not supported: it needs a third moment for each entry; leave it False"
        )


def check_max_grad_norm(norm: float | None) -> None:
    """Raise ValueError unless gradients can be clipped to this norm."""
    if norm is not None and not norm > 0:
        raise ValueError(f"max_grad_norm must be above 0 (None does not clip), got {norm}")


def check_method(importance: Importance, selection: Selection, bias_correction: str) -> None:
    """Raise ValueError where an argument that belongs to no group is out of range."""
    if isinstance(importance, type) or not callable(importance):
        raise ValueError(
            "importance must be D3(...), Magnitude(), another importance or a function of (name, "
            f"param, grad), got {importance!r}"
        )
    if isinstance(selection, type) or not hasattr(selection, "replaces"):
        raise ValueError(
            "selection must be Increment(...), Static(...), Repeat(...) or Stochastic(...), "
            f"got {selection!r}"
        )
    if traits_of(importance).ordinal and selection.noise_seed is not None:
        raise ValueError(
            f"{type(importance).__name__} gives an order, not weights to sample by: use Static, "
            "Increment or Repeat"
        )
    if bias_correction not in BIAS_CORRECTIONS:
        raise ValueError(
            f"bias_correction must be one of {BIAS_CORRECTIONS}, got {bias_correction!r}"
        )


def check_rejected(
    capturable: bool, differentiable: bool, device: torch.device, backend: str, waits: bool
) -> None:
    """Raise ValueError for options of torch.optim.AdamW that cannot be honoured.

    Args:
        waits: whether steps of the method read the device.
    """
    if differentiable:
        raise ValueError("differentiable=True is not supported: the step runs in fused kernels")
    if capturable and device.type != "cuda":
        raise ValueError(f"capturable=True is for CUDA graphs, but the parameters are on {device}")
    if capturable and backend == "reference":
        raise ValueError(
            "capturable=True needs backend='cuda' or 'triton': the reference backend waits for the "
            "device in every step"
        )
    if capturable and waits:
        raise ValueError(
            "capturable=True needs importance D3 and a selection that keeps what it unmasked "
            "(Increment, Static): others wait for the device in every step"
        )


def check_not_in_zero() -> None:
    """Raise TypeError where torch's ZeroRedundancyOptimizer is building this optimizer.

    Each process would spend the whole budget on its own share of the parameters, and clip by the
    norm of that share.
    """
    zero = sys.modules.get("torch.distributed.optim.zero_redundancy_optimizer")
    if zero is None:
        return
    # Not by the locals of a frame: looking at them keeps them alive as long as the frame.
    methods = vars(zero.ZeroRedundancyOptimizer).values()
    codes = {method.__code__ for method in methods if isinstance(method, FunctionType)}
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code in codes:
            raise TypeError(
                "ZeroRedundancyOptimizer gives each process a share of the parameters, so that "
                "each would spend the whole budget on its own: use the optimizer without it; its "
                "state holds the active entries alone and needs no sharding"
            )
        frame = frame.f_back


def check_unsharded(option: str, pool: Pool) -> None:
    """Raise ValueError for an option that does not work with sharded parameters."""
    if pool.shards is not None:
        raise ValueError(
            f"{option}=True does not work with sharded parameters (fully_shard, tensor "
            "parallelism), whose gradients come by communication: leave it False"
        )


def check_takes_gradients(
    option: str, selection: Selection, capturable: bool, max_grad_norm: float | None
) -> None:
    """Raise ValueError where the backward pass cannot hand gradients to the optimizer.

    Warns where nothing will clip gradients.

    Args:
        option: fuse_backward or sampled_backward.
    """
    if selection.replaces:
        raise ValueError(
            f"{option}=True needs a set that only grows: use Increment or Static, got {selection!r}"
        )
    if capturable:
        raise ValueError(f"{option}=True cannot be captured in a CUDA graph: use one of both")
    if max_grad_norm is None:
        finds = "finds none and returns 0" if option == "fuse_backward" else "does not find all"
        warn_user(
            f"{option}=True without max_grad_norm: nothing clips gradients, since clip_grad_norm_ "
            f"{finds}. Pass max_grad_norm to the optimizer (math.inf for no clipping)"
        )


def resolve_norm(norm: str | None, sampled_backward: bool) -> Norm:
    """What the norm is taken of, where None is given too.

    Raises:
        ValueError: an unknown norm, or one for which gradients would be missing.
    """
    if norm not in (None, "all", "active"):
        raise ValueError(f"norm must be 'all' or 'active', got {norm!r}")
    if norm == "all" and sampled_backward:
        raise ValueError(
            "sampled_backward=True has no gradients of frozen entries, so that it cannot take the "
            "norm of all: use norm='active', and choose max_grad_norm for it"
        )
    return "active" if norm == "active" or sampled_backward else "all"


def check_new_group(group: dict[str, Any]) -> None:
    """Raise ValueError or TypeError where a group's options or parameters cannot be optimized."""
    check_group_options(group)
    for number, item in enumerate(group["params"]):
        name, param = item if isinstance(item, tuple) else (f"parameter {number}", item)
        if isinstance(param, Tensor):
            check_param(param, name, group["unmask"])

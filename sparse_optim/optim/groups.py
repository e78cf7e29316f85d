"""Checks of parameters, groups and gradients; every message names what was wrong and what to do."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from sparse_optim.policy.importance import Magnitude
from sparse_optim.policy.selection import Increment, Static, Stochastic

BIAS_CORRECTIONS = ("entry", "global")
UNMASK_MODES = ("rank", "all", "none")
SUPPORTED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# One tensor's positions are int32, the pool's global indices 33 bits.
MAX_TENSOR_ENTRIES = 2**31 - 1
MAX_POOL_ENTRIES = 2**33 - 1
STEPS_WITHOUT_GRADIENTS = 10  # the first so many, and a warning comes


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
    if group["unmask"] not in UNMASK_MODES:
        raise ValueError(f"unmask must be one of {UNMASK_MODES}, got {group['unmask']!r}")
    if group.get("amsgrad"):
        raise ValueError(
            "amsgrad=True is not supported: it needs a third moment for each entry; leave it False"
        )


def check_method(
    importance: object, selection: object, max_grad_norm: float | None, bias_correction: str
) -> None:
    """Raise ValueError where an argument that belongs to no group is out of range."""
    if isinstance(importance, type) or not callable(importance):
        raise ValueError(
            "importance must be D3(...), Magnitude(), another importance or a function of (name, "
            f"param, grad), got {importance!r}"
        )
    if not isinstance(selection, (Increment, Static)):
        raise ValueError(
            "selection must be Increment(...), Static(...), Repeat(...) or Stochastic(...), "
            f"got {selection!r}"
        )
    if isinstance(importance, Magnitude) and isinstance(selection, Stochastic):
        raise ValueError(
            "Magnitude gives an order, not weights to sample by: use Static, Increment or Repeat"
        )
    if max_grad_norm is not None and not max_grad_norm > 0:
        raise ValueError(f"max_grad_norm must be above 0 (None does not clip), got {max_grad_norm}")
    if bias_correction not in BIAS_CORRECTIONS:
        raise ValueError(
            f"bias_correction must be one of {BIAS_CORRECTIONS}, got {bias_correction!r}"
        )


def check_rejected(
    capturable: bool, differentiable: bool, device: torch.device, backend: str, waits: bool
) -> None:
    """Raise ValueError for options of torch.optim.AdamW that cannot be honoured.

    `waits` tells of a method whose steps read the device.
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


def describe(param: Tensor, name: str) -> str:
    """'encoder.weight (768, 768)', for messages."""
    return f"{name} {tuple(param.shape)}"


def check_param(param: Tensor, name: str, mode: str) -> None:
    """Raise TypeError or ValueError for a parameter that cannot be optimized."""
    who = describe(param, name)
    if type(param).__name__ in ("Params4bit", "Int8Params") or param.dtype in (
        torch.uint8,
        torch.int8,
    ):
        raise TypeError(
            f"{who} is quantized ({type(param).__name__}, {param.dtype}): its entries are codes "
            "that cannot move one by one. Load the model in bfloat16, or train adapters on top of "
            "it (give only their parameters)"
        )
    if mode == "none":
        return
    if param.dtype not in SUPPORTED_DTYPES:
        raise TypeError(f"{who} is {param.dtype}; expected float32, bfloat16 or float16")
    if hasattr(param, "to_local"):
        raise TypeError(
            f"{who} is a DTensor; sharded parameters (fully_shard, tensor parallelism) are not "
            "supported yet: keep the model whole in each process"
        )
    if param.is_meta:
        raise ValueError(f"{who} is on the meta device: load the weights before the optimizer")
    if param.layout is not torch.strided:
        raise TypeError(f"{who} has layout {param.layout}; expected a dense (strided) tensor")
    if mode == "rank" and not param.is_contiguous():
        raise ValueError(
            f"{who} is not contiguous (strides {param.stride()}); make it so before building the "
            "optimizer: param.data = param.data.contiguous()"
        )
    if mode == "all" and not torch.ops.aten.is_non_overlapping_and_dense(param):
        raise ValueError(
            f"{who} has gaps or overlaps in memory (strides {param.stride()}); make it dense "
            "before building the optimizer: param.data = param.data.contiguous()"
        )
    if mode == "rank" and param.numel() > MAX_TENSOR_ENTRIES:
        raise ValueError(f"{who} has more than {MAX_TENSOR_ENTRIES} entries; split the tensor")


def check_new_group(group: dict[str, Any]) -> None:
    """Raise ValueError or TypeError where a group's options or parameters cannot be optimized."""
    check_group_options(group)
    for number, item in enumerate(group["params"]):
        name, param = item if isinstance(item, tuple) else (f"parameter {number}", item)
        if isinstance(param, Tensor):
            check_param(param, name, group["unmask"])


def check_together(params: Sequence[Tensor], names: Sequence[str]) -> None:
    """Raise ValueError where parameters lie on several devices, share memory or are too many."""
    if sum(param.numel() for param in params) > MAX_POOL_ENTRIES:
        raise ValueError(f"the parameters have more than {MAX_POOL_ENTRIES} entries")
    for param, name in zip(params, names, strict=True):
        if param.device != params[0].device:
            raise ValueError(
                f"parameters are on several devices: {names[0]} on {params[0].device}, "
                f"{name} on {param.device}; use one optimizer per device"
            )
    spans = sorted(
        (param.data_ptr(), param.data_ptr() + param.nbytes, name)
        for param, name in zip(params, names, strict=True)
        if param.numel()
    )
    for (_, end, name), (begin, _, other) in pairwise(spans):
        if begin < end:
            raise ValueError(
                f"{name} and {other} share memory; give tied weights as one and the same Parameter"
            )


def zero_matrices(named_params: Iterable[tuple[str, Tensor]]) -> list[str]:
    """Names of the matrices (two dimensions or more) that are zero throughout: a fresh LoRA's B."""
    matrices = ((name, param) for name, param in named_params if param.dim() > 1 and param.numel())
    return [name for name, param in matrices if not param.any()]


def bind_grads(
    bind: Callable[..., Any], params: Sequence[Tensor], names: Sequence[str], table: Tensor
) -> tuple[Any, list[Tensor]]:
    """What a backend's `bind` makes of this step's gradients, and these.

    `bind` looks at every tensor as it is; only what it refuses is looked at here, to be copied or
    explained. On cold caches looking twice at 200 tensors took 0.17 ms of a 10 ms step.
    """
    grads = [param.new_empty(0) if (grad := param.grad) is None else grad for param in params]
    try:
        return bind(grads, params, table), grads
    except (RuntimeError, TypeError, ValueError):
        grads = readable_grads(params, names)
        return bind(grads, params, table), grads


def readable_grads(params: Sequence[Tensor], names: Sequence[str]) -> list[Tensor]:
    """The gradients of `params`, contiguous; an empty tensor where there is none.

    Raises:
        TypeError: sparse or complex gradients, or a dtype that the kernels do not read.
        ValueError: a gradient of another shape or on another device than its parameter.
    """
    grads = []
    for param, name in zip(params, names, strict=True):
        grad = param.grad
        if grad is None:
            grads.append(param.new_empty(0))
            continue
        if grad.layout is not torch.strided:
            raise TypeError(
                f"the gradient of {name} is sparse ({grad.layout}); "
                "build the layer with sparse=False"
            )
        if grad.dtype not in SUPPORTED_DTYPES:
            raise TypeError(
                f"the gradient of {name} is {grad.dtype}; expected float32, bfloat16 or float16"
            )
        if grad.shape != param.shape or grad.device != param.device:
            raise ValueError(
                f"the gradient of {describe(param, name)} on {param.device} has shape "
                f"{tuple(grad.shape)} on {grad.device}; it must have the parameter's own"
            )
        grads.append(grad if grad.is_contiguous() else grad.contiguous())
    return grads


def found_gradients(optimizer: Any, grads: Sequence[Tensor]) -> bool:
    """Whether this step has any gradient.

    torch.optim says nothing where there is none, and a few steps may have reasons. A long row from
    the very first step on has hardly any: one warning then names the usual ones.
    """
    count = optimizer._steps_without_gradients  # None: there have been some
    if any(grad.numel() for grad in grads):
        optimizer._steps_without_gradients = None
        return True
    if count is not None:
        optimizer._steps_without_gradients = count + 1
        if count + 1 == STEPS_WITHOUT_GRADIENTS:
            warnings.warn(
                f"no parameter has had a gradient in the first {count + 1} steps: nothing is "
                "trained. Is backward() called before step(), and zero_grad() after it? Does the "
                "optimizer hold the model's parameters? What replaces them (fully_shard, a new "
                "model) must come before the optimizer is built",
                RuntimeWarning,
                stacklevel=4,
            )
    return False

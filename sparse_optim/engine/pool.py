"""The tensors whose entries are ranked together, this step's gradients, and checks of both.

Every message names what was wrong and what to do.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor

SUPPORTED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# One tensor's positions are int32, the pool's global indices 33 bits.
MAX_TENSOR_ENTRIES = 2**31 - 1
MAX_POOL_ENTRIES = 2**33 - 1


@dataclass(frozen=True)
class Pool:
    """The parameters whose entries are ranked together.

    Attributes:
        params, names: S of each, in the order of the param groups.
        group_index: index of the param group of each.
        num_groups: param groups in all.
        num_dense: parameters trained densely beside the pool.
        device: of all of them.
    """

    params: tuple[Tensor, ...]
    names: tuple[str, ...]
    group_index: tuple[int, ...]
    num_groups: int
    num_dense: int
    device: torch.device
    _shapes: list[torch.Size] = field(init=False, repr=False, compare=False)
    _dtypes: list[torch.dtype] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_shapes", [param.shape for param in self.params])
        object.__setattr__(self, "_dtypes", [param.dtype for param in self.params])

    def check_unchanged(self, index: int | None = None) -> None:
        """Raise RuntimeError if a parameter (default: any) has another shape, dtype or layout.

        `param.data = ...`, `model.to(...)` and `resize_token_embeddings` do that: buffers would
        not fit, and kernels would write beyond the tensor. Takes 50 us for 200 parameters.
        """
        indices = range(len(self.params)) if index is None else (index,)
        for number in indices:
            param, shape, dtype = self.params[number], self._shapes[number], self._dtypes[number]
            if param.shape != shape or param.dtype != dtype or not param.is_contiguous():
                strides = "" if param.is_contiguous() else f" with strides {param.stride()}"
                raise RuntimeError(
                    f"{self.names[number]} has changed since the optimizer was built: from "
                    f"{tuple(shape)} {dtype} to {tuple(param.shape)} {param.dtype}{strides}. "
                    "Resize or convert the model first, then build the optimizer"
                )

    @property
    def trainable_entries(self) -> int:
        """Entries that may be unmasked: those of parameters that require gradients."""
        return sum(param.numel() for param in self.params if param.requires_grad)

    @property
    def entries(self) -> int:
        """Entries of all tensors."""
        return sum(param.numel() for param in self.params)

    @property
    def sizes(self) -> Tensor:
        """Entries of each tensor: (S,), int64, on the device."""
        sizes = [param.numel() for param in self.params]
        return torch.tensor(sizes, dtype=torch.int64, device=self.device)

    def first_tiles(self, tile: int) -> list[int]:
        """Index of the first tile of each tensor, and the number of tiles: S + 1 numbers."""
        return [0, *accumulate(-(-param.numel() // tile) for param in self.params)]


@dataclass(frozen=True)
class Gradients:
    """This step's gradients.

    Attributes:
        bound: of the pool, as the backend's `bind` returned them.
        pool: S tensors; empty where the gradient is missing.
        dense: of tensors trained densely, for the norm and the non-finite test.
    """

    bound: Any
    pool: Sequence[Tensor]
    dense: Sequence[Tensor]

    @property
    def any(self) -> bool:
        """Whether this step has a gradient at all."""
        return any(grad.numel() for grads in (self.pool, self.dense) for grad in grads)


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


def check_together(params: Sequence[Tensor], names: Sequence[str]) -> None:
    """Raise ValueError if parameters are on several devices, share memory or are too many."""
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


def bind_gradients(
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
        grads = readable_gradients(params, names)
        return bind(grads, params, table), grads


def readable_gradients(params: Sequence[Tensor], names: Sequence[str]) -> list[Tensor]:
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

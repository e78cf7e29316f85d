"""The tensors whose entries are ranked together, this step's gradients, and checks of both.

Every message names what was wrong and what to do.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, chain, pairwise
from typing import Any, cast

import torch
from torch import Tensor

from sparse_optim.backends.held import Held, versions, with_empty
from sparse_optim.backends.registry import Backend, BindingRows
from sparse_optim.engine.blocks import is_sharded, local_gradient, local_of
from sparse_optim.engine.shards import Shards

SUPPORTED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# One tensor's positions are int32, the pool's global indices 33 bits.
MAX_TENSOR_ENTRIES = 2**31 - 1
MAX_POOL_ENTRIES = 2**33 - 1
SPARE_ENTRIES = 256  # of small budgets, shares are uneven


@dataclass(frozen=True)
class Pool:
    """The parameters whose entries are ranked together.

    Attributes:
        params, names: S of each, in the order of the param groups.
        group_index: index of the param group of each.
        num_groups: param groups in all.
        num_dense: parameters trained densely beside the pool.
        device: of all of them.
        shards: what this process holds of them, if they are sharded (DTensors).
        held: reads the gradients of parameters that are not sharded.
    """

    params: tuple[Tensor, ...]
    names: tuple[str, ...]
    group_index: tuple[int, ...]
    num_groups: int
    num_dense: int
    device: torch.device
    shards: Shards | None = None
    _shapes: list[torch.Size] = field(init=False, repr=False, compare=False)
    _devices: list[torch.device] = field(init=False, repr=False, compare=False)
    _dtypes: list[torch.dtype] = field(init=False, repr=False, compare=False)
    held: Held = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "held", Held(self.params if self.shards is None else ()))
        object.__setattr__(self, "_shapes", [param.shape for param in self.local])
        object.__setattr__(self, "_dtypes", [param.dtype for param in self.local])
        object.__setattr__(self, "_devices", [param.device for param in self.local])

    @property
    def local(self) -> Sequence[Tensor]:
        """The memory of each parameter in this process: itself, or its shard.

        Asked anew at each step: wrappers put other memory into a DTensor.
        """
        return self.params if self.shards is None else [local_of(param) for param in self.params]

    def versions(self, own: int) -> list[int]:
        """Writes of each parameter that autograd has counted, less `own` that are ours.

        Of a sharded one, of the DTensor and of its memory together.
        """
        if self.shards is None:
            return versions(self.params, own)
        return [param._version + local_of(param)._version - own for param in self.params]

    def most(self, budget: int) -> int:
        """Entries of a budget that can become active in this process."""
        if self.shards is None:
            return budget
        return min(budget, sum(block.entries for block in self.shards.blocks))

    def capacity(self, budget: int) -> int:
        """Entries for which there is room at first: of shards twice an even share."""
        if self.shards is None:
            return budget
        return min(self.most(budget), 2 * budget // self.shards.size + SPARE_ENTRIES)

    def check_unchanged(self, index: int | None = None) -> None:
        """Raise RuntimeError if a parameter has another shape, dtype, layout or device; of all
        parameters, or of that at `index`.

        `param.data = ...`, `model.to(...)` and `resize_token_embeddings` do that: buffers would
        not fit, and kernels would write beyond the tensor.
        """
        indices = range(len(self.params)) if index is None else (index,)
        local = self.local
        for number in indices:
            param, shape, dtype = local[number], self._shapes[number], self._dtypes[number]
            device = self._devices[number]
            same = param.shape == shape and param.dtype == dtype and param.device == device
            if not same or not param.is_contiguous():
                raise changed(self.names[number], param, shape, dtype, device)

    @property
    def keeps_shapes(self) -> bool:
        """Whether all parameters have their shape and dtype: what no `bind` of a backend sees."""
        local = self.local
        shapes = [param.shape for param in local]
        return shapes == self._shapes and [param.dtype for param in local] == self._dtypes

    @property
    def rankable_entries(self) -> int:
        """Entries that a share of the pool counts: those of parameters that require gradients.

        All, if none does: they are to be unfrozen later.
        """
        trained = sum(param.numel() for param in self.params if param.requires_grad)
        return trained or self.entries

    @property
    def entries(self) -> int:
        """Entries of all tensors, in all processes."""
        return sum(param.numel() for param in self.params)

    @property
    def sizes(self) -> Tensor:
        """Entries of each tensor, in this process: (S,), int64, on the device."""
        sizes = [param.numel() for param in self.local]
        return torch.tensor(sizes, dtype=torch.int64, device=self.device)

    def first_tiles(self, tile: int) -> list[int]:
        """Index of the first tile of each tensor, and the number of tiles: S + 1 numbers."""
        return [0, *accumulate(-(-param.numel() // tile) for param in self.local)]


@dataclass(frozen=True)
class Gradients:
    """This step's gradients.

    Attributes:
        bound: of the pool, as the backend's `bind` returned them.
        pool: S tensors; empty where the gradient is missing.
        dense: of tensors trained densely, for the norm and the non-finite test.
        given: whether a parameter has a gradient, of which this process's shard may be empty.
    """

    bound: Any
    pool: Sequence[Tensor]
    dense: Sequence[Tensor]
    given: bool = False

    @property
    def any(self) -> bool:
        """Whether this step has a gradient at all."""
        return self.given or any(grad.numel() for grad in chain(self.pool, self.dense))


def changed(
    name: str, param: Tensor, shape: torch.Size, dtype: torch.dtype, device: torch.device
) -> RuntimeError:
    """The error for a parameter that no longer is what the optimizer was built for."""
    was, now = (f" on {device}", f" on {param.device}") if param.device != device else ("", "")
    strides = "" if param.is_contiguous() else f" with strides {param.stride()}"
    return RuntimeError(
        f"{name} has changed since the optimizer was built: from {tuple(shape)} {dtype}{was} to "
        f"{tuple(param.shape)} {param.dtype}{strides}{now}. Resize, convert or move the model "
        "first, then build the optimizer"
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
    if type(param).__name__ == "FlatParameter":
        raise TypeError(
            f"{who} is a flat parameter of FSDP1: several layers in one tensor. Sharded parameters "
            "must be DTensors: use fully_shard (FSDP2)"
        )
    if type(param).__torch_dispatch__ is not Tensor.__torch_dispatch__ and not is_sharded(param):
        raise TypeError(
            f"{who} is a {type(param).__name__} (quantized by torchao?), not a plain tensor: its "
            "entries cannot move one by one. Load the model in bfloat16, train adapters on top of "
            "it (give only their parameters), or put it into a group with unmask='none'"
        )
    if param.dtype not in SUPPORTED_DTYPES:
        raise TypeError(f"{who} is {param.dtype}; expected float32, bfloat16 or float16")
    whole, param = param, local_of(param)
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
    if mode == "rank" and whole.numel() > MAX_TENSOR_ENTRIES:
        raise ValueError(f"{who} has more than {MAX_TENSOR_ENTRIES} entries; split the tensor")


def check_together(
    params: Sequence[Tensor], names: Sequence[str], frozen: Mapping[str, Tensor] | None = None
) -> None:
    """Raise ValueError if parameters are on several devices, share memory or are too many.

    Args:
        frozen: parameters that nobody trains; they may not share memory with the others.
    """
    if sum(param.numel() for param in params) > MAX_POOL_ENTRIES:
        raise ValueError(f"the parameters have more than {MAX_POOL_ENTRIES} entries")
    local = [local_of(param) for param in params]
    for param, name in zip(params, names, strict=True):
        if param.device != params[0].device:
            raise ValueError(
                f"parameters are on several devices: {names[0]} on {params[0].device}, "
                f"{name} on {param.device}; use one optimizer per device"
            )
    spans = [(*_span(param), name, True) for param, name in zip(local, names, strict=True)]
    for name, param in (frozen or {}).items():
        plain = param.layout is torch.strided and param.device == params[0].device
        if plain and type(param).__torch_dispatch__ is Tensor.__torch_dispatch__:
            spans.append((*_span(param), name, False))
    ends = sorted(span for span in spans if span[0] < span[1])
    for (_, end, name, trained), (begin, _, other, also) in pairwise(ends):
        if begin < end and (trained or also):
            raise ValueError(
                f"{name} and {other} share memory; give tied weights as one and the same Parameter"
            )


def _span(param: Tensor) -> tuple[int, int]:
    """First byte of a tensor, and the first one behind it."""
    extent = sum(
        (size - 1) * stride for size, stride in zip(param.shape, param.stride(), strict=True)
    )
    return param.data_ptr(), param.data_ptr() + (extent + 1) * param.itemsize * bool(param.numel())


def bind_gradients(ops: Backend, pool: Pool, table: Tensor) -> tuple[Any, list[Tensor]]:
    """What a backend's `bind` makes of this step's gradients, and these.

    Most backends take rows that one call has read. Else `bind` looks at layout, dtype and device of
    every tensor as it is; only what both refuse is looked at here, to be copied or explained.

    Raises:
        RuntimeError: a parameter has changed; see `Pool.check_unchanged`.
        TypeError, ValueError: see `readable_gradients`.
    """
    params = pool.params
    if pool.shards is None:
        if hasattr(ops, "bind_rows") and (read := pool.held.read()) is not None:
            rows, grads = read
            return cast(BindingRows, ops).bind_rows(rows, table), grads
        if pool.keeps_shapes:
            grads = with_empty((param.grad for param in params), params)
            with contextlib.suppress(RuntimeError, TypeError, ValueError):
                return ops.bind(grads, params, table), grads
    pool.check_unchanged()
    grads = readable_gradients(params, pool.names)
    return ops.bind(grads, pool.local, table), grads


def bind_stand_ins(
    ops: Backend, pool: Pool, table: Tensor, present: Sequence[bool]
) -> tuple[Any, list[Tensor]]:
    """The same with the parameters themselves in place of the gradients that are present."""
    if pool.shards is None and hasattr(ops, "bind_rows"):
        read = pool.held.read([bool(there) for there in present])
        if read is not None:
            rows, grads = read
            return cast(BindingRows, ops).bind_rows(rows, table), grads
    params = pool.local
    grads = [
        param.detach() if there else param.new_empty(0)
        for param, there in zip(params, present, strict=True)
    ]
    return ops.bind(grads, params, table), grads


def readable_gradients(params: Sequence[Tensor], names: Sequence[str]) -> list[Tensor]:
    """The gradients of `params`, contiguous; an empty tensor where there is none. Of sharded
    parameters, those of this process's shards.

    Raises:
        TypeError: sparse or complex gradients, or a dtype that the kernels do not read.
        ValueError: a gradient of another shape or on another device than its parameter.
    """
    grads = []
    for param, name in zip(params, names, strict=True):
        grad = param.grad
        if is_sharded(param):
            grad, param = local_gradient(param, name), local_of(param)
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

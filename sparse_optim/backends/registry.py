"""Backends: modules that offer the operations of `reference`."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from typing import Any, Literal, Protocol, cast

from torch import Tensor

from sparse_optim.backends.operands import (
    ActiveSet,
    BiasCorrection,
    NewEntries,
    Rule,
    StepScalars,
    Tiles,
)


class Backend(Protocol):
    """A module with the functions of `reference`, which specifies what they do."""

    TILE: int

    def scratch_bytes(self, num_tiles: int, capacity: int, max_quota: int) -> int: ...

    def bind(self, grads: Sequence[Tensor], params: Sequence[Tensor], table: Tensor) -> Any: ...

    def scan(
        self, bound: Any, dense_grads: Sequence[Tensor], tiles: Tiles, active: ActiveSet,
        norms: Tensor, found_inf: Tensor, scratch: Tensor,
    ) -> None: ...  # fmt: skip

    def clip(
        self, norms: Tensor, grad_scale: Tensor, max_grad_norm: float, grad_norm: Tensor,
        grad_factor: Tensor,
    ) -> None: ...  # fmt: skip

    def rank(
        self, bound: Any, tiles: Tiles, active: ActiveSet, noise: Tensor, scratch: Tensor
    ) -> None: ...

    def cut(
        self, bound: Any, tiles: Tiles, active: ActiveSet, rule: Rule, targets: Tensor,
        found_inf: Tensor, new: NewEntries, scratch: Tensor,
    ) -> None: ...  # fmt: skip

    def append(self, bound: Any, new: NewEntries, active: ActiveSet, scratch: Tensor) -> None: ...

    def update(
        self, bound: Any, active: ActiveSet, scalars: StepScalars, bias_correction: BiasCorrection
    ) -> None: ...

    def sampled_grad(
        self, input: Tensor, grad_output: Tensor, position: Tensor, transposed: bool, out: Tensor
    ) -> None: ...

    def gather(self, bound: Any, position: Tensor, offsets: Tensor, value: Tensor) -> None: ...

    def exchange(self, bound: Any, position: Tensor, offsets: Tensor, value: Tensor) -> None: ...


class BindingRows(Backend, Protocol):
    """A backend whose table takes rows that `backends.held` has read. Optional."""

    def bind_rows(self, rows: Tensor, table: Tensor) -> Any: ...


class Collecting(Backend, Protocol):
    """A backend that can rank gradients one at a time, as they come in the backward pass.

    Optional, `scan_one` also by itself; `backends.cuda` says what its functions do.
    """

    def collected_bytes(self, max_quota: int) -> int: ...

    def collect_begin(
        self, active: ActiveSet, targets: Tensor, max_quota: int, collected: Tensor
    ) -> None: ...

    def collect(
        self, bound: Any, tiles: Tiles, active: ActiveSet, rule: Rule, scored: bool, first: int,
        max_quota: int, collected: Tensor, scratch: Tensor,
    ) -> None: ...  # fmt: skip

    def scan_one(
        self, grad: Tensor, param: Tensor, table: Tensor, tiles: Tiles, active: ActiveSet,
        norm: Tensor, found_inf: Tensor, arrived: Tensor, scratch: Tensor,
    ) -> None: ...  # fmt: skip

    def collect_end(
        self, found_inf: Tensor, new: NewEntries, grad: Tensor, collected: Tensor
    ) -> None: ...


BackendName = Literal["auto", "cpp", "cuda", "triton", "reference"]  # "auto": see `engine.choose`

# name -> (module, device type it runs on or None for any), fastest first.
BACKENDS: dict[str, tuple[str, str | None]] = {
    "cpp": ("sparse_optim.backends.cpp", "cpu"),
    "cuda": ("sparse_optim.backends.cuda", "cuda"),
    # torch calls AMD devices "cuda" too.
    "triton": ("sparse_optim.triton_kernels", "cuda"),
    "reference": ("sparse_optim.backends.reference", None),
}


def load(name: str) -> Backend:
    """The module of a backend.

    Raises:
        ImportError: it is not installed.
    """
    module = BACKENDS[name][0]
    # Operations of every step ask: importlib takes its time even for what is imported.
    return cast(Backend, sys.modules.get(module) or importlib.import_module(module))

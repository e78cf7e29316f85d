"""Parameters and the gradients that they hold in `.grad`, looked at in one call: csrc/held.h."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Iterable, Sequence
from typing import Any, cast

import torch
from torch import Tensor


@functools.cache
def _compiled() -> Any:
    """The C++ extension, or None where it is not installed."""
    try:
        return importlib.import_module("sparse_optim._C")
    except ImportError:
        return None


class Held:
    """Reads the rows that `bind_rows` takes.

    Args:
        params: whose shapes, dtypes and device must stay as they are now.
    """

    def __init__(self, params: Sequence[Tensor]) -> None:
        self._params = tuple(params)
        compiled = _compiled()
        self._layouts = None if compiled is None else compiled.layouts_of(self._params)
        self._rows = torch.zeros(len(self._params), 4, dtype=torch.int64)

    def read(self, present: list[bool] | None = None) -> tuple[Tensor, list[Tensor]] | None:
        """Rows of the parameters and their gradients, and these, empty where one is missing.

        `present` says which parameters stand for gradients of their own, in place of `.grad`.

        None where something is to be looked at more closely: a parameter has changed, a gradient
        does not fit or is not contiguous, a tensor is of a class that torch dispatches to, or the
        C++ backend is not installed.
        """
        if self._layouts is None:
            return None
        read = _compiled().read_held(self._params, self._layouts, self._rows, present)
        if read is None:
            return None
        grads, missing = read
        return self._rows, with_empty(grads, self._params) if missing else grads


def versions(params: tuple[Tensor, ...], less: int = 0) -> list[int]:
    """The version that autograd counts of each, less a number."""
    compiled = _compiled()
    if compiled is None:
        return [param._version - less for param in params]
    return cast(list[int], compiled.versions_of(params, less))


def with_empty(grads: Iterable[Tensor | None], params: Iterable[Tensor]) -> list[Tensor]:
    """The gradients, with an empty tensor where one is missing."""
    return [
        param.new_empty(0) if grad is None else grad
        for grad, param in zip(grads, params, strict=True)
    ]

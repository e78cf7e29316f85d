"""Backends: modules that offer the operations of `reference`, and how one is picked."""

from __future__ import annotations

import functools
import importlib
import warnings
from typing import Any

import torch

# name -> (module, device type it runs on or None for any), fastest first.
_BACKENDS: dict[str, tuple[str, str | None]] = {
    "cpp": ("sparse_optim.cpp", "cpu"),
    "cuda": ("sparse_optim.cuda", "cuda"),
    # torch calls AMD devices "cuda" too.
    "triton": ("sparse_optim.triton_kernels", "cuda"),
    "reference": ("sparse_optim.reference", None),
}
# Run by name only: tests execute them on the CPU, but no GPU has run them yet.
_NOT_YET_AUTOMATIC = {"cuda", "triton"}


def operations(backend: str) -> Any:
    """The module of a backend: TILE, scratch_bytes, bind, scan, rank, cut, append, update."""
    return importlib.import_module(_BACKENDS[backend][0])


def resolve(backend: str, device: torch.device) -> str:
    """Name the backend to run on a device.

    Args:
        backend: "auto" takes the fastest that is installed; warns once if that is the reference.
        device: of the parameters.

    Raises:
        ValueError: unknown name, or a backend that does not run on this device.
        RuntimeError: a backend asked for by name that is not installed.
    """
    if backend == "auto":
        return _fastest(device.type)
    if backend not in _BACKENDS:
        raise ValueError(f"backend must be 'auto' or one of {sorted(_BACKENDS)}, got {backend!r}")
    wanted = _BACKENDS[backend][1]
    if wanted not in (None, device.type):
        raise ValueError(
            f"backend {backend!r} runs on {wanted}, but the parameters are on {device}"
        )
    try:
        operations(backend)
    except ImportError as error:
        raise RuntimeError(
            f"backend {backend!r} is not installed ({error}); build it with "
            "`pip install --no-build-isolation -e .` or use backend='auto'"
        ) from error
    return backend


@functools.cache
def _fastest(device_type: str) -> str:
    for name, (module, wanted) in _BACKENDS.items():
        if name in _NOT_YET_AUTOMATIC or wanted not in (None, device_type):
            continue
        try:
            importlib.import_module(module)
        except ImportError:
            continue
        if name == "reference":
            warnings.warn(
                f"no compiled sparse_optim backend is taken for {device_type}: steps run on the "
                "exact but slow reference backend; see the README, Limits",
                RuntimeWarning,
                stacklevel=2,
            )
        return name
    raise AssertionError("the reference backend is always importable")

"""Backends: modules that offer the operations of `reference`, and how one is picked."""

from __future__ import annotations

import functools
import importlib
import logging
import warnings
from typing import Any

import torch

_log = logging.getLogger(__name__)

# name -> (module, device type it runs on or None for any), fastest first.
_BACKENDS: dict[str, tuple[str, str | None]] = {
    "cpp": ("sparse_optim.backends.cpp", "cpu"),
    "cuda": ("sparse_optim.backends.cuda", "cuda"),
    # torch calls AMD devices "cuda" too.
    "triton": ("sparse_optim.triton_kernels", "cuda"),
    "reference": ("sparse_optim.backends.reference", None),
}
_COMPILE = "`SPARSE_OPTIM_{}=1 pip install --no-build-isolation .` in the source tree compiles it"
_INSTALL = {
    "cpp": _COMPILE.format("CPP"),
    "cuda": _COMPILE.format("CUDA"),
    "triton": "`pip install triton` installs it",
}
# Tests run these where users do. Others pass `self_check` on a device before "auto" takes them.
_PROVED = {"cpp", "reference"}


def operations(backend: str) -> Any:
    """The module of a backend: TILE, scratch_bytes, bind, scan, clip, rank, cut, append, update."""
    return importlib.import_module(_BACKENDS[backend][0])


def resolve(backend: str, device: torch.device) -> str:
    """Name the backend to run on a device.

    Args:
        backend: "auto" takes the fastest that is installed and computes what the reference does
            (see `self_check`); says which to the log, and warns once if one is passed over or the
            reference is what is left.
        device: of the parameters.

    Raises:
        ValueError: unknown name, or a backend that does not run on this device.
        RuntimeError: a backend asked for by name that is not installed.
    """
    if backend == "auto":
        return _fastest(device)
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
            f"backend {backend!r} is not installed ({error}): {_INSTALL[backend]}; or use "
            "backend='auto'"
        ) from error
    return backend


@functools.cache
def _fastest(device: torch.device) -> str:
    for name, (module, wanted) in _BACKENDS.items():
        if wanted not in (None, device.type):
            continue
        try:
            importlib.import_module(module)
        except ImportError as error:
            _log.info("backend %r is not installed: %s", name, error)
            continue
        if name not in _PROVED and not _passes(name, device):
            continue
        if name == "reference":
            compiled = {"cpu": "cpp", "cuda": "cuda"}.get(device.type)
            remedy = f" {compiled!r}: {_INSTALL[compiled]}." if compiled else ""
            warnings.warn(
                f"no compiled sparse_optim backend is taken for {device.type}: steps run on the "
                f"exact but slow reference backend.{remedy} See the README, Limits",
                RuntimeWarning,
                stacklevel=2,
            )
        _log.info("backend %r runs on %s", name, device)
        return name
    raise AssertionError("the reference backend is always importable")


def _passes(name: str, device: torch.device) -> bool:
    """Whether a backend computes on this device what the reference does; warns if not."""
    from sparse_optim.engine import (
        self_check,  # its optimizers name their backend, and import this module
    )

    fault = self_check.fault(name, device)
    if fault is not None:
        warnings.warn(
            f"backend {name!r} is passed over on {device}: {fault}. Please report this, with your "
            f"GPU and the versions of torch and Triton. backend={name!r} runs it all the same; "
            "backend='reference' is slow but exact",
            RuntimeWarning,
            stacklevel=2,
        )
    return fault is None

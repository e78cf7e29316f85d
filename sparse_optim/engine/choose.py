"""Which backend runs on a device."""

from __future__ import annotations

import functools
import logging

import torch

from sparse_optim.backends.registry import BACKENDS, load
from sparse_optim.engine import self_check
from sparse_optim.errors import SparseOptimError
from sparse_optim.warn import warn_user

_log = logging.getLogger(__name__)

_COMPILE = "`SPARSE_OPTIM_{}=1 pip install --no-build-isolation .` in the source tree compiles it"
_INSTALL = {
    "cpp": _COMPILE.format("CPP"),
    "cuda": _COMPILE.format("CUDA"),
    "triton": "`pip install triton` installs it",
}
# Tests run these where users do. Others pass `self_check` on a device before "auto" takes them.
_PROVED = {"cpp", "reference"}


class BackendError(SparseOptimError, RuntimeError):
    """A backend that was asked for is not installed."""


def choose(backend: str, device: torch.device) -> str:
    """Name the backend to run on a device.

    Args:
        backend: "auto" takes the fastest that is installed and computes what the reference does
            (see `self_check`); logs which one, and warns once if one is passed over or only the
            reference is left.
        device: of the parameters.

    Raises:
        ValueError: unknown name, or a backend that does not run on this device.
        BackendError: a backend asked for by name that is not installed.
    """
    if backend == "auto":
        return _fastest(device)
    if backend not in BACKENDS:
        raise ValueError(f"backend must be 'auto' or one of {sorted(BACKENDS)}, got {backend!r}")
    wanted = BACKENDS[backend][1]
    if wanted not in (None, device.type):
        raise ValueError(
            f"backend {backend!r} runs on {wanted}, but the parameters are on {device}"
        )
    try:
        load(backend)
    except ImportError as error:
        raise BackendError(
            f"backend {backend!r} is not installed ({error}): {_INSTALL[backend]}; or use "
            "backend='auto'"
        ) from error
    return backend


@functools.cache
def _fastest(device: torch.device) -> str:
    for name, (_, wanted) in BACKENDS.items():
        if wanted not in (None, device.type):
            continue
        try:
            load(name)
        except ImportError as error:
            _log.info("backend %r is not installed: %s", name, error)
            continue
        if name not in _PROVED and not _passes(name, device):
            continue
        if name == "reference":
            compiled = {"cpu": "cpp", "cuda": "cuda"}.get(device.type)
            remedy = f" {compiled!r}: {_INSTALL[compiled]}." if compiled else ""
            warn_user(
                f"no compiled sparse_optim backend is taken for {device.type}: steps run on the "
                f"exact but slow reference backend.{remedy} See the README, Limits",
                RuntimeWarning,
            )
        _log.info("backend %r runs on %s", name, device)
        return name
    raise AssertionError("the reference backend is always importable")


def _passes(name: str, device: torch.device) -> bool:
    """Whether a backend computes on this device what the reference does; warns if not."""
    mismatch = self_check.first_mismatch(name, device)
    if mismatch is not None:
        warn_user(
            f"backend {name!r} is passed over on {device}: {mismatch}. Please report this, with "
            f"your GPU and the versions of torch and Triton. backend={name!r} runs it all the "
            "same; backend='reference' is slow but exact",
            RuntimeWarning,
        )
    return mismatch is None

"""nvcc and Triton, which check the GPU code without a GPU: tests that need them skip without.

Where SPARSE_OPTIM_REQUIRE_GPU_TOOLS=1, as .ci/run sets it, they fail instead: a run that shows that
the GPU code compiles must not pass because it compiled nothing.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import shutil
from typing import Any

import pytest

SWITCH = "SPARSE_OPTIM_REQUIRE_GPU_TOOLS"


def missing(tool: str) -> None:
    """Skip the test or module that needs the tool; an error where the tools are required."""
    if os.environ.get(SWITCH) == "1":
        raise RuntimeError(f"{tool} is not installed, and {SWITCH}=1 demands it")
    pytest.skip(f"{tool} is not installed", allow_module_level=True)


def require(module: str) -> Any:
    """The module; skips without it."""
    if importlib.util.find_spec(module) is None:
        missing(module)
    return importlib.import_module(module)


def nvcc() -> str:
    """Path of the CUDA compiler; skips without it."""
    found = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
    if found is None:
        missing("nvcc")
    return str(found)

"""Norms and clip factors by the Triton kernels, interpreted; run by test_interpreter.py."""

from __future__ import annotations

import importlib
import math
import os

import numpy as np
import pytest
from norm_checks import assert_clips, assert_norms_are_the_tensors_own

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("run by test_interpreter.py", allow_module_level=True)
importlib.import_module("triton_interpreter").install()
kernels = importlib.import_module("sparse_optim.triton_kernels")


def test_norms_are_the_tensors_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several rounds of each program, and dense gradients beyond what is summed at once."""
    scan = importlib.import_module("sparse_optim.triton_kernels.scan")
    small = {"SUM_BLOCK": 16, "DENSE_BLOCK": 8, "DENSE_PROGRAMS": 4, "DENSE_GRADS": 2}
    for name, value in small.items():
        monkeypatch.setattr(scan, name, value)
    sizes, dense_sizes = [85, 0, 41, *range(61, 160, 9)], [70, 0, 9, 120, 160]
    assert_norms_are_the_tensors_own(kernels, sizes, dense_sizes, tile=4)


@pytest.mark.parametrize("limit", [0.5, 100.0, math.inf])
def test_clip(limit: float) -> None:
    # The square of 1e200 and inf / inf, of which a GPU does not warn.
    with np.errstate(over="ignore", invalid="ignore"):
        assert_clips(kernels, limit)

"""Norms of tensors, which must not depend on what is scanned with them, and the clip factor.

Faults planted by hand: squares dealt to threads by a tile's place in the pool (CUDA, by
test_norms_are_the_tensors_own[emulated]); NaN not dropped by the minimum (C++, by test_clip).
"""

from __future__ import annotations

import math

import emulated_cuda
import pytest
from norm_checks import assert_clips, assert_norms_are_the_tensors_own

from sparse_optim import reference


@pytest.fixture(params=["reference", "cpp", "emulated"])
def ops(request):
    if request.param == "reference":
        return reference
    if request.param == "cpp":
        reason = "the C++ extension has not been built"
        return pytest.importorskip("sparse_optim.cpp", reason=reason)
    request.getfixturevalue("cuda_emulator")
    emulated_cuda.configure(multiprocessors=2, seed=1)
    return emulated_cuda


def test_norms_are_the_tensors_own(ops):
    """More tiles than a block has threads, and more dense entries than one block reads."""
    assert_norms_are_the_tensors_own(ops, [1001, 0, 41, 700], [70_000, 0, 9], tile=2)


@pytest.mark.parametrize("limit", [0.5, 100.0, math.inf])
def test_clip(ops, limit):
    assert_clips(ops, limit)

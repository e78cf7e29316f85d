"""Norms of tensors, which must not depend on what is scanned with them, and the clip factor.

Faults planted by hand: squares dealt to threads by a tile's place in the pool (CUDA, by
test_norms_are_the_tensors_own[emulated]); tiles added in blocks of the pool, not of the tensor
(Triton, by interpreted_norm.py); NaN not dropped by the minimum (core/clip.h, by test_clip).
"""

from __future__ import annotations

import math

import emulated_cuda
import pytest
from norm_checks import assert_clips, assert_norms_are_the_tensors_own

from sparse_optim.backends import reference


@pytest.fixture(params=["reference", "cpp", "emulated"])
def ops(request):
    if request.param == "reference":
        return reference
    if request.param == "cpp":
        reason = "the C++ extension has not been built"
        return pytest.importorskip("sparse_optim.backends.cpp", reason=reason)
    request.getfixturevalue("cuda_emulator")
    emulated_cuda.configure(multiprocessors=2, seed=1)
    return emulated_cuda


def test_norms_are_the_tensors_own(ops):
    """More tiles than a block has threads, and more dense entries than one block reads."""
    sizes, dense_sizes = [801, 0, 41, 1200, 590, 700, 933], [70_000, 0, 9, 50_000, 90_000]
    assert_norms_are_the_tensors_own(ops, sizes, dense_sizes, tile=2)


@pytest.mark.parametrize("limit", [0.5, 100.0, math.inf])
def test_clip(ops, limit):
    assert_clips(ops, limit)

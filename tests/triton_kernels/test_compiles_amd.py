"""The Triton kernels compile for AMD GPUs, ahead of time: MI300 (gfx942), RX 7900 (gfx1100).

    nothing spilled to memory; float32 keeps subnormal numbers; scores without fused operations

Each kernel once, in the first variant that a launcher asks for, and scores in a few exponents: the
variants differ as those in test_compiles.py do. Triton's wheel holds all that this takes, so that
it ends in a binary (hsaco). No AMD GPU has run one.

A fault planted by hand: tl.fma in exp = -1 failed test_scores on both. (`/` for tl.div_rn did not:
for AMD, Triton compiles it to the same division.)
"""

from __future__ import annotations

import re

import pytest
from gpu_tools import require

require("triton")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton_launches import compiled, launches_of_optimizers  # noqa: E402

# Threads of a warp: 64 on CDNA, 32 on RDNA.
TARGETS = [GPUTarget("hip", "gfx942", 64), GPUTarget("hip", "gfx1100", 32)]
VARIANTS = list(launches_of_optimizers().values())
KERNELS = {variant.kernel.__name__: variant for variant in reversed(VARIANTS)}
on_each_target = pytest.mark.parametrize("gpu", TARGETS, ids=lambda gpu: gpu.arch)


@on_each_target
@pytest.mark.parametrize("kernel", KERNELS)
def test_kernel_spills_nothing(kernel: str, gpu: GPUTarget) -> None:
    binary = compiled(KERNELS[kernel], gpu)
    assert binary.asm["hsaco"].startswith(b"\x7fELF")
    assembly = binary.asm["amdgcn"]
    for spilled in ("private_segment_fixed_size", "vgpr_spill_count"):
        assert re.findall(rf"\.{spilled}:\s+(\d+)", assembly) == ["0"], spilled
    assert re.findall(r"\.amdhsa_float_denorm_mode_32 (\d)", assembly) == ["3"]


@on_each_target
@pytest.mark.parametrize("exp", [-1.0, 1.0, 2.0])
def test_scores(exp: float, gpu: GPUTarget) -> None:
    """Divisions are those that v_div_fixup ends, correctly rounded; nothing else is fused.

    The square root of exp = 0.5 is a function of AMD's library that works with fused operations.
    """
    [variant] = (
        variant for variant in VARIANTS
        if variant.kernel.__name__ == "count_kernel" and dict(variant.constants)["EXP"] == exp
    )  # fmt: skip
    asm = compiled(variant, gpu).asm
    assert not re.findall(r"llvm\.fma|fmuladd|\b(?:contract|afn|arcp|fast)\b", asm["llir"])
    assert ("v_div_fixup_f32" in asm["amdgcn"]) == (exp > 0)

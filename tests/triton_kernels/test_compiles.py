"""Every Triton kernel that optimizers launch compiles ahead of time, within its registers.

    no stack, no local memory (spills), on every architecture;
    score computations without approximate or fused operations

The variants are those that launchers ask for (triton_launches.py), so that none can be forgotten:
a kernel, or a value of one of its flags, that no launch was seen of is an error. This shows that
kernels compile and how, not that they run: no GPU takes part.

Nearly all are compiled for sm_90: of the passes over digits, which differ in constants alone, the
later ones with two exponents. For sm_80, those with the exponents 0 and 1.7 and without one; for
sm_86, which differs from it in a number, each kernel once (all were compiled for all three once).

Faults planted by hand, once each, before variants came from the launchers: `/` for tl.div_rn in
exp = 2 failed all seven kernels of that exponent; tl.fma in exp = -1 failed both that were compiled
with it (test_scores_are_correctly_rounded). Either in the logarithm of the noise failed all four
kernels that draw it (test_noise_is_correctly_rounded). Planted later: opened tiles read 16 bytes at
a time failed `digit_kernel` and `write_kernel` in test_keys_are_worked_out_once.
"""

from __future__ import annotations

import importlib
import pkgutil
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import pytest
from gpu_tools import require

triton = require("triton")

import sparse_optim.triton_kernels  # noqa: E402
import triton_launches  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402
from triton_launches import EXACT_EXPS, GENERAL_EXPS, launches_of_optimizers  # noqa: E402

VARIANTS = launches_of_optimizers()
CONSTANTS = {name: dict(variant.constants) for name, variant in VARIANTS.items()}
EXPS_EVERYWHERE = (0.0, 1.7)
EVERYWHERE = {
    name for name, constants in CONSTANTS.items() if constants.get("EXP", 0.0) in EXPS_EVERYWHERE
}
ONCE = {variant.kernel.__name__: name for name, variant in reversed(VARIANTS.items())}.values()
FIRST_PASSES = {name for name, constants in CONSTANTS.items() if constants.get("PASS", 0) == 0}
COMPILED = [
    (name, architecture)
    for name in VARIANTS
    for architecture, names in ((90, FIRST_PASSES | EVERYWHERE), (80, EVERYWHERE), (86, ONCE))
    if name in names
]
GENERAL = [name for name, constants in CONSTANTS.items() if constants.get("EXP") in GENERAL_EXPS]
SAMPLED = [name for name, constants in CONSTANTS.items() if constants.get("SAMPLES")]
SCORES = [
    name
    for name, constants in CONSTANTS.items()
    if constants.get("EXP") in EXACT_EXPS and name in FIRST_PASSES and name not in SAMPLED
]
# What would round a score other than the reference does.
INEXACT = re.compile(r"div\.full|\.approx|\.ftz|\bfma\.")


def compiled(name: str, architecture: int) -> Any:
    return triton_launches.compiled(VARIANTS[name], GPUTarget("cuda", architecture, 32))


def usage(kernel: Any) -> dict[str, int]:
    """Registers a thread, and bytes of stack, shared and local memory."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        report = subprocess.run(
            [tool, "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    found = re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", report)
    return {key: int(value) for key, value in found}


def test_every_kernel_is_launched() -> None:
    package = sparse_optim.triton_kernels
    modules = [
        importlib.import_module(f"{package.__name__}.{module.name}")
        for module in pkgutil.iter_modules(package.__path__)
    ]
    written = {
        name
        for module in modules
        for name, value in vars(module).items()
        if name.endswith("_kernel") and isinstance(value, JITFunction)
    }
    assert {variant.kernel.__name__ for variant in VARIANTS.values()} == written


def test_every_flag_takes_both_values() -> None:
    flags: dict[str, set[bool]] = {}
    for name, constants in CONSTANTS.items():
        for flag, value in constants.items():
            if isinstance(value, bool):
                flags.setdefault(f"{VARIANTS[name].kernel.__name__} {flag}", set()).add(value)
    assert {flag: values for flag, values in flags.items() if len(values) < 2} == {}
    assert len(flags) >= 8


def test_counts_are_not_specialized() -> None:
    """Else other counts than those seen here would make kernels that nobody has compiled."""
    specialized = {
        f"{variant.kernel.__name__} {arg}"
        for variant in VARIANTS.values()
        for arg, kind in variant.types
        if kind.startswith("i")
        and not variant.kernel.params[variant.kernel.arg_names.index(arg)].do_not_specialize
    }
    assert specialized == set()


# 90: H100 and H200. 80: A100. 86: A6000.
@pytest.mark.parametrize(("name", "architecture"), COMPILED)
def test_kernel_spills_nothing(name: str, architecture: int) -> None:
    used = usage(compiled(name, architecture))
    assert (used["STACK"], used["LOCAL"]) == (0, 0), used
    assert used["REG"] <= 128, used  # 16 warps of it fill a multiprocessor's 65536 registers


@pytest.mark.parametrize("name", GENERAL)
def test_keys_are_worked_out_once(name: str) -> None:
    """Not once in the layout of the loads and again in that of the stores: see `load_lanes`."""
    bounds = int(VARIANTS[name].kernel.__name__ == "group_maxima_kernel")  # of a tile, a scalar
    assert compiled(name, 90).asm["ttgir"].count("math.log ") == 1 + bounds


@pytest.mark.parametrize("name", SAMPLED)
def test_noise_is_correctly_rounded(name: str) -> None:
    ptx = compiled(name, 90).asm["ptx"]
    assert not INEXACT.findall(ptx)
    assert "div.rn.f32" in ptx
    assert "sqrt.rn.f32" in ptx


@pytest.mark.parametrize("name", SCORES)
def test_scores_are_correctly_rounded(name: str) -> None:
    ptx = compiled(name, 90).asm["ptx"]
    assert not INEXACT.findall(ptx)
    exp = CONSTANTS[name]["EXP"]
    assert ("div.rn.f32" in ptx) == (exp > 0)
    assert ("sqrt.rn.f32" in ptx) == (abs(exp) == 0.5)


def of_kernel(kernel: str) -> str:
    """Some variant of a kernel."""
    return next(name for name in VARIANTS if name.split(" ")[0] == kernel)


def test_fused_operations_would_be_noticed() -> None:
    """`update` may fuse; it shows that the pattern finds what it looks for."""
    assert "fma." in INEXACT.findall(compiled(of_kernel("update_kernel"), 90).asm["ptx"])


@pytest.mark.parametrize("kernel", ["scan_kernel", "rank_kernel"])
def test_dense_reads_take_sixteen_bytes_at_a_time(kernel: str) -> None:
    """Four such loads of float32 a thread, and two each of bfloat16 and float16."""
    ptx = compiled(of_kernel(kernel), 90).asm["ptx"]
    assert len(re.findall(r"ld\.global\.v4\.b32", ptx)) == 4 + 2 + 2


@pytest.mark.parametrize(("dtype", "loads"), [("fp32", 16), ("bf16", 8), ("fp16", 8)])
def test_runs_of_tokens_are_read_sixteen_bytes_at_a_time(dtype: str, loads: int) -> None:
    """32 values a thread, of outer and of inner."""
    (name,) = (
        name
        for name in VARIANTS
        if name.startswith(f"sampled_grad_kernel outer_ptr:*{dtype} inner_ptr:*{dtype} TOKENS")
    )
    ptx = compiled(name, 90).asm["ptx"]
    assert len(re.findall(r"ld\.global\.v4\.b32", ptx)) == loads

"""Every Triton kernel that optimizers launch compiles ahead of time, within its registers.

    no stack, no local memory (spills), on every architecture;
    score computations without approximate or fused operations

The variants are those that launchers ask for (triton_launches.py), so that none can be forgotten:
a kernel, or a value of one of its flags, that no launch was seen of is an error. This shows that
kernels compile and how, not that they run: no GPU takes part.

All are compiled for sm_90; for sm_80 and sm_86 those with the exponents 0, 2 and 1.7 and without
one, as the others differ in a few arithmetic operations (all were compiled for all three once).

Faults planted by hand, once each, before variants came from the launchers: `/` for tl.div_rn in
exp = 2 failed all seven kernels of that exponent; tl.fma in exp = -1 failed both that were compiled
with it (test_scores_are_correctly_rounded). Either in the logarithm of the noise failed all four
kernels that draw it (test_noise_is_correctly_rounded). Planted later: opened tiles read 16 bytes at
a time failed `digit_kernel` and `write_kernel` in test_keys_are_worked_out_once.
"""

from __future__ import annotations

import functools
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
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402
from triton_launches import EXACT_EXPS, GENERAL_EXPS, launches_of_optimizers  # noqa: E402

ARCHITECTURES = (90, 80, 86)  # H100 and H200, A100, A6000
VARIANTS = launches_of_optimizers()
CONSTANTS = {name: dict(variant.constants) for name, variant in VARIANTS.items()}
EXPS_EVERYWHERE = (0.0, 2.0, 1.7)
COMPILED = [
    (name, architecture)
    for architecture in ARCHITECTURES
    for name, constants in CONSTANTS.items()
    if architecture == 90 or constants.get("EXP", 0.0) in EXPS_EVERYWHERE
]
GENERAL = [name for name, constants in CONSTANTS.items() if constants.get("EXP") in GENERAL_EXPS]
SAMPLED = [name for name, constants in CONSTANTS.items() if constants.get("SAMPLES")]
SCORES = [
    name
    for name, constants in CONSTANTS.items()
    if constants.get("EXP") in EXACT_EXPS and name not in SAMPLED
]
# What would round a score other than the reference does.
INEXACT = re.compile(r"div\.full|\.approx|\.ftz|\bfma\.")


@functools.cache
def compiled(name: str, architecture: int) -> Any:
    kernel, types, constants, aligned, warps, fuses = VARIANTS[name]
    names = kernel.arg_names
    signature = dict.fromkeys(names, "constexpr") | dict(types)
    return triton.compile(
        ASTSource(
            kernel, {arg: signature[arg] for arg in names},
            constexprs={(names.index(arg),): value for arg, value in constants},
            attrs={(names.index(arg),): [["tt.divisibility", 16]] for arg in aligned},
        ),
        target=GPUTarget("cuda", architecture, 32),
        options={"num_warps": warps, "enable_fp_fusion": fuses},
    )  # fmt: skip


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
    assert len(flags) >= 9


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


@pytest.mark.parametrize(("name", "architecture"), COMPILED)
def test_kernel_spills_nothing(name: str, architecture: int) -> None:
    used = usage(compiled(name, architecture))
    assert (used["STACK"], used["LOCAL"]) == (0, 0), used
    assert used["REG"] <= 128, used  # 16 warps of it fill a multiprocessor's 65536 registers


@pytest.mark.parametrize("name", GENERAL)
def test_keys_are_worked_out_once(name: str) -> None:
    """Not once in the layout of the loads and again in that of the stores: see `load_lanes`."""
    assert compiled(name, 90).asm["ttgir"].count("math.log ") == 1


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

"""Every Triton kernel compiles ahead of time for the GPUs that we name, within their registers.

    no stack, no local memory (spills);  score computations without approximate or fused operations

This shows that kernels compile and how, not that they run: no GPU takes part.

Faults planted by hand, once each: `/` for tl.div_rn in exp = 2 failed all seven kernels of that
exponent; tl.fma in exp = -1 failed both of that one (test_scores_are_correctly_rounded). Either
in the logarithm of the noise failed all four kernels that draw it (..noise_is_correctly_rounded).
"""

from __future__ import annotations

import functools
import importlib
import re
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import pytest

triton = pytest.importorskip("triton", reason="Triton is not installed")

from sparse_optim.triton_kernels import TILE  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

append, cut, listing, rank, scan, tiles, update = (
    importlib.import_module(f"sparse_optim.triton_kernels.{name}")
    for name in ("append", "cut", "listing", "rank", "scan", "tiles", "update")
)

ARCHITECTURES = (80, 86, 90)  # A100, A6000, H100 and H200

# Types of the arguments by name, the same in every kernel.
TYPES = {
    "table_ptr": "*i64",
    "noise_ptr": "*i64",
    "position_ptr": "*i32",
    "offsets_ptr": "*i64",
    "tile_offsets_ptr": "*i64",
    "tile_tensor_ptr": "*i32",
    "tile_start_ptr": "*i64",
    "tile_max_ptr": "*i32",
    "tile_squares_ptr": "*fp32",
    "partial_ptr": "*fp64",
    "active_grad_ptr": "*fp32",
    "found_inf_ptr": "*fp32",
    "grad_scale_ptr": "*fp32",
    "grad_norm_ptr": "*fp64",
    "grad_factor_ptr": "*fp32",
    "max_grad_norm": "fp32",
    "hyper_ptr": "*fp64",
    "group_index_ptr": "*i32",
    "exp_avg_ptr": "*fp32",
    "exp_avg_sq_ptr": "*fp32",
    "unmask_step_ptr": "*i32",
    "master_ptr": "*fp32",
    "progress_ptr": "*i64",
    "num_tensors": "i32",
    "num_tiles": "i32",
    "numel": "i64",
    "targets_ptr": "*i64",
    "new_count_ptr": "*i64",
    "new_tensor_ptr": "*i32",
    "new_position_ptr": "*i32",
    "threshold_ptr": "*fp32",
    "param_bound_ptr": "*fp32",
    "state_ptr": "*i64",
    "histogram_ptr": "*i32",
    "counts_ptr": "*i64",
    "list_ptr": "*i32",
    "num_targets": "i32",
    "max_quota": "i32",
    "eps": "fp32",
    "insert_at_ptr": "*i64",
    "fresh_ptr": "*i32",
    "staged_ptr": "*i32",
    "first_ptr": "*i32",
    "second_ptr": "*i32",
    "third_ptr": "*i32",
    "capacity": "i32",
}


class Variant(NamedTuple):
    """A kernel as some launcher starts it."""

    kernel: Any
    constants: dict[str, Any]
    warps: int
    types: Mapping[str, str] = MappingProxyType({})
    fuses: bool = True


VARIANTS = {
    "locate": Variant(tiles.locate_kernel, {"TILE": TILE, "BLOCK": tiles.LOCATE_BLOCK}, 4),
    "scan": Variant(scan.scan_kernel, {"TILE": TILE, "GATHER": scan.GATHER_BLOCK}, scan.SCAN_WARPS),
    "sum": Variant(scan.sum_kernel, {"BLOCK": scan.SUM_BLOCK}, 4),
    "dense bf16": Variant(
        scan.dense_kernel, {"BLOCK": scan.DENSE_BLOCK}, 8, types={"grad_ptr": "*bf16"}
    ),
    "norm": Variant(scan.norm_kernel, {"CLIPS": True, "PARTIALS": scan.NUM_PARTIALS}, 1),
    "update": Variant(
        update.update_kernel,
        {"ENTRY_AGE": True, "HAS_MASTER": False, "BLOCK": update.UPDATE_BLOCK},
        update.UPDATE_WARPS,
    ),
    "update master": Variant(
        update.update_kernel,
        {"ENTRY_AGE": False, "HAS_MASTER": True, "BLOCK": update.UPDATE_BLOCK},
        update.UPDATE_WARPS,
    ),
    "rank": Variant(rank.rank_kernel, {"SAMPLES": False, "TILE": TILE}, rank.RANK_WARPS),
    "count_step": Variant(update.count_step_kernel, {}, 1),
    "plan": Variant(cut.plan_kernel, {}, 1),
    "insert": Variant(append.insert_kernel, {"BLOCK": append.INSERT_BLOCK}, 4),
    "merge": Variant(append.merge_kernel, {"HAS_THIRD": True, "BLOCK": append.MERGE_BLOCK}, 4),
    "copy_back": Variant(
        append.copy_back_kernel, {"HAS_THIRD": True, "BLOCK": append.MERGE_BLOCK}, 4
    ),
    "grow": Variant(append.grow_kernel, {"BLOCK": append.OFFSETS_BLOCK}, 4),
}


def cut_variants(exp: float) -> dict[str, Variant]:
    """The kernels that compute importances, as `cut` launches them."""
    bounds = {"EXP": exp, "BLOCK": listing.BOUND_BLOCK}
    lists = {**bounds, "BINS": listing.BINS, "PROGRAMS": listing.NUM_PROGRAMS}
    opening = {"EXP": exp, "TILE": TILE}
    return {
        name.format(exp): Variant(kernel, constants, warps, fuses=False)
        for name, kernel, constants, warps in (
            ("bound_histogram {}", listing.bound_histogram_kernel, bounds, 4),
            ("list count {}", listing.list_kernel, {**lists, "WRITES": False}, 4),
            ("list write {}", listing.list_kernel, {**lists, "WRITES": True}, 4),
            ("maxima {}", listing.maxima_kernel, opening, listing.OPEN_WARPS),
            *opening_kernels({**opening, "SAMPLES": False}),
        )
    }


def opening_kernels(opening: dict[str, Any]) -> tuple[tuple[str, Any, dict[str, Any], int], ...]:
    """Those of `cut` that open listed tiles: name, kernel, constants, warps."""
    last = {"PASS": 2, "SHIFT": 0, "PREVIOUS": 10, "BINS": cut.DIGIT_BINS}
    shares = {"BINS": cut.DIGIT_BINS, "PROGRAMS": listing.NUM_PROGRAMS}
    return (
        ("digit {}", cut.digit_kernel, {**opening, **last}, listing.OPEN_WARPS),
        ("count {}", cut.count_kernel, {**opening, **shares}, listing.OPEN_WARPS),
        ("write {}", cut.write_kernel, {**opening, **shares}, cut.WRITE_WARPS),
    )


def sampling_variants() -> dict[str, Variant]:
    """The kernels that draw noise."""
    sampling = {"SAMPLES": True, "TILE": TILE}
    return {
        name.format("sampled"): Variant(kernel, constants, warps, fuses=False)
        for name, kernel, constants, warps in (
            ("rank {}", rank.rank_kernel, sampling, rank.RANK_WARPS),
            *opening_kernels({**sampling, "EXP": 0.0}),
        )
    }


# All kernels that score, with one exponent, and two of them with every other.
EXACT_EXPS = (-1.0, -0.5, 0.0, 0.5, 1.0, 2.0)
SAMPLED = sampling_variants()
VARIANTS |= cut_variants(2.0) | SAMPLED
ALL_KERNELS = tuple(VARIANTS)
SCORES = {
    name: variant
    for exp in EXACT_EXPS
    for name, variant in cut_variants(exp).items()
    if exp == 2.0 or name.startswith(("bound_histogram", "count"))
}
VARIANTS |= SCORES
# What would round a score other than the reference does.
INEXACT = re.compile(r"div\.full|\.approx|\.ftz|\bfma\.")


@functools.cache
def compiled(name: str, architecture: int) -> Any:
    variant = VARIANTS[name]
    names = variant.kernel.arg_names
    types = {
        arg: "constexpr" if arg in variant.constants else {**TYPES, **variant.types}[arg]
        for arg in names
    }
    aligned = {
        (index,): [["tt.divisibility", 16]]
        for index, arg in enumerate(names)
        if types[arg].startswith("*")
    }
    constants = {(names.index(arg),): value for arg, value in variant.constants.items()}
    return triton.compile(
        ASTSource(variant.kernel, types, constexprs=constants, attrs=aligned),
        target=GPUTarget("cuda", architecture, 32),
        options={"num_warps": variant.warps, "enable_fp_fusion": variant.fuses},
    )


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


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("name", ALL_KERNELS)
def test_kernel_spills_nothing(name: str, architecture: int) -> None:
    used = usage(compiled(name, architecture))
    assert used["STACK"] == used["LOCAL"] == 0, used
    assert used["REG"] <= 128, used  # 16 warps of it fill a multiprocessor's 65536 registers


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
    exp = SCORES[name].constants["EXP"]
    assert ("div.rn.f32" in ptx) == (exp > 0)
    assert ("sqrt.rn.f32" in ptx) == (abs(exp) == 0.5)


def test_fused_operations_would_be_noticed() -> None:
    """`update` may fuse; it shows that the pattern finds what it looks for."""
    assert "fma." in INEXACT.findall(compiled("update", 90).asm["ptx"])


def test_scan_reads_sixteen_bytes_at_a_time() -> None:
    """Four such loads of float32 a thread, and two each of bfloat16 and float16."""
    loads = re.findall(r"ld\.global\.v4\.b32", compiled("scan", 90).asm["ptx"])
    assert len(loads) == 4 + 2 + 2

"""Every CUDA source compiles for every architecture, without a warning or a spill; and it links.

What the kernels compute is the business of test_cuda_emulator.py. No GPU runs them here.

Faults planted by hand, one at a time, and what came of them:

    an array of 200 floats in `scan_kernel`   800 bytes of stack and none "spilled" in ptxas' words:
                                              found by nothing then, hence the stack is checked, too
    an unused variable in `scan_kernel`       nvcc, as warnings are errors (check_cuda)
    `rank` not registered for CUDA            the import of the linked library (check_cuda)
    fmaf in the score of exponent -1          18 fma in the PTX of `cut` (..correctly_rounded..)
"""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest
from gpu_tools import nvcc
from repository import ROOT

ARCHS = {"sm_80", "sm_86", "sm_90"}
NEW_ARCHS = {"sm_100", "sm_120"}  # from nvcc 12.8 on
LINE = re.compile(
    r"(\S+\.cu) (sm_\d+) (\S+): (\d+) registers, (\d+) bytes spilled, (\d+) bytes of stack"
)


def run_setup(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "setup.py", *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.slow
def test_cuda_sources_compile_link_and_import_without_spills():
    nvcc()
    pytest.importorskip("sparse_optim.backends.cpp", reason="the C++ extension has not been built")
    checked = run_setup("check_cuda", "--link")
    assert checked.returncode == 0, checked.stdout + checked.stderr
    assert "linked and imported" in checked.stdout
    kernels = LINE.findall(checked.stdout)
    for known in (
        "scan_kernel", "write_kernel<ExpAny>", "rank_kernel<Sampled>", "sampled_grad_kernel",
        "exchange_kernel", "collect_kernel<Exp0>", "move_kernel",
    ):  # fmt: skip
        archs = {arch for _, arch, name, *_ in kernels if name == known}
        assert ARCHS <= archs <= ARCHS | NEW_ARCHS
    assert [kernel for kernel in kernels if kernel[-2:] != ("0", "0")] == []


@pytest.mark.parametrize("source", ["cut", "rank"])
def test_scores_use_only_correctly_rounded_operations(source, tmp_path):
    """Else the selections would differ from the CPU's; exponents that take `pow` are exempt."""
    ptx = tmp_path / "kernels.ptx"
    flags = re.search(r"^NVCC_FLAGS = (\[.*?\])$", (ROOT / "setup.py").read_text(), re.MULTILINE)
    assert flags is not None
    assert '"-fmad=false"' in flags[1]
    subprocess.run(
        [nvcc(), "-std=c++17", "-O3", "-fmad=false", "-Icsrc", "-arch=compute_90", "-ptx",
         f"csrc/cuda/{source}.cu", "-o", str(ptx)],
        cwd=ROOT, check=True,
    )  # fmt: skip
    kernels = [
        body for body in ptx.read_text().split(".entry ") if "ExpAny" not in body.split("(")[0]
    ]
    assert any("div.rn.f32" in body and "sqrt.rn.f32" in body for body in kernels)
    inexact = re.compile(r"\bfma\.\w+\.f32|\.ftz|\.approx|div\.full")
    assert not [match for body in kernels for match in inexact.findall(body)]


def test_a_demanded_cuda_backend_that_cannot_be_built_is_an_error():
    torch = pytest.importorskip("torch")
    if torch.version.cuda:
        pytest.skip("torch is built with CUDA: nothing stands in the way")
    refused = run_setup("--name", SPARSE_OPTIM_CUDA="1")
    assert refused.returncode != 0
    assert "SPARSE_OPTIM_CUDA=1 demands the CUDA backend, but torch has no CUDA" in refused.stderr


def test_switch_takes_only_0_and_1():
    refused = run_setup("--name", SPARSE_OPTIM_CUDA="yes")
    assert "SPARSE_OPTIM_CUDA must be 0 or 1, got 'yes'" in refused.stderr

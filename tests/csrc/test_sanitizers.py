"""The C++ code under AddressSanitizer, UBSan and ThreadSanitizer.

Without torch, tests/support/sanitizers/harness.cpp compares every kernel with a brute force of its
own, on buffers of exactly the size that may be touched. With torch, operators.py calls the
operators (ops.cpp, checks.h, the vector clones) with right and with wrong arguments.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig

import pytest
import torch
from repository import ROOT
from torch.utils import cpp_extension

COMPILER = shutil.which("g++")
SANITIZERS = {"address,undefined": 600, "thread": 200}  # cases to run, a few seconds each


@pytest.mark.skipif(COMPILER is None, reason="g++ is not installed")
@pytest.mark.parametrize("sanitizer", SANITIZERS)
def test_kernels_are_clean(sanitizer, tmp_path):
    binary = tmp_path / "harness"
    sources = [
        ROOT / "tests/support/sanitizers/harness.cpp",
        *sorted((ROOT / "csrc/cpu").glob("*.cpp")),
    ]
    build = [
        COMPILER, "-std=c++17", "-O1", "-g", "-fopenmp-simd", "-ffp-contract=off",
        "-fno-math-errno", "-Wno-psabi", f"-fsanitize={sanitizer}", "-fno-sanitize-recover=all",
        f"-I{ROOT / 'csrc'}", *map(str, sources), "-pthread", "-o", str(binary),
    ]  # fmt: skip
    compiled = subprocess.run(build, capture_output=True, text=True, check=False)
    assert compiled.returncode == 0, compiled.stderr
    cases = SANITIZERS[sanitizer]
    result = subprocess.run(
        [str(binary), str(cases)], capture_output=True, text=True, check=False, timeout=300
    )
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    assert result.stdout.startswith(f"{cases} cases, ")


def library_path(name: str) -> str:
    found = [COMPILER, f"-print-file-name={name}"]
    return subprocess.run(found, capture_output=True, text=True, check=True).stdout.strip()


@pytest.mark.skipif(COMPILER is None, reason="g++ is not installed")
@pytest.mark.skipif(sys.platform != "linux", reason="sanitizers are preloaded by Linux's loader")
def test_operators_are_clean(tmp_path):
    """Wrong contents ended the process in 31 of 1,280 calls."""
    library = tmp_path / "operators.so"
    folders = [str(ROOT / "csrc"), *cpp_extension.include_paths(), sysconfig.get_path("include")]
    sources = [ROOT / "csrc/ops.cpp", *sorted((ROOT / "csrc/cpu").glob("*.cpp"))]
    torch_library = os.path.join(os.path.dirname(torch.__file__), "lib")
    clones = ["-DSPARSE_OPTIM_CLONES"] if os.uname().machine == "x86_64" else []
    build = [
        COMPILER, "-shared", "-fPIC", "-std=c++17", "-O1", "-g", "-fopenmp-simd",
        "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-Wno-psabi",
        "-DTORCH_TARGET_VERSION=0x020b000000000000", *clones, "-fsanitize=address,undefined",
        "-fno-sanitize-recover=all", *(f"-I{folder}" for folder in folders), *map(str, sources),
        f"-L{torch_library}", "-ltorch", "-ltorch_cpu", "-lc10", "-o", str(library),
    ]  # fmt: skip
    compiled = subprocess.run(build, capture_output=True, text=True, check=False)
    assert compiled.returncode == 0, compiled.stderr
    preload = " ".join(library_path(name) for name in ("libasan.so", "libubsan.so"))
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "tests/support/sanitizers/operators.py", str(library)],
        capture_output=True, text=True, check=False, timeout=300, cwd=ROOT,
        env={**os.environ, "LD_PRELOAD": preload, "ASAN_OPTIONS": "detect_leaks=0"},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    steps, cases, refused = map(int, result.stdout.split())
    assert steps == 24 + 68 + 29
    assert cases > 1300
    assert cases > refused > cases // 2

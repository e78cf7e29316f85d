"""The C++ kernels under AddressSanitizer, UBSan and ThreadSanitizer, without torch.

tests/support/sanitizers/harness.cpp compares every operation with a brute force of its own, on
buffers of exactly the size that may be touched.
"""

from __future__ import annotations

import shutil
import subprocess

import pytest
from repository import ROOT

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

"""bench/kernels_alone.cu, the kernels without torch: compiles for a GPU; its check runs emulated.

Faults planted by hand, one at a time, in a copy of the sources, and what the check said:

    one tied entry too few in `cut`             a crash in the first step
    last entry of the tail missed in `scan`     norm of the gradients, all scan variants
    an active entry moved to a wrong place      positions, gradients, frozen entries
    last entry of the variants' tail missed     all scan variants
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import emulated_cuda
import pytest
from gpu_tools import nvcc
from repository import ROOT

SOURCE = "bench/kernels_alone.cu"
INCLUDE = ("-Icsrc", "-Ibench")


def test_it_compiles_for_a_gpu(tmp_path: Path) -> None:
    """To PTX, which takes two seconds; `bench.gpu_prepare` compiles all of it."""
    subprocess.run(
        [nvcc(), "-std=c++17", "-Xcicc", "-O0", "-arch=compute_90", "-Werror", "all-warnings",
         "-ptx", *INCLUDE, SOURCE, "-o", str(tmp_path / "alone.ptx")],
        cwd=ROOT, check=True,
    )  # fmt: skip
    kernels = (tmp_path / "alone.ptx").read_text().count(".entry")
    assert kernels > 10


@pytest.mark.usefixtures("cuda_emulator")
def test_its_check_passes_in_the_emulator(tmp_path: Path) -> None:
    if shutil.which("g++") is None:
        pytest.skip("needs g++")
    library = Path(emulated_cuda._library._name)
    others = ("-fPIC", "-shared", "-x", "c++")
    flags = [flag for flag in emulated_cuda.FLAGS if flag not in others]
    subprocess.run(
        ["g++", *flags, *INCLUDE, "-Itests/support/cuda_emulator", "-x", "c++", SOURCE,
         "-x", "none",
         str(library), f"-Wl,-rpath,{library.parent}", "-o", str(tmp_path / "alone")],
        cwd=ROOT, check=True,
    )  # fmt: skip
    done = subprocess.run(
        [str(tmp_path / "alone"), "check"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == "all equal"
    assert done.stdout.count(": equal") == 7

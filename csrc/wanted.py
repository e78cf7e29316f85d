"""Which backends setup.py compiles: what there are tools for, and what the environment demands."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig


def switch(name: str) -> str:
    """An environment variable that demands a backend (1), leaves it out (0), or is not set."""
    value = os.environ.get(name, "")
    if value not in ("", "0", "1"):
        sys.exit(f"{name} must be 0 or 1, got {value!r}")
    return value


def wants_cpp() -> bool:
    """Whether to compile anything; without a compiler, says so, or fails if it was demanded."""
    if switch("SPARSE_OPTIM_CPP") == "0":
        if switch("SPARSE_OPTIM_CUDA") == "1":
            sys.exit(
                "SPARSE_OPTIM_CUDA=1 needs the C++ backend, but SPARSE_OPTIM_CPP=0 leaves it out"
            )
        return False
    named = os.environ.get("CXX")
    commands = [named] if named else ["c++", sysconfig.get_config_var("CXX") or "g++"]
    programs = [shlex.split(command)[0] for command in commands]
    if any(map(shutil.which, programs)):
        return True
    obstacle = f"no C++ compiler: {' or '.join(programs)} was not found"
    for name in ("SPARSE_OPTIM_CPP", "SPARSE_OPTIM_CUDA"):
        if switch(name) == "1":
            sys.exit(f"{name}=1 demands a compiled backend, but there is {obstacle} (set CXX)")
    # --no-cache-dir: pip keeps the pure wheel that it builds now.
    print(
        f"sparse-optim: {obstacle}. The reference backend will run, which is exact but slow; "
        "install a compiler (Debian: apt install g++) and reinstall with "
        "pip install --no-build-isolation --no-cache-dir --force-reinstall --no-deps",
        file=sys.stderr,
    )
    return False


def nvcc_version(cuda_home: str) -> str:
    """The release of the CUDA compiler, as "13.0"; "" if there is none. torch demands its major."""
    try:
        told = subprocess.run(
            [f"{cuda_home}/bin/nvcc", "--version"], capture_output=True, text=True, check=True
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        return ""
    found = re.search(r"release (\d+\.\d+)", told)
    return found[1] if found else ""


def wants_cuda(torch_cuda: str | None, cuda_home: str | None) -> bool:
    """Whether to build the CUDA backend; says so if not, and fails where it was demanded."""
    demanded = switch("SPARSE_OPTIM_CUDA")
    if demanded == "0":
        return False
    nvcc = nvcc_version(cuda_home) if cuda_home else ""
    if not torch_cuda:
        obstacle = "torch has no CUDA"
    elif not nvcc:
        obstacle = "nvcc was not found (set CUDA_HOME)"
    elif nvcc.split(".")[0] != torch_cuda.split(".")[0]:
        obstacle = f"nvcc is of CUDA {nvcc}, torch of CUDA {torch_cuda}"
    else:
        return True
    if demanded == "1":
        sys.exit(f"SPARSE_OPTIM_CUDA=1 demands the CUDA backend, but {obstacle}")
    print(f"sparse-optim: no CUDA backend: {obstacle}", file=sys.stderr)
    return False

"""Compile everything that the CUDA build uses, on a machine without a GPU or a CUDA torch.

Run it as `python setup.py check_cuda [--link]`. Compiles with the flags of the real build, warnings
being errors, and prints registers, spills and stack of each kernel by architecture.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from glob import glob
from pathlib import Path

from torch.utils import cpp_extension

OUTPUT = Path("build/check_cuda")
RESOURCES = re.compile(
    r"Compiling entry function '(\S+)' for '(sm_\d+)'.*?(\d+) bytes stack frame, "
    r"(\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) registers",
    re.DOTALL,
)


def check_cuda(
    cxx_flags: list[str], nvcc_flags: list[str], archs_of: Callable[[str], str], link: bool
) -> None:
    """Compile every .cu and the binding; with `link`, link and import the extension too.

    Machine code for all architectures is made from one PTX, that of the oldest: no kernel asks
    which one it runs on, and most of the time goes into making PTX.

    Args:
        archs_of: what the nvcc of a CUDA home compiles for, as TORCH_CUDA_ARCH_LIST has it.
    """
    home = Path(cpp_extension.CUDA_HOME or "/usr/local/cuda")
    if not (home / "bin" / "nvcc").exists():
        sys.exit("check_cuda: nvcc was not found (set CUDA_HOME)")
    OUTPUT.mkdir(parents=True, exist_ok=True)
    named = archs_of(str(home)).replace("+PTX", "").replace(".", "")
    archs = sorted(re.split(r"[;\s]+", named.strip()), key=int)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        binding = pool.submit(_compile_binding, home, cxx_flags)
        kernels = [
            pool.submit(_compile_kernels, home, source, nvcc_flags, archs)
            for source in _kernel_files()
        ]
    objects = [compiled.result() for compiled in (*kernels, binding)]
    if link:
        _import_lazily(_link(home, objects))
    print(f"check_cuda: {len(objects)} sources compiled" + (", linked and imported" * link))


def _kernel_files() -> list[str]:
    """Those that take longest first."""
    return sorted(glob("csrc/cuda/*.cu"), key=os.path.getsize, reverse=True)


def _compile_kernels(home: Path, source: str, flags: list[str], archs: list[str]) -> Path:
    target = OUTPUT / (Path(source).stem + ".o")
    codes = ",".join(f"sm_{arch}" for arch in archs)
    log = _run(
        str(home / "bin" / "nvcc"), *cpp_extension.COMMON_NVCC_FLAGS, *flags, "-Xcompiler", "-fPIC",
        "-Xptxas", "-v", "-Werror", "all-warnings",
        f"-gencode=arch=compute_{archs[0]},code=[{codes}]", "-Icsrc", "-c", source, "-o",
        str(target),
    )  # fmt: skip
    for name, arch, stack, stores, loads, registers in RESOURCES.findall(log):
        print(
            f"{Path(source).name} {arch} {_kernel_name(name)}: {registers} registers, "
            f"{int(stores) + int(loads)} bytes spilled, {stack} bytes of stack"
        )
    return target


def _kernel_name(mangled: str) -> str:
    """The kernel's own name and what it is instantiated with, out of the mangled one."""
    kernel = re.search(r"\d([a-z_]+_kernel)", mangled)
    argument = re.search(r"(\d+)((?:Exp|KeyArray|Sampled)\w*)", mangled)
    name = kernel[1] if kernel else mangled
    return f"{name}<{argument[2][: int(argument[1])]}>" if argument else name


def _compile_binding(home: Path, flags: list[str]) -> Path:
    target = OUTPUT / "ops_cuda.o"
    include = [*cpp_extension.include_paths(), f"{home}/include", sysconfig.get_path("include")]
    _run(
        os.environ.get("CXX", "g++"), *flags, "-Werror", "-DPy_LIMITED_API=0x030a0000", "-fPIC",
        "-Icsrc", *(f"-isystem{path}" for path in include), "-c", "csrc/ops_cuda.cpp", "-o",
        str(target),
    )  # fmt: skip
    return target


def _link(home: Path, objects: list[Path]) -> Path:
    library = OUTPUT / "_C_cuda.abi3.so"
    _run(
        os.environ.get("CXX", "g++"), "-shared", *map(str, objects), "-o", str(library),
        f"-L{home}/lib64", "-lcudart_static", "-ldl", "-lrt", "-lpthread",
        *(f"-L{path}" for path in cpp_extension.library_paths()), "-Wl,--no-as-needed", "-lc10",
        "-ltorch", "-ltorch_cpu",
    )  # fmt: skip
    return library


def _import_lazily(library: Path) -> None:
    """Import it bound lazily: symbols that only a CUDA build of torch has are not called."""
    program = (
        "import importlib.util, os, sys, torch; sys.setdlopenflags(os.RTLD_LAZY);"
        "import sparse_optim.backends.cpp;"
        f"spec = importlib.util.spec_from_file_location('_C_cuda', {str(library)!r});"
        "module = importlib.util.module_from_spec(spec);"
        "assert module.scratch_bytes(1, 1, 1) > 0;"
        "keys = torch._C._dispatch_has_kernel_for_dispatch_key;"
        "names = ('bind', 'scan', 'clip', 'rank', 'cut', 'collect_begin', 'collect', "
        "'collect_end', 'append', 'update', 'sampled_grad');"
        "assert all(keys('sparse_optim::' + name, 'CUDA') for name in names)"
    )
    _run(sys.executable, "-c", program)


def _run(*command: str) -> str:
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        sys.exit(f"check_cuda: {' '.join(command)}\n{result.stdout}{result.stderr}")
    return result.stdout + result.stderr

"""Build the compiled backends: CPU where there is a C++ compiler, CUDA where torch has it and nvcc.

They build against the installed torch: pip install --no-build-isolation -e .
Without a C++ compiler the package is pure Python, and torch is not needed to build it.
SPARSE_OPTIM_CPP=1 and SPARSE_OPTIM_CUDA=1 demand a backend, =0 leaves it out. `python setup.py
check_cuda --link` compiles the CUDA backend without a GPU or a CUDA build of torch. Both take the
architectures in TORCH_CUDA_ARCH_LIST, if it is set. The rest of the metadata is in
pyproject.toml.
"""

import os
import platform
import subprocess
import sys
from glob import glob

from setuptools import Command, setup

sys.path.insert(0, os.path.abspath("csrc"))
from wanted import wants_cpp, wants_cuda

# Before torch looks for itself: from an nvcc on the PATH that is a wrapper it guesses wrong.
if "CUDA_HOME" not in os.environ and os.path.exists("/usr/local/cuda/bin/nvcc"):
    os.environ["CUDA_HOME"] = "/usr/local/cuda"

# One binary for every torch >= 2.11: only the stable ABI of LibTorch is used.
STABLE_ABI = "-DTORCH_TARGET_VERSION=0x020b000000000000"

# -ffp-contract=off: scores must be the same IEEE operations on every machine and backend.
FLAGS = [
    "-std=c++17",
    "-O3",
    "-fopenmp-simd",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fvisibility=hidden",
    "-Wall",
    "-Wextra",
    "-Wno-unused-parameter",
    "-Wno-unknown-pragmas",
    "-Wno-psabi",
    STABLE_ABI,
]

# -fmad=false: as -ffp-contract=off above.
NVCC_FLAGS = ["-std=c++17", "-O3", "-fmad=false", "-lineinfo", STABLE_ABI, "-DUSE_CUDA"]
# A100, A6000, H100; B200 and RTX 50 where nvcc knows them (12.8); others through PTX of two ages.
CUDA_ARCHS, NEW_CUDA_ARCHS = ("8.0", "8.6", "9.0"), ("10.0", "12.0")


def vector_clones() -> bool:
    """Whether the compiler can emit AVX2 and AVX-512 clones of one function (ifunc)."""
    return platform.system() == "Linux" and platform.machine() == "x86_64"


def cuda_archs(home: str) -> str:
    """TORCH_CUDA_ARCH_LIST, or else those of ours that this nvcc knows, the oldest first."""
    if named := os.environ.get("TORCH_CUDA_ARCH_LIST"):
        return named
    nvcc = os.path.join(home, "bin", "nvcc")
    known = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=False)
    new = [a for a in NEW_CUDA_ARCHS if f"compute_{a.replace('.', '')}" in known.stdout.split()]
    return ";".join([*CUDA_ARCHS, *new]).replace("9.0", "9.0+PTX") + ("+PTX" if new else "")


def compiled() -> dict:
    """The arguments of `setup` that compile the backends."""
    try:
        import torch
        from torch.utils import cpp_extension
    except ImportError as error:
        sys.exit(
            f"sparse-optim compiles against the installed torch, but `import torch` fails: {error}."
            " Install torch >= 2.11, then repeat with `pip install --no-build-isolation ...`"
        )
    clones = ["-DSPARSE_OPTIM_CLONES"] if vector_clones() else []
    common = {"include_dirs": [os.path.abspath("csrc")], "py_limited_api": True}
    built = [
        cpp_extension.CppExtension(
            "sparse_optim._C",
            sorted(["csrc/ops.cpp", *glob("csrc/cpu/*.cpp")]),
            extra_compile_args={"cxx": [*FLAGS, *clones]},
            **common,
        )
    ]
    if wants_cuda(torch.version.cuda, cpp_extension.CUDA_HOME):
        os.environ["TORCH_CUDA_ARCH_LIST"] = cuda_archs(cpp_extension.CUDA_HOME)
        built.append(
            cpp_extension.CUDAExtension(
                "sparse_optim._C_cuda",
                sorted(["csrc/ops_cuda.cpp", *glob("csrc/cuda/*.cu")]),
                extra_compile_args={"cxx": [*FLAGS, "-DUSE_CUDA"], "nvcc": NVCC_FLAGS},
                **common,
            )
        )
    return {"ext_modules": built, "cmdclass": {"build_ext": cpp_extension.BuildExtension}}


class CheckCuda(Command):
    """Compile the CUDA backend for every architecture; needs nvcc, but no GPU."""

    description = "compile (not run) all CUDA sources, warnings being errors"
    user_options = [("link", None, "also link the extension and import it")]  # noqa: RUF012

    def initialize_options(self) -> None:
        self.link = False

    def finalize_options(self) -> None: ...

    def run(self) -> None:
        from check_cuda import check_cuda

        check_cuda([*FLAGS, "-DUSE_CUDA"], NVCC_FLAGS, cuda_archs, bool(self.link))


if "check_cuda" in sys.argv:
    setup(cmdclass={"check_cuda": CheckCuda})
else:
    # cp310-abi3; without extensions, setuptools tags the wheel py3-none-any.
    options = {"bdist_wheel": {"py_limited_api": "cp310"}}
    setup(**(compiled() if wants_cpp() else {}), options=options)

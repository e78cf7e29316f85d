"""Build the compiled backends: CPU always, CUDA where torch is built with it and nvcc is there.

torch must be installed first: pip install --no-build-isolation -e .
SPARSE_OPTIM_CUDA=1 demands the CUDA backend, =0 leaves it out. `python setup.py check_cuda --link`
compiles it without a GPU or a CUDA build of torch. The rest of the metadata is in pyproject.toml.
"""

import os
import platform
import sys
from glob import glob

from setuptools import Command, setup

# Before torch looks for itself: from an nvcc on the PATH that is a wrapper it guesses wrong.
if "CUDA_HOME" not in os.environ and os.path.exists("/usr/local/cuda/bin/nvcc"):
    os.environ["CUDA_HOME"] = "/usr/local/cuda"
try:
    import torch
    from torch.utils.cpp_extension import CUDA_HOME, BuildExtension, CppExtension, CUDAExtension
except ImportError:
    sys.exit(
        "sparse-optim builds against the installed torch: install torch first, then run "
        "`pip install --no-build-isolation .`"
    )

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
CUDA_ARCHS = "8.0;8.6;9.0+PTX"  # A100, A6000, H100 and, through PTX, what comes later


def vector_clones() -> bool:
    """Whether the compiler can emit AVX2 and AVX-512 clones of one function (ifunc)."""
    return platform.system() == "Linux" and platform.machine() == "x86_64"


def wants_cuda() -> bool:
    """Whether to build the CUDA backend; says so if not, and fails where it was demanded."""
    demanded = os.environ.get("SPARSE_OPTIM_CUDA", "")
    if demanded not in ("", "0", "1"):
        sys.exit(f"SPARSE_OPTIM_CUDA must be 0 or 1, got {demanded!r}")
    if demanded == "0":
        return False
    if torch.version.cuda and CUDA_HOME and os.path.exists(f"{CUDA_HOME}/bin/nvcc"):
        return True
    obstacle = "nvcc was not found (set CUDA_HOME)" if torch.version.cuda else "torch has no CUDA"
    if demanded == "1":
        sys.exit(f"SPARSE_OPTIM_CUDA=1 demands the CUDA backend, but {obstacle}")
    print(f"sparse-optim: no CUDA backend: {obstacle}", file=sys.stderr)
    return False


def extensions() -> list[CppExtension]:
    clones = ["-DSPARSE_OPTIM_CLONES"] if vector_clones() else []
    common = {"include_dirs": [os.path.abspath("csrc")], "py_limited_api": True}
    built = [
        CppExtension(
            "sparse_optim._C",
            sorted(["csrc/ops.cpp", *glob("csrc/cpu/*.cpp")]),
            extra_compile_args={"cxx": [*FLAGS, *clones]},
            **common,
        )
    ]
    if wants_cuda():
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", CUDA_ARCHS)
        built.append(
            CUDAExtension(
                "sparse_optim._C_cuda",
                sorted(["csrc/ops_cuda.cpp", *glob("csrc/cuda/*.cu")]),
                extra_compile_args={"cxx": [*FLAGS, "-DUSE_CUDA"], "nvcc": NVCC_FLAGS},
                **common,
            )
        )
    return built


class CheckCuda(Command):
    """Compile the CUDA backend for every architecture; needs nvcc, but no GPU."""

    description = "compile (not run) all CUDA sources, warnings being errors"
    user_options = [("link", None, "also link the extension and import it")]  # noqa: RUF012

    def initialize_options(self) -> None:
        self.link = False

    def finalize_options(self) -> None: ...

    def run(self) -> None:
        sys.path.insert(0, os.path.abspath("csrc"))
        from check_cuda import check_cuda

        check_cuda([*FLAGS, "-DUSE_CUDA"], NVCC_FLAGS, CUDA_ARCHS, bool(self.link))


setup(
    ext_modules=[] if "check_cuda" in sys.argv else extensions(),
    cmdclass={"build_ext": BuildExtension, "check_cuda": CheckCuda},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)

"""Build the compiled backends: CPU always. The rest of the metadata is in pyproject.toml.

torch must be installed first: pip install --no-build-isolation -e .
"""

import os
import platform
import sys
from glob import glob

from setuptools import setup

try:
    from torch.utils.cpp_extension import BuildExtension, CppExtension
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


def vector_clones() -> bool:
    """Whether the compiler can emit AVX2 and AVX-512 clones of one function (ifunc)."""
    return platform.system() == "Linux" and platform.machine() == "x86_64"


def extension() -> CppExtension:
    clones = ["-DSPARSE_OPTIM_CLONES"] if vector_clones() else []
    return CppExtension(
        "sparse_optim._C",
        sorted(["csrc/ops.cpp", *glob("csrc/cpu/*.cpp")]),
        include_dirs=[os.path.abspath("csrc")],
        extra_compile_args={"cxx": [*FLAGS, *clones]},
        py_limited_api=True,
    )


setup(
    ext_modules=[extension()],
    cmdclass={"build_ext": BuildExtension},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)

"""Prepare a checkout for a GPU machine without a network: python -m bench.gpu_prepare

Needs nvcc, but no GPU. Fills the folder .gpu/, which git ignores and which has to travel with the
checkout:

    COMMIT            the commit, a digest of the code and what has changed since, for a machine
                      without git: what is edited later counts as changed, too
    _C*.abi3.so       the compiled backends, used if the build fails there
    kernels_alone     bench/kernels_alone.cu for the card
    whl/              wheels that you put there (`pip download --no-deps -d .gpu/whl torchao`) are
                      unpacked there, without pip
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

from bench import console, environment, gpu_build
from bench.environment import PREPARED, ROOT

LIMIT_BYTES = 20_000_000


def main() -> None:
    """Fill the folder; exit with an error if a build fails."""
    parser = console.parser("gpu_prepare", __doc__)
    parser.add_argument("--arch", default="9.0", help="compute capability (default: 9.0, Hopper)")
    arguments = parser.parse_args()
    PREPARED.mkdir(exist_ok=True)
    environment.write_commit()
    gpu_build.alone(arguments.arch)
    subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--inplace"], cwd=ROOT, check=True,
        env={**os.environ, "SPARSE_OPTIM_CPP": "1", "SPARSE_OPTIM_CUDA": "0"},
    )  # fmt: skip
    subprocess.run(
        [sys.executable, "setup.py", "check_cuda", "--link"], cwd=ROOT, check=True,
        env={**os.environ, "TORCH_CUDA_ARCH_LIST": arguments.arch},
    )  # fmt: skip
    shutil.copy2(ROOT / "build" / "check_cuda" / "_C_cuda.abi3.so", PREPARED)
    for library in gpu_build.PACKAGE.glob("_C.*so"):
        shutil.copy2(library, PREPARED)
    size = sum(each.stat().st_size for each in PREPARED.rglob("*") if each.is_file())
    print(f"{PREPARED} holds {size / 1e6:.1f} MB")
    if size > LIMIT_BYTES:
        sys.exit(f"more than {LIMIT_BYTES / 1e6:.0f} MB")


if __name__ == "__main__":
    main()

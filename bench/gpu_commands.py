"""Map the phases of a GPU report to commands and environment variables."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bench import gpu_build
from bench.gpu_plan import Phase

# Tests that memcheck and racecheck, which slow kernels down a hundred times, finish in a minute.
SMALL_TESTS = "edge_sizes or skips_the_step or of_many_tensors"
GPU_TESTS = ("tests/gpu/test_gpu.py", "tests/gpu/test_gpu_runs.py")
SANITIZER_ERRORS = 9  # exit status of compute-sanitizer if the program succeeds and it found errors
SHRINK = "200000"  # of 7B in the emulator
# What ncu looks at: the kernels that move the most bytes. A name that no kernel has is ignored.
PROFILED = "scan_kernel|collect_kernel|merge_kernel|move_kernel|update_kernel"

Command = list[str] | str  # or the reason why a phase is left out


def card() -> dict[str, Any]:
    """Describe the GPU and CUDA; empty without a GPU."""
    if not torch.cuda.is_available():
        return {}
    properties = torch.cuda.get_device_properties(0)
    return {
        "gpu": properties.name,
        "gpu_memory_bytes": properties.total_memory,
        "multiprocessors": properties.multi_processor_count,
        "capability": f"{properties.major}.{properties.minor}",
        "cuda": torch.version.cuda,
    }


def command(phase: Phase, records: Path, is_dry: bool) -> Command:
    """Return the command of a phase, or the reason why it is left out.

    A phase that measures writes its records to `records`.
    """
    if phase.needs_gpu and is_dry:
        return "it needs a GPU"
    there = card().get("gpu_memory_bytes", 0)
    if phase.least_bytes > there > 0 and not is_dry:
        need = f"parameters and gradients take {phase.least_bytes / 1e9:.0f} GB"
        return f"{need}, the GPU has {there / 1e9:.0f}"
    if phase.kind in COMMANDS:
        return COMMANDS[phase.kind](phase, is_dry)
    dry = ["--dry-run"] if is_dry else []
    return [sys.executable, "-m", "bench.gpu_phases", phase.name, str(records), *dry]


def _build(phase: Phase, is_dry: bool) -> Command:
    """Build the extension and then import it; a dry run imports the one that is there."""
    what = ["library", "--cpu"] if is_dry else ["extension" if phase.kind == "build" else "library"]
    return [sys.executable, "-m", "bench.gpu_build", *what]


def _compile(phase: Phase, is_dry: bool) -> Command:
    what = ["emulated"] if is_dry else ["alone", "--arch", card().get("capability", "9.0")]
    return [sys.executable, "-m", "bench.gpu_build", *what]


def _alone(is_dry: bool, *arguments: str) -> list[str]:
    return [str(gpu_build.EMULATED if is_dry else gpu_build.ALONE), *arguments]


def _timings(phase: Phase, is_dry: bool) -> Command:
    return _alone(is_dry, "bench", *([SHRINK, "1"] if is_dry else []))


def _tool(name: str) -> str | None:
    return shutil.which(name) or shutil.which(name, path="/usr/local/cuda/bin")


def _sanitizer(phase: Phase, *program: str) -> Command:
    tool = _tool("compute-sanitizer")
    if tool is None:
        return "compute-sanitizer is not installed"
    options = ["--tool", phase.which, "--error-exitcode", str(SANITIZER_ERRORS)]
    return [tool, *options, *program]


def _sanitized_check(phase: Phase, is_dry: bool) -> Command:
    # Written scratch memory would hide from initcheck that a kernel reads it before it writes.
    fresh = ["fresh"] if phase.which == "initcheck" else []
    return _sanitizer(phase, *_alone(is_dry, "check", *fresh))


def _sanitizer_tests(phase: Phase, is_dry: bool) -> Command:
    options = ["--target-processes", "all"]
    if phase.which == "memcheck":  # only kernels: some of torch's CUDA calls fail by design
        options += ["--report-api-errors", "no"]
    return _sanitizer(
        phase, *options, *pytest_command(f"cuda and ({SMALL_TESTS})", is_dry, alone=True)
    )


def _ncu(phase: Phase, is_dry: bool) -> Command:
    tool = _tool("ncu")
    if tool is None:
        return "ncu is not installed"
    # The clocks stay as they are.
    options = ["--clock-control", "none", "--set", "detailed", "--import-source", "no"]
    return [tool, *options, "-k", f"regex:{PROFILED}", *_alone(is_dry, "step", "8")]


def pytest_command(only: str, is_dry: bool, alone: bool) -> list[str]:
    """Return the command for the GPU tests.

    Unless `alone`, it runs several processes, so that a crash loses only one test. Warnings are
    shown instead of raised as errors, because torch emits some only on GPUs.
    """
    line = [sys.executable, "-m", "pytest", "-q", "--maxfail=15", "--tb=short", "-W", "default"]
    line += ["-p", "no:cacheprovider", *GPU_TESTS, "-k", only]
    if importlib.util.find_spec("xdist") and not (alone or is_dry):
        line += ["-n", "6"]
    if importlib.util.find_spec("pytest_timeout"):  # by a thread: a hanging kernel blocks signals
        line += ["--timeout", "60", "--timeout-method", "thread"]
    return [*line, "--dry-gpu"] if is_dry else line


COMMANDS: dict[str, Callable[[Phase, bool], Command]] = {
    "build": _build,
    "library": _build,
    "compile": _compile,
    "check": lambda phase, is_dry: _alone(is_dry, "check", *phase.which.split()),
    "sanitizer": _sanitized_check,
    "sanitizer tests": _sanitizer_tests,
    "timings": _timings,
    "ncu": _ncu,
    "tests": lambda phase, is_dry: pytest_command(phase.which, is_dry, alone=False),
}


def environment_of(phase: Phase, is_dry: bool, site: Path | None = None) -> dict[str, str]:
    """Return the environment variables of a phase.

    The build targets the card. Under a sanitizer torch does not cache memory: the sanitizer cannot
    see where a tensor ends inside a cached block.

    Args:
        site: folder of packages that came along, or None.
    """
    own = {"PYTHONUNBUFFERED": "1"}
    if phase.kind == "build" and not is_dry:
        own |= {"SPARSE_OPTIM_CUDA": "1", "TORCH_CUDA_ARCH_LIST": card()["capability"]}
    if phase.kind == "sanitizer tests":
        own["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
    if phase.kind == "tests" or is_dry:  # several processes share the cores
        own["OMP_NUM_THREADS"] = "1" if is_dry else "2"
    # The machine's own list of architectures may hold some that the kernels do not compile for.
    found = {**os.environ, **own} if phase.kind == "build" else {**own, **os.environ}
    if site is not None:
        found["PYTHONPATH"] = os.pathsep.join(filter(None, (found.get("PYTHONPATH"), str(site))))
    return found

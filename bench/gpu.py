"""Run the GPU report: python -m bench.gpu [--dry-run] [--minutes 8]   (make gpu-report)

Builds the extension, runs the GPU tests (small ones also under compute-sanitizer, if it is
installed) and measures steps, stages, memory and bandwidth, the most important first. Skips and
names the phases that do not fit the time. Writes results as they arrive to
bench/results/gpu-<card>-<date>.json, then prints a short table and the goals. Does not change the
card's settings.

--dry-run does the same on the CPU with tiny shapes, to test the report itself.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path
from typing import Any

import torch

from bench import console, environment, gpu_goals
from bench.gpu_phases import DRY_PHASES, PHASES, Phase
from bench.gpu_report import short_table

SCHEMA = 1
# Tests that memcheck and racecheck, which slow kernels down a hundred times, finish in a minute.
SMALL_TESTS = "edge_sizes or skips_the_step or of_many_tensors"
GPU_TESTS = ("tests/gpu/test_gpu.py", "tests/gpu/test_gpu_runs.py")
LEAST_S = 15  # no phase starts with less time left than this
SANITIZER_ERRORS = 9  # exit status of compute-sanitizer if tests pass and it found errors
OUTPUT_CHARACTERS = 12_000  # kept from the output of a phase: first failure and summary


def pytest_command(only: str, dry: bool, alone: bool) -> list[str]:
    """Return the command for the GPU tests.

    Unless `alone`, it runs several processes, so that a crash loses only one test. Warnings are
    shown instead of raised as errors, because torch emits some only on GPUs.
    """
    line = [sys.executable, "-m", "pytest", "-q", "--maxfail=20", "--tb=short", "-W", "default"]
    line += ["-p", "no:cacheprovider", *GPU_TESTS, "-k", only]
    if importlib.util.find_spec("xdist") and not (alone or dry):
        line += ["-n", "4"]
    if importlib.util.find_spec("pytest_timeout"):  # by a thread: a hanging kernel blocks signals
        line += ["--timeout", "90", "--timeout-method", "thread"]
    return [*line, "--dry-gpu"] if dry else line


def command(phase: Phase, records: Path, dry: bool) -> list[str] | None:
    """Return the command of a phase, or None if its tool is missing."""
    if phase.kind == "build":
        pip = ["-m", "pip", "install", "-q", "--no-build-isolation", "--no-deps", "-e", "."]
        return [sys.executable, *(["-c", "import sparse_optim._C"] if dry else pip)]
    if phase.kind == "tests":
        return pytest_command(phase.only, dry, alone=False)
    if phase.kind == "sanitizer":
        tool = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
        if not Path(tool).exists():
            return None
        options = ["--tool", phase.tool, "--error-exitcode", str(SANITIZER_ERRORS)]
        options += ["--target-processes", "all"]
        if phase.tool == "memcheck":  # only kernels: some of torch's CUDA calls fail by design
            options += ["--report-api-errors", "no"]
        return [tool, *options, *pytest_command(f"cuda and ({SMALL_TESTS})", dry, alone=True)]
    return [sys.executable, "-m", "bench.gpu_phases", phase.name, str(records)]


def environment_of(phase: Phase, dry: bool) -> dict[str, str]:
    """Return the environment variables of a phase.

    The build targets the card. Under a sanitizer torch does not cache memory: the sanitizer cannot
    see where a tensor ends inside a cached block.
    """
    own = {}
    if phase.kind == "build" and not dry:
        own = {"SPARSE_OPTIM_CUDA": "1", "TORCH_CUDA_ARCH_LIST": card()["capability"]}
    if phase.kind == "sanitizer":
        own = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    return {**own, **os.environ}


def run_phase(phase: Phase, left_s: float, dry: bool) -> tuple[dict[str, Any], list[Any]]:
    """Run a phase; return its report and its records."""
    report: dict[str, Any] = {"name": phase.name, "status": "left out: no time", "seconds": 0.0}
    if left_s < LEAST_S:
        return report, []
    there = card().get("gpu_memory_bytes", 0)
    if phase.least_bytes > there > 0 and not dry:
        need = f"parameters and gradients take {phase.least_bytes / 1e9:.0f} GB"
        return {**report, "status": f"left out: {need}, the GPU has {there / 1e9:.0f}"}, []
    with tempfile.TemporaryDirectory() as folder:
        records, log = Path(folder) / "records", Path(folder) / "log"
        line = command(phase, records, dry)
        if line is None:
            return {**report, "status": "left out: compute-sanitizer is not installed"}, []
        start = time.monotonic()
        with log.open("wb") as output:
            limit_s = min(phase.limit_s, left_s)
            report["status"] = _status(line, output, limit_s, environment_of(phase, dry))
        report["seconds"] = round(time.monotonic() - start, 1)
        text = log.read_text(errors="replace")
        report["output"] = _ends(text)
        if phase.kind in ("tests", "sanitizer"):
            report["summary"] = next(iter(text.splitlines()[::-1]), "")
            if phase.kind == "sanitizer" and report["status"].endswith(
                f"status {SANITIZER_ERRORS}"
            ):
                report["status"] = f"failed: {phase.tool} reported errors"
            if report["status"] == "ok" and " passed" not in text:
                report["status"] = "left out: every test was skipped"
        found = records.read_text().splitlines(keepends=True) if records.exists() else []
    # A stopped process may leave half a line.
    return report, [json.loads(line) for line in found if line.endswith("\n")]


def _ends(text: str) -> str:
    """Keep the beginning and the end of a long text."""
    half = OUTPUT_CHARACTERS // 2
    return text if len(text) <= 2 * half else f"{text[:half]}\n[...]\n{text[-half:]}"


def _status(line: list[str], output: Any, limit_s: float, variables: dict[str, str]) -> str:
    """Run a command and kill its child processes at the end; return "ok" or how it failed."""
    process = subprocess.Popen(
        line, cwd=environment.ROOT, stdout=output, stderr=subprocess.STDOUT,
        env=variables, start_new_session=True,
    )  # fmt: skip
    try:
        code = process.wait(limit_s)
    except subprocess.TimeoutExpired:
        return f"stopped after {limit_s:.0f} s"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):  # a driver may hold on to it
            process.wait(20)
    return "ok" if code == 0 else f"failed with exit status {code}"


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


def default_path(dry: bool) -> Path:
    """Return bench/results/gpu-<card>-<date>.json, or a temporary file for a dry run."""
    if dry:
        return Path(tempfile.gettempdir()) / "gpu-dry-run.json"
    name = str(card()["gpu"]).lower().replace("nvidia ", "").replace(" ", "-")
    return environment.RESULTS / f"gpu-{name}-{date.today().isoformat()}.json"


def measure(phases: tuple[Phase, ...], path: Path, minutes: float, dry: bool) -> dict[str, Any]:
    """Run all phases within the time; write the file after each."""
    end = time.monotonic() + 60 * minutes
    data: dict[str, Any] = {
        "schema": SCHEMA, "kind": "gpu-report", "dry_run": dry, **environment.describe(),
        "phases": [], "records": [],
    }  # fmt: skip
    data["machine"] |= card()
    for phase in phases:
        report, records = run_phase(phase, end - time.monotonic(), dry)
        data["phases"].append(report)
        data["records"] += records
        path.write_text(json.dumps(data, separators=(",", ":")) + "\n")
        ended = f"{report['status']}  {report.get('summary', '')}"
        print(f"{report['name']:24} {report['seconds']:6.1f} s  {ended}", flush=True)
        if report["status"].startswith(("failed", "stopped")):
            print(report["output"], flush=True)
    return data


def main() -> None:
    """Run the report; exit with 1 if a phase failed or took too long."""
    parser = console.parser("gpu", __doc__)
    parser.add_argument("--dry-run", action="store_true", help="use the CPU and tiny shapes")
    parser.add_argument(
        "--minutes", type=float, default=8.0, help="skip phases that do not fit (default: 8)"
    )
    parser.add_argument("--started", type=float, default=time.time(), metavar="UNIX_SECONDS",
                        help="start of the minutes (default: now)")  # fmt: skip
    parser.add_argument("--out", type=Path, help="results file")
    arguments = parser.parse_args()
    if not arguments.dry_run and not torch.cuda.is_available():
        build = f"torch {torch.__version__} is built without CUDA (another: make PYTHON=...)"
        obstacle = "torch sees no CUDA device here" if torch.version.cuda else build
        sys.exit(f"{obstacle}; --dry-run tries the report on the CPU")
    if arguments.dry_run:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    path = arguments.out or default_path(arguments.dry_run)
    phases = DRY_PHASES if arguments.dry_run else PHASES
    left = arguments.minutes - (time.time() - arguments.started) / 60
    if arguments.minutes - left > 1:
        print(f"set-up took {arguments.minutes - left:.1f} of {arguments.minutes:g} minutes: "
              "run it again to measure the phases that are left out\n")  # fmt: skip
    data = measure(phases, path, left, arguments.dry_run)
    print(f"\n{short_table(data)}\n\nwritten: {path}\n\n{gpu_goals.check(data)}")
    sys.exit(any(phase["status"].startswith(("failed", "stopped")) for phase in data["phases"]))


if __name__ == "__main__":
    main()

"""The GPU report: python -m bench.gpu [--dry-run] [--minutes 8]   (make gpu-report)

Builds the extension, runs the GPU tests (small ones under compute-sanitizer too, where it is there)
and measures steps, stages, memory and bandwidth, the most important first. What does not fit the
time is left out, and said. Results are written as they come, to
bench/results/gpu-<card>-<date>.json; a short table comes last. The card's settings are not touched.

--dry-run does the same on the CPU, on tiny shapes, to try the report itself.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path
from typing import Any

import torch

from bench import environment
from bench.gpu_phases import DRY_PHASES, PHASES, Phase
from bench.gpu_report import short_table

SCHEMA = 1
RESULTS = environment.ROOT / "bench" / "results"
# What memcheck and racecheck, which slow kernels down a hundred times, get through in a minute.
SMALL_TESTS = "edge_sizes or skips_the_step"
LEAST_S = 15  # a phase with less time left than this is not begun


def command(phase: Phase, records: Path, dry: bool) -> list[str] | None:
    """What runs a phase; None if a tool is missing."""
    tests = ["-m", "pytest", "-q", "--maxfail=20", "-p", "no:cacheprovider", "tests/test_gpu.py"]
    tests += ["--dry-gpu"] if dry else []
    if phase.kind == "build":
        pip = ["-m", "pip", "install", "-q", "--no-build-isolation", "--no-deps", "-e", "."]
        return [sys.executable, *(["-c", "import sparse_optim._C"] if dry else pip)]
    if phase.kind == "tests":
        return [sys.executable, *tests, "-k", phase.only]
    if phase.kind == "sanitizer":
        tool = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
        if not Path(tool).exists():
            return None
        options = ["--tool", phase.tool, "--error-exitcode", "9", "--target-processes", "all"]
        return [tool, *options, sys.executable, *tests, "-k", f"cuda and ({SMALL_TESTS})"]
    return [sys.executable, "-m", "bench.gpu_phases", phase.name, str(records)]


def run_phase(phase: Phase, left_s: float, dry: bool) -> tuple[dict[str, Any], list[Any]]:
    """(what became of it, its records)"""
    report: dict[str, Any] = {"name": phase.name, "status": "left out: no time", "seconds": 0.0}
    if left_s < LEAST_S:
        return report, []
    with tempfile.TemporaryDirectory() as folder:
        records, log = Path(folder) / "records", Path(folder) / "log"
        line = command(phase, records, dry)
        if line is None:
            return {**report, "status": "left out: compute-sanitizer is not installed"}, []
        start = time.monotonic()
        with log.open("wb") as output:
            report["status"] = _status(line, output, min(phase.limit_s, left_s))
        report["seconds"] = round(time.monotonic() - start, 1)
        report["output"] = log.read_text(errors="replace")[-4000:]
        found = records.read_text().splitlines() if records.exists() else []
    return report, [json.loads(line) for line in found]


def _status(line: list[str], output: Any, limit_s: float) -> str:
    """Run a command; "ok", or how it ended."""
    try:
        done = subprocess.run(
            line, cwd=environment.ROOT, stdout=output, stderr=subprocess.STDOUT, timeout=limit_s,
            check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return f"stopped after {limit_s:.0f} s"
    return "ok" if done.returncode == 0 else f"failed with exit status {done.returncode}"


def card() -> dict[str, Any]:
    """The GPU and what runs it; empty without one."""
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
    """bench/results/gpu-<card>-<date>.json; a dry run writes where nothing is recorded."""
    if dry:
        return Path(tempfile.gettempdir()) / "gpu-dry-run.json"
    name = str(card()["gpu"]).lower().replace("nvidia ", "").replace(" ", "-")
    return RESULTS / f"gpu-{name}-{date.today().isoformat()}.json"


def measure(phases: tuple[Phase, ...], path: Path, minutes: float, dry: bool) -> dict[str, Any]:
    """Run all phases within the time, writing the file after each."""
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
        path.write_text(json.dumps(data, indent=1) + "\n")
        print(f"{report['name']:24} {report['seconds']:6.1f} s  {report['status']}", flush=True)
        if report["status"].startswith(("failed", "stopped")):
            print(report["output"], flush=True)
    return data


def main() -> None:
    """Run the report; exits with 1 if a phase failed or took too long."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__)
    parser.add_argument("--dry-run", action="store_true", help="on the CPU, tiny shapes")
    parser.add_argument("--minutes", type=float, default=8.0, help="what does not fit is left out")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    if not arguments.dry_run and not torch.cuda.is_available():
        sys.exit("torch sees no CUDA device here; --dry-run tries the report on the CPU")
    if arguments.dry_run:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    path = arguments.out or default_path(arguments.dry_run)
    phases = DRY_PHASES if arguments.dry_run else PHASES
    data = measure(phases, path, arguments.minutes, arguments.dry_run)
    print(f"\n{short_table(data)}\n\nwritten: {path}")
    sys.exit(any(phase["status"].startswith(("failed", "stopped")) for phase in data["phases"]))


if __name__ == "__main__":
    main()

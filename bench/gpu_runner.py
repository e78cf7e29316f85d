"""Run the phases of a GPU report, each as a process with a time limit, and write what they find.

A kernel that crashes or hangs loses only its own phase, and the processes that it started end with
it. The results file is written anew after each phase, and its log grows beside it. The status of
all phases comes last.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from bench import console, environment, gpu_build, gpu_commands, gpu_goals
from bench.gpu_commands import card
from bench.gpu_plan import PHASES, Phase, dry, select
from bench.gpu_report import results_name, short_table
from sparse_optim.files import replacing

SCHEMA = 1
LEAST_S = 10  # no phase starts with less time left than this
OUTPUT_CHARACTERS = 12_000  # of a phase in the results file: first failure and summary
LOG_CHARACTERS = 300_000  # of a phase in the log
WHOLE = "gpu-report"
RESULTS_FOLDER = "OUT"  # environment variable: the folder for results, if it is set
SUMMARISED = ("tests", "sanitizer tests", "sanitizer", "check", "compile", "library")


class Processes:
    """The processes of a report, which end together if it is interrupted."""

    def __init__(self) -> None:
        self._running: set[subprocess.Popen[bytes]] = set()
        self._lock, self._ended = threading.Lock(), False

    def start(self, line: list[str], output: Any, variables: dict[str, str]) -> Any:
        """Start a process.

        Raises:
            OSError: it cannot start, or the report has ended.
        """
        with self._lock:
            if self._ended:
                raise OSError("the report was interrupted")
            process = subprocess.Popen(
                line, cwd=environment.ROOT, stdout=output, stderr=subprocess.STDOUT,
                env=variables, start_new_session=True,
            )  # fmt: skip
            self._running.add(process)
            return process

    def end(self, process: subprocess.Popen[bytes]) -> None:
        """End a process and all that it started."""
        self._running.discard(process)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):  # a driver may hold on to it
            process.wait(20)

    def end_all(self) -> None:
        """End all processes; none starts later."""
        with self._lock:
            self._ended = True
            for process in list(self._running):
                self.end(process)


class Report:
    """The results of a run, on disk after each phase.

    Args:
        path: results file; the log has the same name with the suffix .log.
        is_dry: whether this is a dry run.
        minutes: phases that do not fit are left out; None: no limit.
        patience: factor on the limits of the phases.
    """

    def __init__(
        self, path: Path, is_dry: bool, minutes: float | None = None, patience: float = 1.0
    ) -> None:
        self.path, self._is_dry, self._patience = path, is_dry, patience
        self._start = time.monotonic()
        self._minutes, self._lock = minutes, threading.Lock()
        self._site: Path | None = None
        self._processes = Processes()
        self.data: dict[str, Any] = {
            "schema": SCHEMA, "kind": "gpu-report", "dry_run": is_dry, **environment.describe(),
            "phases": [], "records": [],
        }  # fmt: skip
        self.data["machine"] |= card()

    def run(self, phases: Sequence[Phase]) -> dict[str, Any]:
        """Run the phases; those that name what they wait for run beside others."""
        self.path.with_suffix(".log").unlink(missing_ok=True)
        with tempfile.TemporaryDirectory() as folder:
            self._site = gpu_build.unpack_wheels(Path(folder))
            with ThreadPoolExecutor(max(len(phases), 1)) as pool:
                try:
                    self._run_all(phases, pool)
                except BaseException:  # Ctrl-C, too: nothing goes on without this process
                    self._processes.end_all()
                    raise
        return self.data

    def _run_all(self, phases: Sequence[Phase], pool: ThreadPoolExecutor) -> None:
        started: dict[str, Future[None]] = {}
        for phase in phases:
            names = started if phase.after is None else phase.after
            before = [started[name] for name in names if name in started]
            started[phase.name] = pool.submit(self._run_after, phase, before)
        for future in started.values():
            future.result()

    def _run_after(self, phase: Phase, before: list[Future[None]]) -> None:
        wait(before)
        begin = time.monotonic() - self._start
        left_s = float("inf") if self._minutes is None else 60 * self._minutes - begin
        patient = replace(phase, limit_s=phase.limit_s * self._patience)
        report, records, text = run_phase(
            patient, left_s, self._is_dry, self._site, self._processes
        )
        with self._lock:
            self.data["phases"].append({**report, "began": round(begin, 1)})
            self.data["records"] += records
            write(self.path, self.data)
            with self.path.with_suffix(".log").open("a") as log:
                log.write(f"=== {status_line(report)}\n{ends(text, LOG_CHARACTERS)}\n")
            say(status_line(report))
            if failed(report):
                say(report["output"])


def write(path: Path, data: dict[str, Any]) -> None:
    """Write a results file, all or nothing."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(data, separators=(",", ":")) + "\n")


def say(text: str) -> None:
    """Print a text; whoever no longer listens (`| head`) does not end the run."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


def run_phase(
    phase: Phase, left_s: float, is_dry: bool, site: Path | None = None,
    processes: Processes | None = None,
) -> tuple[dict[str, Any], list[Any], str]:  # fmt: skip
    """Run a phase; return its report, its records, and what it printed."""
    report: dict[str, Any] = {"name": phase.name, "status": "left out: no time", "seconds": 0.0}
    if left_s < LEAST_S:
        return report, [], ""
    with tempfile.TemporaryDirectory() as folder:
        records, log = Path(folder) / "records", Path(folder) / "log"
        line = gpu_commands.command(phase, records, is_dry)
        if isinstance(line, str):
            return {**report, "status": f"left out: {line}"}, [], ""
        start = time.monotonic()
        with log.open("wb") as output:
            variables = gpu_commands.environment_of(phase, is_dry, site)
            limit_s = min(phase.limit_s, left_s)
            report["status"] = _status(processes or Processes(), line, output, limit_s, variables)
        report["seconds"] = round(time.monotonic() - start, 1)
        text = log.read_text(errors="replace")
        found = records.read_text().splitlines(keepends=True) if records.exists() else []
    # A stopped process may leave half a line.
    measured = [json.loads(line) for line in found if line.endswith("\n")]
    report["output"] = ends(text, OUTPUT_CHARACTERS)
    report["status"] = _interpreted(phase, report["status"], text, measured)
    if phase.kind in SUMMARISED or report["status"].startswith("failed with"):
        report["summary"] = next(filter(str.strip, text.splitlines()[::-1]), "")[:160]
    return report, measured, text


def _interpreted(phase: Phase, status: str, text: str, records: list[Any]) -> str:
    """Return the status of a phase, in the light of what it printed and recorded."""
    if status == "ok" and records:
        if all("absent" in record for record in records):
            return f"left out: {records[0]['absent']}"
        if all({"absent", "failed"} & record.keys() for record in records):
            return f"failed: {next(each['failed'] for each in records if 'failed' in each)}"
    by_sanitizer = status.endswith(f"status {gpu_commands.SANITIZER_ERRORS}")
    if phase.kind.startswith("sanitizer") and by_sanitizer:
        return f"failed: {phase.which} reported errors"
    if phase.kind in ("tests", "sanitizer tests") and status == "ok" and " passed" not in text:
        return "left out: every test was skipped"
    return status


def ends(text: str, characters: int) -> str:
    """Keep the beginning and the end of a long text."""
    half = characters // 2
    return text if len(text) <= 2 * half else f"{text[:half]}\n[...]\n{text[-half:]}"


def _status(
    processes: Processes, line: list[str], output: Any, limit_s: float, variables: dict[str, str]
) -> str:
    """Run a command and end all that it started; return "ok" or how it failed."""
    try:
        process = processes.start(line, output, variables)
    except OSError as error:
        return f"failed to start: {error}"
    try:
        code = process.wait(limit_s if limit_s < float("inf") else None)
    except subprocess.TimeoutExpired:
        return f"stopped after {limit_s:.0f} s"
    finally:
        processes.end(process)
    return "ok" if code == 0 else f"failed with exit status {code}"


def failed(report: dict[str, Any]) -> bool:
    """Whether a phase failed or took too long."""
    return bool(report["status"].startswith(("failed", "stopped")))


def status_line(report: dict[str, Any]) -> str:
    """Show how a phase ended."""
    summary = "" if report.get("summary", "") == "" else f"  {report['summary']}"
    return f"{report['name']:28} {report['seconds']:6.1f} s  {report['status']}{summary}"


def status_table(data: dict[str, Any]) -> str:
    """Show how all phases ended, and when they began."""
    return "\n".join(f"{each['began']:6.1f} s  {status_line(each)}" for each in data["phases"])


def default_path(name: str, is_dry: bool) -> Path:
    """Return the results file: in the folder OUT, if set; else where a run of this kind belongs.

    A whole report belongs to bench/results, one of the calls to .gpu/ (`bench.gpu_report` joins
    them), a dry run to the folder for temporary files.
    """
    folder = os.environ.get(RESULTS_FOLDER) or (tempfile.gettempdir() if is_dry else "")
    if name == WHOLE and not folder:  # a GPU is there
        return environment.RESULTS / results_name(card()["gpu"])
    parent = Path(folder) if folder else environment.PREPARED
    parent.mkdir(parents=True, exist_ok=True)
    return parent / f"{name}.json"


def parse(name: str, doc: str | None, minutes: float | None) -> argparse.Namespace:
    """Parse the arguments of a report."""
    limit = "no limit" if minutes is None else f"{minutes:g}"
    parser = console.parser(name.replace("-", "_"), doc)
    parser.add_argument("--dry-run", action="store_true", help="use the CPU and tiny shapes")
    parser.add_argument("--minutes", type=float, default=minutes,
                        help=f"leave out phases that do not fit (default: {limit})")  # fmt: skip
    parser.add_argument("--only", nargs="+", metavar="PHASE", default=(),
                        choices=[phase.name for phase in PHASES],
                        help="run these phases alone; --list shows them")  # fmt: skip
    parser.add_argument("--list", action="store_true", help="list the phases and end")
    parser.add_argument("--out", type=Path, help="results file")
    return parser.parse_args()


def report(
    name: str, doc: str | None, call: int | None, minutes: float | None, patience: float = 1.0
) -> None:
    """Run a report from the command line; exit with 1 if a phase failed or took too long.

    Args:
        name: of the results file.
        doc: help of the command.
        call: whose phases to run; None: all.
        minutes: default limit.
        patience: factor on the limits of the phases.
    """
    arguments = parse(name, doc, minutes)
    phases = select(call, arguments.only)
    if arguments.list:
        print("\n".join(f"{phase.name:24} {phase.limit_s:4.0f} s" for phase in phases))
        return
    if arguments.dry_run:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        phases = list(map(dry, phases))
    elif not torch.cuda.is_available():
        build = f"torch {torch.__version__} is built without CUDA (another: make PYTHON=...)"
        obstacle = "torch sees no CUDA device here" if torch.version.cuda else build
        if os.environ.get(RESULTS_FOLDER):
            path = arguments.out or default_path(name, is_dry=False)
            write(path, {"schema": SCHEMA, **environment.describe(), "obstacle": obstacle})
        sys.exit(f"{obstacle}; --dry-run tries the report on the CPU")
    else:
        gpu_build.link_triton_kernels()
    path = arguments.out or default_path(name, arguments.dry_run)
    data = Report(path, arguments.dry_run, arguments.minutes, patience).run(phases)
    text = f"{short_table(data)}\n\n{gpu_goals.check(data)}\n\n{status_table(data)}\n"
    with path.with_suffix(".log").open("a") as log:
        log.write(text)
    say(f"\n{text}\nwritten: {path}")
    sys.exit(any(map(failed, data["phases"])))

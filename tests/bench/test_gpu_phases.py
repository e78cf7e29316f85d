"""What runs the GPU report's phases: limits, ends, tools that are missing. Nothing needs a GPU."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from repository import ROOT

from bench import (
    clocks,
    environment,
    gpu,
    gpu_phases,
    gpu_report,
    gpu_subjects,
    shapes,
)


def test_phases_that_fail_or_do_not_fit_are_told(tmp_path, monkeypatch):
    lines = {
        "dies": "import os; print('last words', flush=True); os._exit(3)",
        "hangs": "import time; time.sleep(60)",
        "works": "pass",
    }

    def command(phase: gpu_phases.Phase, *_: object) -> list[str] | None:
        return [sys.executable, "-c", lines[phase.name]] if phase.name in lines else None

    monkeypatch.setattr(gpu, "command", command)
    phases = tuple(gpu_phases.Phase(name, "x", limit) for name, limit in
                   (("dies", 20), ("hangs", 0.5), ("no tool", 20), ("works", 20)))  # fmt: skip
    path = tmp_path / "file.json"
    found = gpu.measure(phases, path, 1.0, dry=True)
    assert [phase["status"] for phase in found["phases"]] == [
        "failed with exit status 3", "stopped after 0 s",
        "left out: compute-sanitizer is not installed", "ok",
    ]  # fmt: skip
    assert "last words" in found["phases"][0]["output"]
    assert json.loads(path.read_text())["phases"] == found["phases"]
    assert "- dies: failed with exit status 3" in gpu_report.failures(found)
    late = gpu.measure(phases, path, gpu.LEAST_S / 61, dry=True)
    assert {phase["status"] for phase in late["phases"]} == {"left out: no time"}


def test_records_of_a_phase_that_dies_are_kept(monkeypatch):
    """All but half a line."""
    lines = '{"us": [1]}\\n{"us": [2'
    script = f"import sys, os; open(sys.argv[1], 'w').write('{lines}'); os._exit(1)"
    monkeypatch.setattr(
        gpu, "command", lambda phase, path, dry: [sys.executable, "-c", script, str(path)]
    )
    report, records = gpu.run_phase(gpu_phases.Phase("a", "steps", 20), 60, dry=True)
    assert report["status"] == "failed with exit status 1"
    assert records == [{"us": [1]}]


def test_what_a_stopped_phase_has_started_ends_with_it(tmp_path, monkeypatch):
    """compute-sanitizer, for one, leaves the tests running when it is killed."""
    child = "import time, sys, pathlib; time.sleep(3); pathlib.Path(sys.argv[1]).touch()"
    parent = (
        f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}, *sys.argv[1:]])"
    )
    monkeypatch.setattr(
        gpu, "command", lambda *_: [sys.executable, "-c", parent, str(tmp_path / "survived")]
    )
    report, _ = gpu.run_phase(gpu_phases.Phase("a", "x", 1.0), 60, dry=True)
    assert report["status"] == "stopped after 1 s"
    time.sleep(3)
    assert not (tmp_path / "survived").exists()


def test_skipped_tests_do_not_count_as_passed(monkeypatch):
    for words, status in (("7 skipped in 1s", "left out: every test was skipped"),
                          ("7 passed, 1 skipped in 1s", "ok")):  # fmt: skip
        line = [sys.executable, "-c", f"print('dots'); print({words!r})"]
        monkeypatch.setattr(gpu, "command", lambda *_, line=line: line)
        report, _ = gpu.run_phase(gpu_phases.Phase("a", "tests", 20), 60, dry=True)
        assert (report["status"], report["summary"]) == (status, words)


def test_long_output_keeps_its_ends():
    text = "first failure" + 100_000 * "." + "summary"
    kept = gpu._ends(text)
    assert kept.startswith("first failure")
    assert kept.endswith("summary")
    assert len(kept) < gpu.OUTPUT_CHARACTERS + 20
    assert gpu._ends("short") == "short"


def test_variables_of_the_phases(monkeypatch):
    monkeypatch.setattr(gpu, "card", lambda: {"capability": "9.0"})
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    build = gpu.environment_of(gpu_phases.PHASES[0], dry=False)
    assert build["SPARSE_OPTIM_CUDA"] == "1"  # without nvcc the build fails, and is told
    assert build["TORCH_CUDA_ARCH_LIST"] == "9.0"
    memcheck = next(phase for phase in gpu_phases.PHASES if phase.tool == "memcheck")
    assert gpu.environment_of(memcheck, dry=False)["PYTORCH_NO_CUDA_MEMORY_CACHING"] == "1"


def test_without_git_there_is_no_commit(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert environment._git("rev-parse", "HEAD") == ""


def test_commands_of_the_phases():
    for phases, dry in ((gpu_phases.PHASES, False), (gpu_phases.DRY_PHASES, True)):
        assert len({phase.name for phase in phases}) == len(phases)
        for phase in phases:
            line = gpu.command(phase, Path("out"), dry)
            if phase.kind == "tests":
                assert line[line.index("-k") + 1] == phase.only
                assert ("--dry-gpu" in line) == dry
            if phase.kind in gpu_phases.MEASURE:
                assert line[-2:] == [phase.name, "out"]
                assert phase.cell is None or phase.cell.model in shapes.MODELS


def test_a_measuring_phase_runs_as_a_process(tmp_path):
    phase = next(phase for phase in gpu_phases.DRY_PHASES if phase.kind == "bandwidth")
    line = gpu.command(phase, tmp_path / "records", dry=True)
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    records = [json.loads(each) for each in (tmp_path / "records").read_text().splitlines()]
    assert {each["name"] for each in records} == {"copy", "read"}
    assert all(len(each["us"]) == gpu_phases.ROUNDS for each in records)


def test_a_subject_that_fails_says_why():
    def failing(error: Exception) -> gpu_subjects.Builder:
        def make() -> None:
            raise error

        return gpu_subjects.Builder({"name": "fused", "mode": "alone"}, make)

    errors = RuntimeError("no kernel\nat ..."), torch.OutOfMemoryError("Tried to allocate ...")
    records = gpu_phases.timed(map(failing, errors), clocks.CpuClock())
    assert list(records) == [
        {"name": "fused", "mode": "alone", "failed": "no kernel"},
        {"name": "fused", "mode": "alone", "failed": "out of memory"},
    ]


def test_a_model_too_large_for_the_gpu_is_left_out(monkeypatch):
    monkeypatch.setattr(gpu, "card", lambda: {"gpu_memory_bytes": 48 * 2**30})
    phase = next(phase for phase in gpu_phases.PHASES if phase.name == "steps 7B fp32")
    report, records = gpu.run_phase(phase, 60, dry=False)
    assert report["status"] == ("left out: parameters and gradients take 54 GB, the GPU has 52")
    assert not records
    assert gpu_phases.PHASES[0].least_bytes == 0


@pytest.mark.parametrize("code", [1, 9])
def test_errors_of_the_sanitizer_are_told_from_those_of_tests(monkeypatch, code):
    line = [sys.executable, "-c", f"print('1 passed'); raise SystemExit({code})"]
    monkeypatch.setattr(gpu, "command", lambda *_: line)
    phase = gpu_phases.Phase("racecheck", "sanitizer", 20, tool="racecheck")
    report, _ = gpu.run_phase(phase, 60, dry=True)
    expected = {1: "failed with exit status 1", 9: "failed: racecheck reported errors"}
    assert report["status"] == expected[code]


@pytest.mark.parametrize(("set_up", "done"), [("false", False), ("true", True)])
def test_packages_that_did_not_come_are_asked_for_again(tmp_path, set_up, done):
    """make leaves a stamp only where pip succeeded, and the report goes on in either case."""
    if shutil.which("make") is None:
        pytest.skip("needs make")
    (tmp_path / "environment").touch()
    own = [f"STAMPS={tmp_path}/", f"SET_UP={set_up}", "PY=echo"]
    made = subprocess.run(
        ["make", *own, "gpu-report"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert made.returncode == 0, made.stderr
    assert (tmp_path / "gpu-report").exists() == done
    assert "-m bench.gpu --started" in made.stdout


def test_without_a_gpu_the_report_says_what_to_do():
    done = subprocess.run(
        [sys.executable, "-m", "bench.gpu"], cwd=ROOT, capture_output=True, text=True, check=False,
        env={"CUDA_VISIBLE_DEVICES": "", "PATH": ""},
    )  # fmt: skip
    assert done.returncode == 1
    assert ("sees no CUDA device" in done.stderr) == bool(torch.version.cuda)
    assert ("built without CUDA" in done.stderr) != bool(torch.version.cuda)
    assert "--dry-run tries the report on the CPU" in done.stderr

"""The GPU report, tried on the CPU: every kind of phase, the file, the tables. No timing counts."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # bench is not part of the installed package

from bench import allocations, clocks, environment, gpu, gpu_phases, gpu_report, report, shapes  # noqa: E402

pytest.importorskip("sparse_optim.cpp", reason="the C++ extension has not been built")

TINY = gpu_phases.Cell("tiny", "bf16", 2000, 32)
KINDS = ("bandwidth", "steps", "stages", "factors")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    """A report of the phases that measure."""
    patch = pytest.MonkeyPatch()
    patch.setattr(gpu_phases, "ROUNDS", 2)
    patch.setattr(gpu_phases, "WARMUP", 0)
    patch.setattr(gpu_phases, "BANDWIDTH_BYTES", 1 << 24)
    patch.setattr(clocks, "FLUSH_BYTES", 1 << 16)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # on a busy machine, the second costs more than it brings
    path = tmp_path_factory.mktemp("gpu") / "gpu-dry-2000-01-01.json"
    phases = tuple(gpu_phases.Phase(kind, kind, 60, TINY) for kind in KINDS)

    def here(phase: gpu_phases.Phase, left_s: float, dry: bool) -> tuple[dict, list]:
        with torch.no_grad():
            found = list(gpu_phases.MEASURE[phase.kind](phase.cell, torch.device("cpu")))
        labels = {"kind": phase.kind, "model": "tiny", "dtype": "bf16"}
        status = {"name": phase.name, "status": "ok", "seconds": 1.0}
        return status, [{**labels, **each} for each in found]

    patch.setattr(gpu, "run_phase", here)
    gpu.measure(phases, path, 1.0, dry=True)
    patch.undo()
    torch.set_num_threads(threads)
    return json.loads(path.read_text())


def test_every_subject_is_measured(data):
    assert not [each for each in data["records"] if "failed" in each]
    steps = gpu_report.select(data, "steps")
    found = {(each["name"], each.get("mode"), each.get("exp")) for each in steps}
    adamw = {(name, mode, None) for name in ("fused", "foreach") for mode in gpu_report.MODES}
    ours = {("cpp", mode, 0.0) for mode in ("alone", "clip", "scaler")} | {("cpp", "clip", 2.0)}
    assert ours <= found
    assert {each for each in adamw if each[1] != "graph"} <= found
    assert ("read", None, None) in found
    assert all(len(each["us"]) == 2 for each in steps)
    assert {each["stage"] for each in gpu_report.select(data, "stages")} == {
        "bind", "scan", "cut", "append", "update"
    }  # fmt: skip
    settings = {(each["budget"], each["quota"]) for each in gpu_report.select(data, "factors")}
    assert settings == {(1000, 32), (4000, 32), (2000, 8), (2000, 64)}
    assert {each["name"] for each in gpu_report.select(data, "bandwidth")} == {"copy", "read"}


def test_memory_of_the_optimizers(data):
    held = {each["name"]: each["held_bytes"] for each in data["records"] if "held_bytes" in each}
    entries = shapes.num_entries(shapes.MODELS["tiny"])
    tensors = len(shapes.MODELS["tiny"])
    assert held["fused"] == 4 * entries + 4 * tensors  # bfloat16 moments, a count each
    assert held["cpp"] < held["fused"] / 4


def test_tables_show_what_was_measured(data):
    text = gpu_report.full_report(data)
    assert "tiny bf16, cpp, exp = 2" in text
    assert "tiny bf16, cpp, B = 4K, k = 32" in text
    assert "dry run on" in text
    assert "Not measured" not in text
    read = next(each for each in gpu_report.select(data, "steps") if each["name"] == "read")
    assert f"| tiny bf16, read | {gpu_report.median_ms(read):.3f} |" in text


def test_reports_have_a_gpu_part_once_there_is_a_file(data, tmp_path):
    assert report.gpu_section(gpu_report.short_table, tmp_path) == []
    (tmp_path / "gpu-a-2000-01-01.json").write_text(json.dumps({**data, "date": "2000-01-01"}))
    (tmp_path / "gpu-b-1999-01-01.json").write_text(json.dumps({**data, "date": "1999-01-01"}))
    (section,) = report.gpu_section(gpu_report.short_table, tmp_path)
    assert "2000-01-01" in section


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


def test_allocations_of_a_call_are_counted():
    def run() -> torch.Tensor:
        first = torch.zeros(1_000_000)
        second = first + 1
        del first
        return second[:10].clone()

    allocated = allocations.of_call(run, torch.device("cpu"))
    assert allocated.left == pytest.approx(40, abs=64)
    assert allocated.peak == pytest.approx(8_000_000, rel=1e-3)


def test_a_subject_that_fails_says_why():
    def build() -> None:
        raise RuntimeError("CUDA out of memory.\nTried to ...")

    assert list(gpu_phases.timed(iter([build]), clocks.CpuClock())) == [
        {"failed": "CUDA out of memory."}
    ]


@pytest.mark.parametrize(
    ("model", "entries"), [("Llama-3.2-1B", 1_235_814_400), ("Llama-7B", 6_738_415_616)]
)
def test_decoders_have_the_models_size(model, entries):
    assert shapes.num_entries(shapes.MODELS[model]) == entries


def test_without_a_gpu_the_report_says_what_to_do():
    done = subprocess.run(
        [sys.executable, "-m", "bench.gpu"], cwd=ROOT, capture_output=True, text=True, check=False,
        env={"CUDA_VISIBLE_DEVICES": "", "PATH": ""},
    )  # fmt: skip
    assert done.returncode == 1
    assert "--dry-run tries the report on the CPU" in done.stderr

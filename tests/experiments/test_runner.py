"""Cells run once, resume after a kill, stop in time; cells with other settings raise an error."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers", reason="experiments need the extra 'finetune'")
pytest.importorskip("datasets", reason="experiments need the extra 'finetune'")

from experiment_cases import LETTERS, runner, tiny_experiment, tiny_task, write_classes, write_lines
from repository import ROOT
from tiny_models import save_decoder

from sparse_optim.experiments import runner as module
from sparse_optim.experiments.cells import Cell, CellStore, cell_name
from sparse_optim.experiments.overrides import Choice, choose, whole
from sparse_optim.experiments.presets import Block, ExperimentError, Row


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Tiny models are faster on one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


NAMES = [
    "letters-id3-200-seed6-lr0.001",
    "letters-frozen-seed6-lr0.001",
    "letters-id3-200-seed7-lr0.01",
]


def recorded(folder: Path) -> dict[str, dict[str, object]]:
    """The file's cells by name, in the order of the lines."""
    lines = (folder / "out" / "cells.jsonl").read_text().splitlines()
    return {cell_name(**line["cell"]): line for line in map(json.loads, lines)}


def test_a_grid_leaves_one_line_a_cell_and_runs_nothing_twice(tmp_path):
    experiment = tiny_experiment(tmp_path)
    outcomes = list(runner(experiment, tmp_path).run())
    lines = recorded(tmp_path)
    assert list(lines) == [NAMES[1], NAMES[0], NAMES[2]]  # sorted, whatever ran first
    first = lines[NAMES[0]]
    assert first["active_entries"] - first["fresh_entries"] == 200
    assert first["cell"] == {
        "task": "letters",
        "row": "id3-200",
        "stage": "run",
        "lr": 1e-3,
        "seed": 6,
    }
    assert (first["steps"], first["config"]["lr"], first["config"]["seed"]) == (2, 1e-3, 6)
    assert first["config"]["dataset"] == "letters"  # not where the folder lies on this machine
    assert 0 <= first["values"]["letters"] <= 1
    assert first["state_bytes"] > 0
    assert first["seconds"] >= first["train_seconds"] > 0
    assert {"torch", "transformers", "sparse_optim"} <= first["versions"].keys()
    assert [step["step"] for step in first["evaluations"]] == [2]  # the split is seen once
    assert outcomes[0] == first
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["cells.jsonl"]
    again = runner(experiment, tmp_path)
    assert list(again.run()) == []
    assert again.is_finished()


def test_cells_do_not_depend_on_those_before_them(tmp_path):
    """What is kept in memory (data, base model) must not carry over from cell to cell."""
    (tmp_path / "data").mkdir()
    save_decoder(tmp_path / "decoder")
    rows = [{"prompt": " ".join(LETTERS), "response": letter} for letter in LETTERS * 4]
    folder = tmp_path / "data" / "words"
    folder.mkdir()
    for split in ("train", "validation"):
        write_lines(folder / f"{split}.jsonl", rows)
    task = replace(tiny_task("words"), task="causal-lm", metric="token_loss")
    row = Row("id3", (1e-1, 1e-2), "200")
    experiment = tiny_experiment(
        tmp_path, model=str(tmp_path / "decoder"), blocks=(Block((task,), (row,)),)
    )
    together = list(runner(experiment, tmp_path).run())
    last = recorded(tmp_path)["words-id3-200-seed7-lr0.01"]
    (tmp_path / "out" / "cells.jsonl").write_text(json.dumps(together[0]) + "\n")
    (alone,) = runner(experiment, tmp_path).run()
    assert alone["values"] == together[1]["values"] == last["values"]
    assert together[0]["values"] != together[1]["values"]


def test_a_failure_inside_a_cell_leaves_the_others(tmp_path, monkeypatch):
    experiment = tiny_experiment(tmp_path)
    real = module.train_model
    calls = []

    def fails_in_the_second(*arguments, **options):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*arguments, **options)

    monkeypatch.setattr(module, "train_model", fails_in_the_second)
    with pytest.raises(KeyboardInterrupt):
        list(runner(experiment, tmp_path).run())
    assert list(recorded(tmp_path)) == NAMES[:1]
    assert len(list(runner(experiment, tmp_path).run())) == 2
    assert len(calls) == 4


def made_up(name: str, lr: float = 1e-3, **more: object) -> tuple[Cell, dict[str, object]]:
    """A cell of a task, and an outcome."""
    cell = Cell(tiny_task(name), Row("id3", (lr,), "200"), lr, 0)
    labels = {"task": name, "row": "id3-200", "stage": "run", "lr": lr, "seed": 0}
    return cell, {"cell": labels, **more}


def test_a_write_that_breaks_off_leaves_the_file_as_it_was(tmp_path, monkeypatch):
    store = CellStore(tmp_path / "cells.jsonl")
    store.write(*made_up("one"))

    def breaks_off(path: Path, text: str) -> None:
        with path.open("w") as file:
            file.write(text[: len(text) // 2])
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr("pathlib.Path.write_text", breaks_off)
        with pytest.raises(OSError, match="disk full"):
            store.write(*made_up("two"))
    assert [path.name for path in tmp_path.iterdir()] == ["cells.jsonl"]
    assert store.read(made_up("one")[0]) == made_up("one")[1]
    assert store.read(made_up("two")[0]) is None


def test_cells_that_processes_write_at_once_are_all_kept(tmp_path):
    """Threads stand in for processes: each has its own store, and the lock is per open file."""
    path = tmp_path / "cells.jsonl"

    def write(task: str) -> None:
        store = CellStore(path)
        for number in range(20):
            store.write(*made_up(task, lr=1.0 + number))

    tasks = [f"task{number}" for number in range(8)]
    with ThreadPoolExecutor(len(tasks)) as pool:
        list(pool.map(write, tasks))
    found = [json.loads(line)["cell"] for line in path.read_text().splitlines()]
    assert [(one["task"], one["lr"]) for one in found] == [
        (task, 1.0 + number) for task in tasks for number in range(20)
    ]


def test_a_store_sees_what_others_write_and_replaces_a_cell_that_ran_again(tmp_path):
    mine, other = (CellStore(tmp_path / "cells.jsonl") for _ in range(2))
    cell, outcome = made_up("one", seconds=1.0)
    assert mine.read(cell) is None
    other.write(cell, outcome)
    assert mine.read(cell) == outcome
    other.write(*made_up("one", seconds=2.0))
    assert mine.read(cell) == made_up("one", seconds=2.0)[1]
    assert len(mine.path.read_text().splitlines()) == 1


def test_diverged_values_are_null(tmp_path):
    store = CellStore(tmp_path / "cells.jsonl")
    cell, outcome = made_up("one", values={"one": float("nan")}, evaluations=[{"loss": math.inf}])
    store.write(cell, outcome)
    assert store.read(cell) == {**outcome, "values": {"one": None}, "evaluations": [{"loss": None}]}


KILLED = """
import sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from experiment_cases import runner, tiny_experiment
from sparse_optim.experiments import runner as module
folder = Path({folder!r})
real, calls = module.train_model, []
def stops_in_the_second(*arguments, **options):
    calls.append(1)
    if len(calls) == 2:
        (folder / "in-the-second").touch()
        sys.stdin.read()
    return real(*arguments, **options)
module.train_model = stops_in_the_second
list(runner(tiny_experiment(folder), folder, extra={{"cpu": True, "threads": 1}}).run())
"""


def test_a_killed_process_goes_on_where_it_was(tmp_path):
    experiment = tiny_experiment(tmp_path)
    code = KILLED.format(tests=str(ROOT / "tests" / "support"), folder=str(tmp_path))
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE) as process:
        deadline = time.monotonic() + 120
        while not (tmp_path / "in-the-second").exists():
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
        os.kill(process.pid, signal.SIGKILL)
    assert list(recorded(tmp_path)) == NAMES[:1]
    assert [outcome["cell"]["row"] for outcome in runner(experiment, tmp_path).run()] == [
        "frozen",
        "id3-200",
    ]


def test_other_settings_are_refused_not_mixed(tmp_path):
    experiment = tiny_experiment(tmp_path)
    list(runner(experiment, tmp_path, only=("frozen",)).run())
    longer = tiny_experiment(
        tmp_path, blocks=(Block((tiny_task("letters", steps=3),), experiment.rows),)
    )
    with pytest.raises(ExperimentError, match=r"letters-frozen.*ran with steps=2, now 3"):
        list(runner(longer, tmp_path, only=("frozen",)).run())


def test_a_setting_that_came_after_a_cell_is_the_default(tmp_path):
    """New options must not make the cells of an earlier version useless."""
    experiment = tiny_experiment(tmp_path)
    run = runner(experiment, tmp_path, only=("frozen",))
    (outcome,) = run.run()
    cell = next(run.wanted())
    del outcome["config"]["sparse_score"]
    run.store.write(cell, outcome)
    assert list(runner(experiment, tmp_path, only=("frozen",)).run()) == []
    other = runner(
        experiment, tmp_path, only=("frozen",), extra={"cpu": True, "sparse_score": "mag"}
    )
    with pytest.raises(ExperimentError, match="ran with sparse_score='snip', now 'mag'"):
        list(other.run())


def test_the_table_covers_the_cells_of_other_processes_that_ran_alike(tmp_path):
    write_classes(tmp_path / "data" / "more")
    rows = (Row("id3", (1e-3,), "200"), Row("frozen", (1e-3,)))
    tasks = (tiny_task("letters"), tiny_task("more"))
    experiment = tiny_experiment(tmp_path, blocks=(Block(tasks, rows),))

    def part(*choice):
        return choose(experiment, Choice(**dict(choice)))[0]

    def covered(choice, **options):
        found = runner(experiment, tmp_path, **options).finished(whole(experiment, choice))
        return {(outcome["cell"]["task"], outcome["cell"]["row"]) for outcome in found}

    list(runner(part(("tasks", "letters")), tmp_path).run())
    list(runner(part(("tasks", "more"), ("methods", "frozen")), tmp_path).run())
    every = {("letters", "id3-200"), ("letters", "frozen"), ("more", "frozen")}
    assert covered(Choice()) == covered(Choice(tasks="more")) == every
    assert covered(Choice(methods="frozen")) == covered(Choice(), only=("nothing",)) == every
    assert covered(Choice(budgets="100")) == every
    list(runner(part(("methods", "r-mask"), ("tasks", "more")), tmp_path).run())
    assert covered(Choice(methods="r-mask", tasks="letters")) == every | {("more", "r-mask-200")}
    # Of another protocol, or of data that this process does not have: not in the same table.
    assert covered(Choice(steps=3)) == covered(Choice(lrs="1e-2")) == set()
    assert covered(Choice(), limit=8) == set()
    (tmp_path / "data" / "more").rename(tmp_path / "gone")
    assert covered(Choice()) == every - {("more", "frozen")}


def test_no_cell_begins_that_would_end_too_late(tmp_path):
    experiment = tiny_experiment(
        tmp_path, blocks=(Block((tiny_task("letters", seconds=90.0),), (Row("frozen", (1e-3,)),)),)
    )
    late = runner(experiment, tmp_path, max_minutes=1.0)
    assert list(late.run()) == []
    assert not late.is_finished()
    assert len(list(runner(experiment, tmp_path, max_minutes=2.0).run())) == 1


def test_only_filters_by_name(tmp_path):
    run = runner(tiny_experiment(tmp_path), tmp_path, only=("seed7", "frozen"))
    assert [cell.name for cell in run.wanted()] == NAMES[1:]


def test_estimates_come_from_finished_cells_of_the_task(tmp_path):
    run = runner(tiny_experiment(tmp_path), tmp_path)
    first, second, _ = run.wanted()
    assert run.estimates() == {"letters": None}
    for cell, seconds in ((first, 10.0), (second, 30.0)):
        labels = {"task": "letters", "row": cell.row.label, "stage": "run"}
        labels |= {"lr": cell.lr, "seed": cell.seed}
        run.store.write(cell, {"cell": labels, "seconds": seconds})
    assert run.estimates() == {"letters": 20.0}


def test_further_splits_are_columns_of_their_own(tmp_path):
    write_classes(tmp_path / "data" / "two", ("train", "validation_near", "validation_far"))
    labels = [{"sentence": "a b", "label": 1}, {"sentence": "b c", "label": 0}]
    write_lines(tmp_path / "data" / "two" / "validation_far.jsonl", labels)
    task = tiny_task("two", split="validation_near", further_splits={"two-far": "validation_far"})
    experiment = tiny_experiment(tmp_path, blocks=(Block((task,), (Row("full", (1e-2,)),)),))
    assert experiment.columns == ("two", "two-far")
    (outcome,) = runner(experiment, tmp_path).run()
    assert outcome["values"].keys() == {"two", "two-far"}
    assert outcome["values"]["two-far"] in (0.0, 0.5, 1.0)  # two examples
    assert outcome["evaluations"][-1]["accuracy"] == outcome["values"]["two"]


def test_kept_runs_hold_a_delta(tmp_path):
    list(runner(tiny_experiment(tmp_path), tmp_path, only=(NAMES[0],), keep=True).run())
    kept = {path.name for path in (tmp_path / "out" / "runs" / NAMES[0]).iterdir()}
    assert kept >= {"delta.safetensors", "metrics.json", "curves.png"}


def test_tuning_sees_train_alone_and_its_best_rate_is_used(tmp_path):
    experiment = tiny_experiment(tmp_path, protocol="tuned")
    names = [cell.name for cell in runner(experiment, tmp_path).wanted()]
    assert names == [
        "letters-id3-200-seed6-lr0.001-tune",
        "letters-id3-200-seed6-lr0.01-tune",
        "letters-id3-200-seed6-lrtuned",
        "letters-frozen-seed6-lr0.001",
        "letters-id3-200-seed7-lrtuned",
        "letters-frozen-seed7-lr0.001",
    ]
    outcomes = list(runner(experiment, tmp_path).run())
    tuning = [outcome for outcome in outcomes if outcome["cell"]["stage"] == "tune"]
    runs = [outcome for outcome in outcomes if outcome["cell"]["stage"] == "run"]
    assert [o["config"]["eval_split"] for o in tuning + runs] == [None] * 2 + ["validation"] * 4
    assert [o["config"]["eval_fraction"] for o in tuning + runs] == [0.1] * 2 + [None] * 4
    values = [outcome["values"]["letters"] for outcome in tuning]
    best = (1e-3, 1e-2)[values.index(max(values))]
    assert [run["cell"]["lr"] for run in runs] == [best, 1e-3, best, 1e-3]


def test_runs_without_their_tuning_are_refused(tmp_path):
    experiment = tiny_experiment(tmp_path, protocol="tuned")
    with pytest.raises(ExperimentError, match="--only leaves out the tuning of letters-id3"):
        list(runner(experiment, tmp_path, only=("seed7",)).run())


def test_a_missing_data_folder_is_named_with_what_is_there(tmp_path):
    task = tiny_task("numbers")
    experiment = tiny_experiment(tmp_path, blocks=(Block((task,), (Row("full", (1e-3,)),)),))
    with pytest.raises(ExperimentError, match=r"data/numbers is missing.*folders there: letters"):
        list(runner(experiment, tmp_path).run())


def test_an_error_in_a_cell_names_the_cell(tmp_path):
    row = Row("id3", (1e-3,), "99M")
    experiment = tiny_experiment(tmp_path, blocks=(Block((tiny_task("letters"),), (row,)),))
    with pytest.raises(ExperimentError, match=r"cell letters-id3-99M-seed6-lr0.001: budget must"):
        list(runner(experiment, tmp_path).run())


@pytest.mark.parametrize("line", ["{", "[]", "{}", '{"cell": {"task": "letters"}}'])
def test_a_damaged_line_is_named(tmp_path, line):
    store = CellStore(tmp_path / "cells.jsonl")
    store.write(*made_up("one"))
    with store.path.open("a") as file:
        file.write(line)
    with pytest.raises(ExperimentError, match=r"cells.jsonl, line 2: not a cell.*remove the line"):
        store.read(made_up("one")[0])

"""Tables: aggregation by hand, order of cells, what is shown and what is not."""

from __future__ import annotations

import json
import math

import pytest

pytest.importorskip("transformers", reason="experiments need the extra 'finetune'")

from experiment_cases import outcome, tiny_experiment, tiny_task

from sparse_optim.experiments.plan import MOST_WIDENED, best_lr, cells, tuning_cells
from sparse_optim.experiments.presets import Block, Row
from sparse_optim.experiments.table import markdown, rates, summarise, top_mean, write_table


def test_the_top_three_of_four_by_hand():
    mean, deviation, count = top_mean([0.80, 0.90, 0.10, 0.70], 3)
    assert (mean, count) == (pytest.approx(0.80), 3)
    assert deviation == pytest.approx(math.sqrt((0.01 + 0 + 0.01) / 2))
    assert top_mean([0.5], 3) == (0.5, None, 1)
    assert top_mean([0.5, 0.5], 3) == (0.5, 0.0, 2)


def test_a_diverged_run_drops_out_only_where_others_fill_the_top():
    assert top_mean([0.5, 0.7, 0.6, -math.inf], 3)[0] == pytest.approx(0.6)
    assert top_mean([0.5, 0.7, -math.inf], 3)[:2] == (-math.inf, None)


def two_tasks(folder):
    blocks = (Block((tiny_task("one"), tiny_task("two")), (Row("id3", (1e-3,), "100"),)),)
    paper = {"id3-100": {"one": 88.1, "two": 70.0, "average": 79.05}}
    return tiny_experiment(folder, blocks=blocks, paper=paper, paper_note="The paper: Table 1.")


def test_the_table_stands_beside_the_papers_own_figures(tmp_path):
    experiment = two_tasks(tmp_path)
    outcomes = [outcome("one", "id3-100", value) for value in (0.8, 0.9, 0.1, 0.7)]
    outcomes += [outcome("two", "id3-100", 0.6)]
    outcomes += [outcome("two", "id3-100", 0.99) | {"cell": {"stage": "tune"}}]
    (summary,) = write_table(experiment, outcomes, tmp_path)
    assert summary["average"] == pytest.approx((0.8 + 0.6) / 2)
    assert summary["entries"] == 100
    lines = (tmp_path / "table.md").read_text().splitlines()
    assert lines[0] == "**Tiny**"
    assert lines[2].startswith(
        "| method | budget | lr | one | two | average | entries | state MB |"
    )
    assert lines[4] == (
        "| id3 | 100 | 1e-3 | 80.00 ± 10.00 | 60.00 (n = 1) | 70.00 | 100 | 2.00 | 5 |"
    )
    assert lines[5] == "| *the paper* |  |  | 88.10 | 70.00 | 79.05 |  |  |  |"
    assert "best 3 of them" in lines[-1]
    assert "The paper: Table 1." in lines[-1]
    assert json.loads((tmp_path / "table.json").read_text())[0]["columns"]["one"]["runs"] == 4 - 1


def test_an_interrupted_table_shows_filled_columns_and_no_average_of_other_tasks(tmp_path):
    experiment = two_tasks(tmp_path)
    summaries = summarise(experiment, [outcome("two", "id3-100", 0.6)])
    text = markdown(experiment, summaries)
    assert "| method | budget | lr | two | entries |" in text
    assert "79.05" not in text  # the paper's average is of both tasks


def test_a_row_that_lacks_a_shown_column_has_no_average(tmp_path):
    rows = (Row("id3", (1e-3,), "100"), Row("full", (1e-3,)))
    experiment = tiny_experiment(
        tmp_path, blocks=(Block((tiny_task("one"), tiny_task("two")), rows),)
    )
    outcomes = [outcome(task, "id3-100", 0.5) for task in ("one", "two")]
    whole, part = summarise(experiment, [*outcomes, outcome("one", "full", 0.9)])
    assert (whole["average"], part["average"]) == (0.5, None)


def test_an_experiment_names_the_columns_of_its_average(tmp_path):
    names = ("one", "two", "more")
    block = Block(tuple(map(tiny_task, names)), (Row("id3", (1e-3,), "100"),))
    experiment = tiny_experiment(tmp_path, blocks=(block,), averaged=("one", "two"))
    values = dict(zip(names, (0.8, 0.6, 0.1), strict=True))
    outcomes = [outcome(name, "id3-100", value) for name, value in values.items()]
    (summary,) = summarise(experiment, outcomes)
    assert summary["average"] == pytest.approx(0.7)
    text = markdown(experiment, [summary])
    assert "| one | two | more | average |" in text
    assert "Average: of one, two." in text
    (other,) = summarise(experiment, outcomes[2:])  # none of them has run: of what has
    assert other["average"] == pytest.approx(0.1)
    assert "Average" not in markdown(experiment, [other])


def test_a_diverged_run_is_said_so_and_is_null_in_json(tmp_path):
    experiment = two_tasks(tmp_path)
    write_table(experiment, [outcome("one", "id3-100", None)], tmp_path)
    assert "| diverged (n = 1) |" in (tmp_path / "table.md").read_text()
    assert json.loads((tmp_path / "table.json").read_text())[0]["columns"]["one"]["mean"] is None


def with_rate(task, row, value, lr):
    found = outcome(task, row, value)
    return found | {"cell": found["cell"] | {"lr": lr}}


def test_the_table_shows_the_rates_of_the_best_runs(tmp_path):
    rows = (Row("id3", (1e-3, 1.5e-2), "100"), Row("full", (5e-5,)), Row("frozen", (5e-2,)))
    experiment = tiny_experiment(
        tmp_path, blocks=(Block((tiny_task("one"), tiny_task("two")), rows),)
    )
    outcomes = [
        with_rate("two", "id3-100", 0.7, 1e-3),
        with_rate("two", "id3-100", 0.7, 1.5e-2),  # the first of equals counts
        with_rate("one", "id3-100", 0.6, 1e-3),
        with_rate("one", "id3-100", 0.8, 1.5e-2),
        with_rate("one", "full", None, 1e-4),  # diverged
        with_rate("one", "full", 0.9, 5e-5),
        with_rate("two", "full", 0.9, 5e-5),
        with_rate("one", "frozen", 0.3, 5e-2),
    ]
    write_table(experiment, outcomes, tmp_path)
    table = json.loads((tmp_path / "table.json").read_text())
    assert [summary["lr"] for summary in table] == [
        {"one": 1.5e-2, "two": 1e-3},
        {"one": 5e-5, "two": 5e-5},
        {"one": 5e-2},
    ]
    text = (tmp_path / "table.md").read_text()
    assert "| id3 | 100 | 1.5e-2/1e-3 | " in text
    assert "| full |  | 5e-5 | " in text
    assert "| frozen |  | 5e-2 | " in text
    assert "if tasks differ, in their order" in text


def test_a_task_without_a_run_keeps_its_place_among_the_rates():
    assert rates({"a": 5e-3, "c": 1.5e-2}, ["a", "b", "c"]) == "5e-3/-/1.5e-2"
    assert rates({"a": 1.0}, ["a", "b"]) == "1e0"


def test_a_table_that_breaks_off_leaves_the_last_one(tmp_path, monkeypatch):
    experiment = two_tasks(tmp_path)
    write_table(experiment, [outcome("two", "id3-100", 0.6)], tmp_path)
    before = (tmp_path / "table.md").read_text()

    def breaks_off(path, text):
        raise OSError("disk full")

    monkeypatch.setattr("pathlib.Path.write_text", breaks_off)
    with pytest.raises(OSError, match="disk full"):
        write_table(experiment, [outcome("one", "id3-100", 0.6)], tmp_path)
    assert (tmp_path / "table.md").read_text() == before
    assert not list(tmp_path.glob("*.tmp"))


def test_every_row_is_run_once_before_any_is_run_again(tmp_path):
    rows = (Row("id3", (1.0, 2.0), "100"), Row("full", (3.0,)))
    blocks = (Block((tiny_task("one"), tiny_task("two")), rows),)
    experiment = tiny_experiment(tmp_path, blocks=blocks, seeds=(6, 7))
    order = [(c.task.name, c.row.name, c.lr, c.seed) for c in cells(experiment, lambda _: None)]
    assert order == [
        ("one", "id3", 1.0, 6),
        ("one", "full", 3.0, 6),
        ("two", "id3", 1.0, 6),
        ("two", "full", 3.0, 6),
        ("one", "id3", 2.0, 7),
        ("two", "id3", 2.0, 7),
    ]


def searched(row: Row, score, widen: float = 0, missing: float | None = None):
    """The rates that tuning tries if their scores are `score(lr)`, and the rate it chooses."""
    task, tried = tiny_task("one"), []

    def finished(cell):
        return None if cell.lr == missing else {"values": {"one": score(cell.lr)}}

    tried = [cell.lr for cell in tuning_cells(task, row, 0, finished, widen)]
    return tried, best_lr(task, row, 0, finished, widen)


def test_the_best_rate_is_the_lowest_of_equals_and_needs_all_trials():
    row = Row("id3", (1.0, 2.0, 3.0), "100")
    values = {1.0: 0.4, 2.0: 0.6, 3.0: 0.6}
    assert searched(row, values.get) == ([1.0, 2.0, 3.0], 2.0)
    assert searched(row, (values | {2.0: None}).get) == ([1.0, 2.0, 3.0], 3.0)  # diverged
    assert searched(row, values.get, missing=1.0)[1] is None
    assert searched(Row("id3", (7.0,), "100"), values.get) == ([], 7.0)


def test_the_grid_grows_until_the_best_rate_is_inside():
    row = Row("id3", (1e-3, 2e-3), "100")

    def around(best):
        return lambda lr: -abs(math.log(lr / best))

    assert searched(row, around(8e-3), 2.0) == ([1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2], 8e-3)
    assert searched(row, around(2.5e-4), 2.0) == ([1e-3, 2e-3, 5e-4, 2.5e-4, 1.25e-4], 2.5e-4)
    assert searched(row, around(1e-3), 2.0) == ([1e-3, 2e-3, 5e-4], 1e-3)
    assert searched(row, lambda lr: None if lr > 2e-3 else lr, 2.0)[1] == 2e-3
    assert searched(row, lambda lr: 0.0, 2.0) == ([1e-3, 2e-3, 5e-4], 5e-4)  # nothing is learnt
    chance = {5e-4: 0.3, 1e-3: 0.5, 2e-3: 0.5}
    assert searched(row, chance.get, 2.0) == ([1e-3, 2e-3, 5e-4], 1e-3)
    tried, best = searched(row, lambda lr: lr, 2.0)  # it ends
    assert len(tried) == 2 + MOST_WIDENED
    assert best == tried[-1]
    assert searched(row, around(8e-3), 2.0, missing=4e-3) == ([1e-3, 2e-3, 4e-3], None)


def test_the_text_below_a_table_of_single_runs_names_no_mean(tmp_path):
    blocks = (Block((tiny_task("one"),), (Row("id3", (1.0, 2.0), "100"),)),)
    experiment = tiny_experiment(tmp_path, blocks=blocks, seeds=(0, 1), kept=2)
    one = [outcome("one", "id3-100", 0.5)]
    text = markdown(experiment, summarise(experiment, one))
    assert "one run for each value." in text
    assert "deviation" not in text
    text = markdown(experiment, summarise(experiment, [*one, outcome("one", "id3-100", 0.6)]))
    assert "mean and sample deviation of the best" in text


def test_what_runs_lost_is_averaged_over_tasks_not_runs(tmp_path):
    experiment = two_tasks(tmp_path)
    lost = [{"score": "cosine", "before": 0.8, "after": after} for after in (0.6, 0.4, 0.1)]
    outcomes = [
        outcome("one", "id3-100", 0.8, delta_bytes=2_000_000, forgetting=lost[0]),
        outcome("one", "id3-100", 0.9, delta_bytes=4_000_000, forgetting=lost[1]),
        outcome("two", "id3-100", 0.6, delta_bytes=4_000_000, forgetting=lost[2]),
    ]
    (summary,) = summarise(experiment, outcomes)
    assert summary["delta_bytes"] == 4_000_000
    assert summary["forgetting"]["after"] == pytest.approx((0.5 + 0.1) / 2)
    text = markdown(experiment, [summary])
    assert "| delta MB | cosine |" in text
    assert "| 4.00 | 0.800 -> 0.300 |" in text
    assert "delta MB" not in markdown(
        experiment, summarise(experiment, [outcome("one", "id3-100", 1)])
    )

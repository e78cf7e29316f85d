"""Pictures of experiments: which points, in which lines, and what is left out."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("transformers", reason="experiments need the extra 'finetune'")
pytest.importorskip("matplotlib", reason="pictures need the extra 'finetune'")

from experiment_cases import outcome
from matplotlib.figure import Figure

from sparse_optim.analysis import line_plot
from sparse_optim.analysis.line_plot import LinePanel, Point
from sparse_optim.analysis.pareto_plot import AREAS, Tradeoff, frontier, marker_areas
from sparse_optim.analysis.plot_style import footnote, new_figure, save
from sparse_optim.experiments.budgets import BUDGETS
from sparse_optim.experiments.glue import GLUE
from sparse_optim.experiments.overrides import Choice, choose
from sparse_optim.experiments.pictures import (
    PICTURES,
    budget_panels,
    diverged,
    pareto_text,
    sweep_panels,
    tradeoffs,
    write_pictures,
)
from sparse_optim.experiments.sweeps import SWEEPS
from sparse_optim.experiments.table import summarise


def with_entries(task: str, row: str, value: float | None, entries: int):
    return outcome(task, row, value) | {"active_entries": entries + 10}


def test_budgets_have_a_panel_for_each_task_and_a_line_for_each_method():
    outcomes = [
        *(with_entries("rte", "id3-80K", value, 80_000) for value in (0.7, 0.72, 0.1, 0.74)),
        with_entries("rte", "id3-320K", 0.8, 320_000),
        with_entries("rte", "repeat-d3-80K", 0.75, 80_000),
        with_entries("rte", "repeat-d3-640K", None, 640_000),
        with_entries("cola", "id3-80K", 0.6, 80_000),
    ]
    summaries = summarise(BUDGETS, outcomes)
    cola, rte = budget_panels(BUDGETS, summaries)
    assert (cola.title, cola.y_label) == ("cola", "matthews (%)")
    assert cola.lines == {"id3": [Point(80_000, 60.0)]}
    assert (rte.title, rte.y_label, rte.logarithmic) == ("rte", "accuracy (%)", True)
    assert rte.lines.keys() == {"id3", "repeat-d3"}
    first, second = rte.lines["id3"]
    assert (first.x, first.mean, first.deviation) == (80_000, *map(pytest.approx, (72.0, 2.0)))
    assert second == Point(320_000, 80.0)
    assert rte.lines["repeat-d3"] == [Point(80_000, 75.0)]
    assert diverged(summaries) == "not shown, diverged: repeat-d3-640K on rte"


def test_a_budget_that_is_a_share_is_drawn_where_its_entries_are():
    chosen, _ = choose(BUDGETS, Choice(model="minilm", budgets="0.1%,1%"))
    outcomes = [with_entries("rte", "id3-0.1%", 0.7, 22_565)]
    (panel,) = budget_panels(chosen, summarise(chosen, outcomes))
    assert panel.lines == {"id3": [Point(22_565, 70.0)]}
    assert (panel.x_label, panel.ticks) == ("budget", {22_565: "0.1%"})


def test_a_single_run_has_no_bars(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(line_plot, "save", lambda figure, path: figures.append(figure))
    for deviation in (None, 0.5):
        panel = LinePanel("", "", "", {"id3": [Point(1.0, 0.5, deviation)]}, counts=True)
        line_plot.draw_lines([[panel]], "", tmp_path)
    assert [len(figure.axes[0].collections) for figure in figures] == [0, 1]


def test_the_tradeoff_of_one_column_has_its_metric_and_its_name():
    assert pareto_text(GLUE, ["cola"]) == ("matthews (%)", f"{GLUE.title}: cola")
    assert pareto_text(GLUE, ["cola", "rte"]) == ("average of 2 columns (%)", GLUE.title)


def test_sweeps_hold_one_setting_while_the_other_changes():
    chosen, _ = choose(SWEEPS, Choice(budgets="103K,1%"))
    values = {
        "id3-103K": 0.7,
        "id3@eps=0.5-103K": 0.9,
        "id3@exp=-1-103K": 0.8,
        "id3@exp=-1-1%": 0.6,
    }
    outcomes = [outcome("mrpc", row, value) for row, value in values.items()]
    (eps,), (exp,) = sweep_panels(chosen, summarise(chosen, outcomes))
    assert (eps.title, eps.x_label) == ("(a) mrpc, exp = 2", "eps")
    assert (exp.title, exp.x_label) == ("(b) mrpc, eps = 1", "exp")
    assert eps.lines == {"103K": [Point(1.0, 70.0), Point(0.5, 90.0)]}
    assert exp.lines == {"103K": [Point(2.0, 70.0), Point(-1.0, 80.0)], "1%": [Point(-1.0, 60.0)]}
    assert not exp.logarithmic  # a negative value has no logarithm
    every = LinePanel("", "", "", {"": [Point(0.01, 1.0), Point(2.0, 1.0)]})
    assert every.logarithmic
    part, _ = choose(SWEEPS, Choice(methods="pafi"))
    assert sweep_panels(part, summarise(part, [outcome("mrpc", "pafi-103K", 0.5)])) == []


def test_the_rows_of_figure_1_are_those_with_a_value_in_every_column():
    outcomes = [
        with_entries("rte", "id3-103K", 0.8, 103_000),
        with_entries("cola", "id3-103K", 0.6, 103_000),
        with_entries("rte", "full", 0.9, 184_000_000),
        with_entries("cola", "full", None, 184_000_000),
        with_entries("rte", "bitfit", 0.9, 102_000),
    ]
    rows, note = tradeoffs(summarise(GLUE, outcomes))
    assert rows == [Tradeoff("id3", 103_000, pytest.approx(70.0))]
    assert note == "not shown, a value is missing or diverged: full, bitfit"


def test_the_frontier_and_the_markers_follow_the_entries():
    rows = [
        Tradeoff("b", 100, 0.8),
        Tradeoff("a", 100, 0.9),
        Tradeoff("c", 1_000, 0.9),
        Tradeoff("d", 10_000, 1.0),
    ]
    assert [row.method for row in frontier(rows)] == ["a", "d"]
    areas = marker_areas(rows)
    assert (areas[0], areas[3]) == AREAS
    assert areas[2] == pytest.approx(sum(AREAS) / 2)
    assert marker_areas(rows[:2]) == [AREAS[0]] * 2


def test_pictures_are_written_if_there_is_something_to_compare(tmp_path):
    """Runs the drawing code: markers, a line for the head alone, notes, log axes."""
    both = replace(GLUE, pictures=("pareto", "budgets"))
    outcomes = [with_entries("rte", "id3-103K", 0.8, 103_000)]
    summaries = summarise(both, outcomes)
    assert (
        write_pictures(replace(both, pictures=("pareto", "sweeps")), summaries[:0], tmp_path) == []
    )
    assert write_pictures(both, summaries, tmp_path) == [tmp_path / "budgets.png"]
    outcomes += [
        with_entries("rte", "full", 0.9, 10**8),
        with_entries("rte", "id3-320K", None, 320),
    ]
    frozen = {"method": "frozen", "entries": 0, "average": 0.5, "columns": {}, "row": "frozen"}
    summaries = [*summarise(both, outcomes), frozen | {"budget": ""}]
    written = write_pictures(both, summaries, tmp_path)
    assert [path.name for path in written] == ["pareto.png", "budgets.png"]
    chosen, _ = choose(SWEEPS, Choice())
    found = summarise(chosen, [outcome("mrpc", "id3-103K", 0.7)])
    written += write_pictures(chosen, found, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in written}
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in written)
    assert {path.stem for path in written} == set(PICTURES)


def test_a_picture_that_cannot_be_written_leaves_the_one_before_it(tmp_path, monkeypatch):
    """Processes may share the folder, and one may be killed."""

    def killed(self, file, **options):
        Path(file).write_bytes(b"half")
        raise KeyboardInterrupt

    path = tmp_path / "one.png"
    save(new_figure(1, 1, "title"), path)
    whole = path.read_bytes()
    assert whole.startswith(b"\x89PNG")
    monkeypatch.setattr(Figure, "savefig", killed)
    with pytest.raises(KeyboardInterrupt):
        save(new_figure(1, 1, "other"), path)
    assert path.read_bytes() == whole
    assert [each.name for each in tmp_path.iterdir()] == ["one.png"]


def test_notes_below_a_picture_fit_it():
    figure = new_figure(7.0, 4.0, "title")
    names = [f"method-{number}@linear-112827" for number in range(12)]
    footnote(figure, "first", "", f"not shown: {', '.join(names)}")
    text = figure._supxlabel
    assert text.get_text().split() == f"first not shown: {', '.join(names)}".split()
    figure.canvas.draw()
    box = text.get_window_extent()
    assert 0 <= box.x0 < box.x1 <= figure.bbox.x1
    footnote(untouched := new_figure(7.0, 4.0, "title"), "")
    assert untouched._supxlabel is None

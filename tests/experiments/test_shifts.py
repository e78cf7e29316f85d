"""Shifted test sets: what changes in them, what stays, and where their values go."""

from __future__ import annotations

import json
import random
from dataclasses import replace

import pytest

pytest.importorskip("transformers", reason="experiments need the extra 'finetune'")
pytest.importorskip("datasets", reason="experiments need the extra 'finetune'")

from datasets import Dataset
from experiment_cases import outcome, runner, tiny_experiment, tiny_task, write_classes, write_lines
from rich.console import Console

from sparse_optim.experiments.launch import make_runner
from sparse_optim.experiments.presets import Block, ExperimentError, Row, Shift
from sparse_optim.experiments.quality import QUALITY
from sparse_optim.experiments.runner import RunOptions
from sparse_optim.experiments.shifts import SHORTEST, misspelt, shifted_data, with_typos
from sparse_optim.experiments.table import markdown, summarise
from sparse_optim.finetune.builtin_data import DATASETS
from sparse_optim.finetune.config import FinetuneConfig
from sparse_optim.finetune.data import load_data
from sparse_optim.finetune.errors import FinetuneError
from sparse_optim.finetune.request import data_request


def test_typos_swap_two_letters_inside_long_words_alone():
    words = ["a", "the", "U.S.", "1996", "word", "Blackburn"] * 200
    changed = with_typos(words, random.Random(0))
    assert len(changed) == len(words)
    differing = [(old, new) for old, new in zip(words, changed, strict=True) if old != new]
    for old, new in differing:
        assert len(old) >= SHORTEST
        assert (sorted(old), old[0], old[-1]) == (sorted(new), new[0], new[-1])
        assert sum(a != b for a, b in zip(old, new, strict=True)) == 2
    assert {old for old, _ in differing} == {"word", "Blackburn"}
    assert 0.2 < len(differing) / 400 < 0.4
    text = with_typos(" ".join(words), random.Random(0))
    assert text == " ".join(changed)


def test_misspelt_examples_are_the_same_each_time_and_keep_their_labels():
    rows = {"text": ["several words here"] * 9, "text_pair": ["other words"] * 9, "label": [1] * 9}
    first, again = (misspelt(Dataset.from_dict(rows)).to_dict() for _ in range(2))
    assert first == again
    assert first["label"] == rows["label"]
    assert first["text"] != rows["text"]
    assert first["text_pair"] != rows["text_pair"]
    words = {"text": [["several", "words"]] * 9, "label": [[0, 1]] * 9}
    tagged = misspelt(Dataset.from_dict(words)).to_dict()
    assert tagged["label"] == words["label"]
    assert tagged["text"] != words["text"]
    assert {len(row) for row in tagged["text"]} == {2}


def test_the_shifted_sets_of_the_quality_table_have_the_task_of_the_training():
    others = {
        column: (task.task, shift.dataset)
        for task in QUALITY.tasks
        for column, shift in task.shifts.items()
        if shift.dataset is not None
    }
    assert others.keys() == {"movies -> amazon", "tweets -> movies", "tweets -> amazon"}
    assert all(DATASETS[dataset].task == task for task, dataset in others.values())
    typos = [task.name for task in QUALITY.tasks for s in task.shifts.values() if s.typos]
    assert typos == ["conll2003", "trec50"]


def shifted_experiment(folder, **shifts: Shift):
    task = tiny_task("letters", shifts={f"letters -> {name}": s for name, s in shifts.items()})
    block = Block((task,), (Row("frozen", (1e-3,)),))
    return tiny_experiment(folder, blocks=(block,))


def test_a_run_is_tested_on_the_shifted_sets_too(tmp_path):
    (tmp_path / "other").mkdir()
    rows = [{"sentence": "a b", "label": 1}, {"sentence": "b c", "label": 0}]
    for split in ("train", "test"):
        write_lines(tmp_path / "other" / f"{split}.jsonl", rows)
    other = Shift(str(tmp_path / "other"))
    experiment = shifted_experiment(tmp_path, other=other, typos=Shift(typos=True))
    (done,) = runner(experiment, tmp_path, shifted=True).run()
    values = done["values"]
    assert list(values) == ["letters", "letters -> other", "letters -> typos"]
    assert values["letters -> other"] in (0.0, 0.5, 1.0)  # of two examples
    assert values["letters -> typos"] == values["letters"]  # words of one letter have no typos
    assert done["config"]["shifted"] is True
    assert len(done["evaluations"]) == 1  # those on shifted data are not evaluations of the run
    assert list(runner(experiment, tmp_path).run()) == []  # the values of the plain run are there

    lines = (tmp_path / "out" / "cells.jsonl").read_text()
    stored = json.loads(lines)
    del stored["config"]["shifted"]
    (tmp_path / "out" / "cells.jsonl").write_text(json.dumps(stored) + "\n")
    with pytest.raises(ExperimentError, match="ran with shifted=None, now True"):
        list(runner(experiment, tmp_path, shifted=True).run())


def test_labels_that_the_task_does_not_have_are_an_error(tmp_path):
    write_classes(tmp_path / "mine")
    (tmp_path / "other").mkdir()
    for split in ("train", "test"):
        rows = [{"sentence": "a b", "label": label} for label in ("good", "bad")]
        write_lines(tmp_path / "other" / f"{split}.jsonl", rows)
    config = FinetuneConfig("no-model", str(tmp_path / "mine"), tmp_path / "out")
    data = load_data(data_request(config))
    with pytest.raises(FinetuneError, match=r"good|bad"):
        shifted_data(config, data, Shift(str(tmp_path / "other")))


def test_shifted_columns_stand_beside_the_task_and_not_in_the_average(tmp_path):
    experiment = shifted_experiment(tmp_path, other=Shift("amazon"))
    more = replace(
        experiment, blocks=(*experiment.blocks, Block((tiny_task("two"),), experiment.rows))
    )
    outcomes = [outcome("letters", "frozen", 0.8), outcome("two", "frozen", 0.6)]
    plain = markdown(more, summarise(more, outcomes))
    assert "| letters | two | average |" in plain
    assert "trained on A" not in plain
    outcomes[0]["values"]["letters -> other"] = 0.1
    outcomes.append(outcome("letters", "frozen", 0.9))  # of a run without --shifted
    (summary,) = summarise(more, outcomes)
    assert summary["average"] == pytest.approx((0.85 + 0.6) / 2)
    assert summary["columns"]["letters -> other"]["runs"] == 1
    text = markdown(more, [summary])
    assert "| letters | letters -> other | two | average |" in text
    assert "| 10.00 (n = 1) | 60.00 (n = 1) | 72.50 |" in text
    assert "A -> B: trained on A, tested on B" in text


def test_an_experiment_without_shifted_sets_says_so(tmp_path):
    experiment = tiny_experiment(tmp_path)
    with pytest.raises(ExperimentError, match=r"--shifted: none of the tasks.*\(letters\)"):
        make_runner(experiment, RunOptions(tmp_path, shifted=True), Console())


@pytest.mark.parametrize("option", ["limit", "eval_limit"])
def test_a_number_of_examples_is_at_least_one(tmp_path, option):
    with pytest.raises(ExperimentError, match=rf"--{option.replace('_', '-')} must be .* got 0"):
        RunOptions(tmp_path, **{option: 0})

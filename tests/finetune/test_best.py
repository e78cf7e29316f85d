"""The best model: which evaluation is kept, when training stops, and that the delta fits it."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers", reason="the job needs the extra 'finetune'")

from finetune_jobs import config, make_folders
from transformers import TrainerControl, TrainerState, TrainingArguments

from sparse_optim.delta import Delta, load_delta
from sparse_optim.finetune import FinetuneError
from sparse_optim.finetune.best import LOWER_IS_BETTER, BestModel
from sparse_optim.finetune.job import run, same_bits
from sparse_optim.finetune.tasks import TASKS

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, str]:
    return make_folders(tmp_path_factory.mktemp("tiny"))


def judged(values: list[float], metric: str, patience: int | None = None) -> BestModel:
    """What is kept of evaluations at steps 1, 2, ... of 100, until training is told to stop."""
    best = BestModel(metric, patience, lambda: (0, Delta(sparse={}, dense={})))
    control, state = TrainerControl(), TrainerState(max_steps=100)
    for step, value in enumerate(values, 1):
        state.global_step = step
        best.on_evaluate(None, state, control, {f"eval_{metric}": value})
        if control.should_training_stop:
            break
    return best


@pytest.mark.parametrize(
    ("metric", "values", "step"),
    [
        ("accuracy", [0.1, 0.5, 0.3], 2),
        ("accuracy", [0.5, 0.5], 1),  # the first of equal ones
        ("perplexity", [9.0, 4.0, 7.0], 2),
        ("rmse", [1.0, 2.0], 1),
        ("token_loss", [3.0, 2.0], 2),
        ("accuracy", [math.nan, 0.2, math.nan], 2),
    ],
)
def test_which_evaluation_is_the_best(metric, values, step):
    kept = judged(values, metric).kept
    assert (kept.step, kept.value) == (step, values[step - 1])


def test_every_metric_is_known_to_be_better_high_or_low():
    """A new metric belongs here, or in LOWER_IS_BETTER."""
    known = {metric for task in TASKS.values() for metric in task.metrics}
    higher = {"accuracy", "subset_accuracy", "matthews", "precision", "recall", "pearson"}
    higher |= {"f1", "f1_positive", "f1_micro", "f1_macro", "spearman", "pearson_spearman"}
    higher |= {"rouge1", "rouge2", "rougeL"}
    assert known - LOWER_IS_BETTER == higher


def test_a_metric_that_is_never_a_number_keeps_nothing():
    best = judged([math.nan, math.nan], "accuracy")
    assert best.kept is None
    assert "the last model is kept" in best.describe()


def test_patience_counts_evaluations_in_a_row():
    best = judged([0.1, 0.0, 0.3, 0.2, 0.3, 0.9], "accuracy", patience=2)
    assert (best.kept.step, best.waited, best.stopped) == (3, 2, True)
    assert best.describe().startswith("Stopped early: 2 evaluations in a row were not better.")
    assert judged([0.1, 0.0, 0.3, 0.2, 0.4], "accuracy", patience=2).stopped is False


# Learning rates that make the loss rise, while entries are unmasked until step 4.
RISING = {
    **{"steps": 8, "eval_every": 2, "lr": 1.0, "schedule": "constant", "best": True},
    **{"budget": 2000, "every": 1, "unmask_share": 0.5},
}


def run_and_record(monkeypatch, job):
    """The result of a job, and the model's tensors at each of its evaluations, by step."""
    seen: dict[int, dict[str, torch.Tensor]] = {}
    plain = BestModel.on_evaluate

    def record(self, args, state, control, metrics=None, model=None, **more):
        tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        seen[state.global_step] = tensors
        plain(self, args, state, control, metrics)

    monkeypatch.setattr(BestModel, "on_evaluate", record)
    return run(job), seen


@pytest.mark.parametrize(
    "settings",
    [
        {"method": "id3"},
        {"method": "id3", "fuse_backward": True},
        {"method": "repeat-d3"},
        {"method": "full", "budget": None},
        {"method": "id3", "adapter": "lora", "lr": 50.0},
    ],
    ids=lambda settings: "-".join(map(str, settings.values())),
)
def test_the_delta_is_that_of_the_best_evaluation(folders, tmp_path, monkeypatch, settings):
    job = config(folders, tmp_path / "out", "decoder", "generation", **{**RISING, **settings})
    result, seen = run_and_record(monkeypatch, job)
    metrics = result.metrics
    step = metrics["metric"]["step"]
    assert sorted(seen) == [2, 4, 6, 8]
    assert step < 8
    values = {row["step"]: row["perplexity"] for row in metrics["evaluations"]}
    assert metrics["metric"]["value"] == metrics["final"]["perplexity"] == min(values.values())
    assert values[step] == min(values.values())
    for name, tensor in result.model.state_dict().items():
        assert same_bits(tensor, seen[step][name]), name
    assert any(not torch.equal(seen[8][name], seen[step][name]) for name in seen[8])
    assert metrics["verified"] is True  # base + the file is the model
    delta = load_delta(tmp_path / "out" / "delta.safetensors")
    dense = sum(tensor.numel() for tensor in delta.dense.values())
    if settings["method"] == "id3":
        assert metrics["active_entries"] == delta.num_entries + dense
        later = metrics["log"][-1]["active"]
        assert metrics["active_entries"] < later or step >= 4
        assert delta.method["step"] == step


def test_keeping_the_best_changes_no_step_and_warns_of_nothing(folders, tmp_path, caplog):
    job = {"steps": 6, "eval_every": 2, "lr": 1e-3}
    kept, plain = (
        run(config(folders, tmp_path / str(best), "decoder", "generation", best=best, **job))
        for best in (True, False)
    )
    assert kept.metrics["log"] == plain.metrics["log"]
    assert kept.metrics["metric"]["step"] == 6  # it learned to the end
    files = [(result.output / "delta.safetensors").read_bytes() for result in (kept, plain)]
    assert files[0] == files[1]
    assert not [line for line in caplog.messages if "total_steps" in line]


def test_patience_ends_the_training(folders, tmp_path):
    job = {**RISING, "best": None, "patience": 1, "steps": 40}
    metrics = run(config(folders, tmp_path / "out", "decoder", "generation", **job)).metrics
    assert metrics["stopped_early"] is True
    assert metrics["steps"] == metrics["metric"]["step"] + 2 < 40
    assert metrics["used"]["planned_steps"] == 40
    assert metrics["verified"] is True


def test_without_best_patience_keeps_the_last(folders, tmp_path):
    job = {**RISING, "best": False, "steps": 4}
    metrics = run(config(folders, tmp_path / "out", "decoder", "generation", **job)).metrics
    assert metrics["metric"]["step"] == metrics["steps"] == 4
    with pytest.raises(FinetuneError, match=r"--patience .* --no-best"):
        config(folders, tmp_path, "decoder", "generation", best=False, patience=2)


def test_a_resumed_run_knows_the_best_before_it(folders, tmp_path):
    job = {**RISING, "save_every": 2}
    whole = run(config(folders, tmp_path / "whole", "decoder", "generation", **job))
    checkpoint = tmp_path / "whole" / "checkpoints" / "checkpoint-6"
    assert whole.metrics["metric"]["step"] < 6
    assert "best.safetensors" in json.loads((checkpoint / "manifest.json").read_text())["files"]
    again = config(folders, tmp_path / "rest", "decoder", "generation", resume=checkpoint, **job)
    rest = run(again)
    deltas = [(result.output / "delta.safetensors").read_bytes() for result in (whole, rest)]
    assert deltas[0] == deltas[1]
    assert rest.metrics["metric"] == whole.metrics["metric"]


@pytest.mark.parametrize("changed", [{"metric": "token_loss"}, {"eval_every": 4}, {"best": False}])
def test_a_resumed_run_judges_as_before(folders, tmp_path: Path, changed):
    job = {**RISING, "steps": 4, "save_every": 2}
    run(config(folders, tmp_path / "one", "decoder", "generation", **job))
    checkpoint = tmp_path / "one" / "checkpoints" / "checkpoint-2"
    settings = {**job, "resume": checkpoint, **changed}
    with pytest.raises(FinetuneError, match="it is of another job"):
        run(config(folders, tmp_path / "two", "decoder", "generation", **settings))


def test_the_best_of_another_metric_is_refused(tmp_path):
    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    state = TrainerState(global_step=3)
    (tmp_path / "checkpoint-3").mkdir()
    judged([0.5], "accuracy").on_save(arguments, state, TrainerControl())
    with pytest.raises(FinetuneError, match="was chosen by accuracy, now --metric is f1"):
        BestModel("f1", None, lambda: (0, Delta({}, {}))).restore(tmp_path / "checkpoint-3")


def test_a_run_that_stopped_early_is_over_when_it_is_resumed(folders, tmp_path):
    """The checkpoint of the step that stopped it trained on."""
    job = {**RISING, "best": None, "patience": 1, "steps": 40, "save_every": 2}
    whole = run(config(folders, tmp_path / "whole", "decoder", "generation", **job))
    assert whole.metrics["stopped_early"] is True
    last = tmp_path / "whole" / "checkpoints" / f"checkpoint-{whole.metrics['steps']}"
    again = config(folders, tmp_path / "rest", "decoder", "generation", resume=last, **job)
    rest = run(again)
    for name in ("steps", "stopped_early", "metric", "evaluations"):
        assert rest.metrics[name] == whole.metrics[name], name
    deltas = [(result.output / "delta.safetensors").read_bytes() for result in (whole, rest)]
    assert deltas[0] == deltas[1]

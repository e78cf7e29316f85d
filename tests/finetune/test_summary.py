"""What the command says before it trains, and the bar while it does: right, and 80 columns wide."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest

pytest.importorskip("transformers", reason="the job needs the extra 'finetune'")

from finetune_jobs import config, make_folders
from rich.console import Console
from transformers import TrainerControl, TrainerState, TrainingArguments

from sparse_optim.finetune import FinetuneConfig
from sparse_optim.finetune.data import load_data
from sparse_optim.finetune.job import run
from sparse_optim.finetune.progress import ConsoleProgress
from sparse_optim.finetune.readings import Usage
from sparse_optim.finetune.request import data_request
from sparse_optim.finetune.summary import (
    describe_data,
    describe_request,
    describe_run,
    show,
    stored_entries,
)

LONG = "/data/" + "a-long-folder/" * 9 + "train.jsonl"


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, str]:
    return make_folders(tmp_path_factory.mktemp("tiny"))


def request(**settings: object) -> dict[str, str]:
    given = {"model": "minilm", "dataset": "trec6", "output": Path("out"), **settings}
    return dict(describe_request(FinetuneConfig(**given)))


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({}, "id3, 1% of the Linear weights, lr 0.001, linear"),
        ({"budget": 320_000, "lr": 1e-4}, "id3, 320,000 entries, lr 0.0001, linear"),
        ({"budget": 0.0025}, "id3, 0.25% of the Linear weights, lr 0.001, linear"),
        ({"method": "full", "schedule": "cosine"}, "full, lr 0.0001, cosine"),
        ({"adapter": "lora"}, "id3 on lora of rank 8, 1% of the entries, lr 0.002, linear"),
        ({"adapter": "ia3", "method": "full"}, "full on ia3, lr 0.002, linear"),
    ],
)
def test_the_method_is_shown_with_its_defaults(settings, text):
    assert request(**settings)["method"] == text


def test_the_model_is_shown_with_its_size(folders, tmp_path):
    shown = request()
    assert shown["model"] == "minilm: MiniLM-L6 encoder (BERT), 22.7M parameters"
    assert shown["data"] == "trec6: questions, 6 classes"
    shown = request(model="some/model")["model"]
    assert shown == "some/model on the Hugging Face hub (no folder of this name here)"
    entries = stored_entries(Path(folders["encoder"]))
    model_config = json.loads((Path(folders["encoder"]) / "config.json").read_text())
    assert entries > model_config["vocab_size"] * model_config["hidden_size"]
    encoder = folders["encoder"]
    assert request(model=encoder)["model"] == f"{encoder}: {entries / 1000:.1f}K parameters"
    (tmp_path / "model.safetensors").write_bytes(b"\xff" * 20)
    assert stored_entries(tmp_path) is None
    assert request(model=str(tmp_path))["model"] == str(tmp_path)


def test_the_stored_entries_are_those_of_the_model(folders):
    from transformers import AutoModel

    model = AutoModel.from_pretrained(folders["encoder"])
    expected = sum(param.numel() for param in model.parameters())
    assert stored_entries(Path(folders["encoder"])) == expected


def test_columns_labels_and_splits_are_shown(folders, tmp_path):
    data = load_data(data_request(config(folders, tmp_path, "encoder", "sequence")))
    assert dict(describe_data(data)) == {
        "splits": "loaded 48 examples to train on, 16 to evaluate (held-out 25% of train)",
        "columns": "text: text, label: label",
        "task": "sequence-classification, 2 labels: many, none",
    }
    shown = dict(
        describe_data(load_data(data_request(config(folders, tmp_path, "decoder", "prompt"))))
    )
    assert shown["columns"] == "text: prompt, response: response"
    assert shown["task"] == "causal-lm"


def test_entries_and_kernels_are_shown():
    usage = Usage(
        budget=225_654, ranked=22_565_376, dense=2_310, backend="cpp", gradients="sampled"
    )
    assert dict(describe_run(usage, "32 examples", 1500, "cpu")) == {
        "trains": "225,654 of 22,565,376 entries (1.00%), and 2,310 entries densely",
        "run": "1,500 steps of 32 examples on cpu, backend cpp, sampled gradients",
    }
    dense = Usage(budget=0, ranked=0, dense=500, backend="torch", gradients="ordinary")
    assert dict(describe_run(dense, "8 examples", 3, "cuda:0"))["trains"] == "500 entries densely"


def test_long_paths_and_escapes_keep_the_lines_whole():
    written = io.StringIO()
    show(Console(file=written, width=80), [("data", LONG), ("task", "x\x1b[31m [red]label[/]")])
    lines = written.getvalue().splitlines()
    assert max(map(len, lines)) <= 80
    assert "".join(line[10:].strip() for line in lines[:-1]) == LONG
    assert lines[-1].split(maxsplit=1)[1].strip() == "x\\x1b[31m [red]label[/]"


def test_the_bar_fits_80_columns(tmp_path):
    console = Console(file=io.StringIO(), width=80, force_terminal=True, color_system=None)
    progress = ConsoleProgress(console, "accuracy", "stochastic-tuning")
    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    state = TrainerState(global_step=0, max_steps=123_456)
    progress.on_train_begin(arguments, state, TrainerControl())
    state.global_step = 100_000
    logs = {"loss": 12.3456, "active": 1_234_567.0}
    progress.on_log(arguments, state, TrainerControl(), logs)
    progress.on_step_end(arguments, state, TrainerControl())
    progress.stop()
    written = io.StringIO()
    Console(file=written, width=80).print(progress.renderable())
    (line,) = written.getvalue().splitlines()
    assert len(line) <= 80
    for part in ("stochastic-tuning", "100000/123456", "loss 12.3456", "steps/s"):
        assert part in line
    assert "…" not in line


def test_the_rate_leaves_evaluations_out_and_their_time_is_shown(tmp_path, monkeypatch):
    now = [100.0]
    monkeypatch.setattr("sparse_optim.finetune.progress.time.perf_counter", lambda: now[0])
    written = io.StringIO()
    progress = ConsoleProgress(Console(file=written, width=80), "accuracy", "id3")
    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    state = TrainerState(global_step=0, max_steps=20)
    progress.on_train_begin(arguments, state, TrainerControl())
    state.global_step, now[0] = 10, 100.0 + 5 + 40
    logs = {"eval_accuracy": 0.5, "eval_loss": 1.0, "eval_runtime": 40.0}
    progress.on_log(arguments, state, TrainerControl(), logs)
    progress.stop()
    assert progress.rate(state) == pytest.approx(2.0)
    assert "accuracy 0.5000  eval loss 1.0000 in 40.0 s" in written.getvalue()


@pytest.mark.usefixtures("one_thread")
def test_a_job_says_what_it_understood_before_its_first_step(folders, tmp_path):
    written = io.StringIO()
    run(
        config(folders, tmp_path / "out", "encoder", "sequence", steps=2),
        Console(file=written, width=80),
    )
    lines = written.getvalue().splitlines()
    assert [line.split()[0] for line in lines[:2]] == ["trains", "run"]
    assert any(line.startswith("step 1/2") for line in lines[2:])
    assert max(len(line.rstrip()) for line in lines) <= 80

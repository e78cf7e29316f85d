"""What runs lose: scores by hand; a frozen model loses nothing; STS-B itself is not measured."""

from __future__ import annotations

import json
import random
from dataclasses import replace

import pytest
import torch

pytest.importorskip("transformers", reason="experiments need the extra 'finetune'")
pytest.importorskip("datasets", reason="experiments need the extra 'finetune'")

from experiment_cases import LETTERS, runner, tiny_experiment, tiny_task, write_lines
from rich.console import Console
from scipy.stats import spearmanr
from tiny_models import save_decoder, save_encoder
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

from sparse_optim.experiments.forgetting import (
    TOKENS,
    cosine_score,
    lm_loss,
    score_name,
    sentence_pairs,
)
from sparse_optim.experiments.launch import make_runner
from sparse_optim.experiments.presets import Block, ExperimentError, Row
from sparse_optim.experiments.runner import RunOptions

DRAW = random.Random(0)
PAIRS = [
    {
        "sentence1": " ".join(DRAW.choices(LETTERS, k=DRAW.randint(1, 6))),
        "sentence2": " ".join(DRAW.choices(LETTERS, k=DRAW.randint(1, 6))),
        "label": DRAW.randint(0, 10) / 2,
    }
    for _ in range(30)
]


def write_pairs(folder):
    folder.mkdir(parents=True)
    for split in ("train", "validation"):
        write_lines(folder / f"{split}.jsonl", PAIRS)


def test_cosines_of_mean_hidden_states_by_hand(tmp_path):
    write_pairs(tmp_path / "stsb")
    save_encoder(tmp_path / "model")
    model = AutoModel.from_pretrained(tmp_path / "model").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")

    def vector(text):
        with torch.no_grad():
            return model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].mean(0)

    cosines = [
        float(torch.cosine_similarity(vector(p["sentence1"]), vector(p["sentence2"]), dim=0))
        for p in PAIRS
    ]
    wanted = spearmanr(cosines, [pair["label"] for pair in PAIRS]).statistic
    score = cosine_score(model, tokenizer, sentence_pairs(str(tmp_path / "stsb")))
    assert score == pytest.approx(wanted, abs=1e-12)


def test_the_loss_of_a_language_model_by_hand(tmp_path):
    save_decoder(tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    tokenizer.pad_token = tokenizer.eos_token  # as `load_tokenizer` sets it
    texts = ["a b c d", "b", "e f g " * TOKENS, "h h", "c a"]
    total = count = 0
    for text in texts:
        ids = tokenizer(text, return_tensors="pt", truncation=True, max_length=TOKENS)["input_ids"]
        if ids.shape[1] > 1:
            with torch.no_grad():
                total += float(model(ids, labels=ids).loss) * (ids.shape[1] - 1)
            count += ids.shape[1] - 1
    assert lm_loss(model, tokenizer, texts) == pytest.approx(total / count, rel=1e-5)


def test_runs_record_what_they_lost_and_the_size_of_their_delta(tmp_path):
    rows = (Row("frozen", (1e-2,)), Row("full", (1e-1,)), Row("full", (1e-1,), "", "lora", 2))
    experiment = tiny_experiment(tmp_path, blocks=(Block((tiny_task("letters"),), rows),))
    write_pairs(tmp_path / "data" / "stsb")
    frozen, full, lora = runner(experiment, tmp_path, forgetting=True, keep=True).run()
    assert frozen["forgetting"]["before"] == frozen["forgetting"]["after"]
    assert full["forgetting"]["before"] == frozen["forgetting"]["before"]
    assert full["forgetting"]["after"] != full["forgetting"]["before"]
    assert lora["forgetting"]["after"] != lora["forgetting"]["before"]
    folder = tmp_path / "out" / "runs" / "letters-full-seed6-lr0.1"
    written = json.loads((folder / "metrics.json").read_text())["delta_bytes"]
    assert abs(full["delta_bytes"] - written) < 8192  # its header names the base and the task
    assert frozen["delta_bytes"] < lora["delta_bytes"] < full["delta_bytes"]
    assert list(runner(experiment, tmp_path).run()) == []  # cells with more values will do
    others = tiny_experiment(tmp_path, blocks=(Block((tiny_task("letters"),), rows[:1]),))
    path = tmp_path / "out" / "cells.jsonl"
    cells = [json.loads(line) for line in path.read_text().splitlines()]
    for cell in cells:
        del cell["config"]["forgetting"]
    write_lines(path, cells)
    with pytest.raises(ExperimentError, match="ran with forgetting=None, now True"):
        list(runner(others, tmp_path, forgetting=True).run())


def test_a_task_that_trains_the_skill_has_no_score():
    assert score_name(replace(tiny_task("stsb"), task="regression")) is None
    assert score_name(replace(tiny_task("chat"), task="causal-lm")) == "LM loss on XSum"
    assert score_name(replace(tiny_task("news"), task="summarization")) is None


def test_what_cannot_be_measured_is_said_before_anything_runs(tmp_path):
    experiment = tiny_experiment(tmp_path)
    options = RunOptions(tmp_path, data_folder=tmp_path / "data", forgetting=True)
    with pytest.raises(ExperimentError, match=r"--forgetting: .*data/stsb is missing"):
        make_runner(experiment, options, Console())
    task = replace(tiny_task("news"), task="summarization")
    other = tiny_experiment(tmp_path, blocks=(Block((task,), (Row("full", (1e-3,)),)),))
    with pytest.raises(ExperimentError, match="nothing is measured for news: drop it"):
        make_runner(other, options, Console())

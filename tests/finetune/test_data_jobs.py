"""Whole jobs on forms of data that need something of the job: counts, packing, several labels."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from data_rows import write_jsonl
from rich.console import Console

pytest.importorskip("transformers", reason="the main job needs the extra 'finetune'")
pytest.importorskip("datasets", reason="the main job needs the extra 'finetune'")
pytest.importorskip("accelerate", reason="the main job needs the extra 'finetune'")

from finetune_jobs import LETTER_IDS, config, make_folders
from transformers import AutoTokenizer

from sparse_optim.finetune import FinetuneError
from sparse_optim.finetune.card import PIPELINES
from sparse_optim.finetune.inputs import load_base, load_inputs
from sparse_optim.finetune.job import run
from sparse_optim.finetune.reuse import load_model
from sparse_optim.finetune.spec import spec_of
from sparse_optim.finetune.tasks import TASKS
from sparse_optim.finetune.trainer_setup import make_trainer

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("tiny")
    found = make_folders(root)
    lengths = [4, 4, 20, 4] * 6
    found["long"] = write_jsonl(
        root / "long.jsonl", [{"prompt": "a " * n, "response": "b c " * 3} for n in lengths]
    )
    texts = ["a a b c", "b c d a", "c d e f", "d e f g"] * 8
    found["tagged"] = write_jsonl(
        root / "tagged.jsonl",
        [{"text": t, "labels": [letter for letter in "abc" if letter in t]} for t in texts],
    )
    return found


def test_the_length_that_was_used_is_recorded(folders, tmp_path):
    job = config(folders, tmp_path / "out", "decoder", "prompt", max_length=None, steps=1)
    assert run(job).metrics["used"]["max_length"] == 1024


def test_what_is_cut_and_dropped_is_said_and_recorded(folders, tmp_path):
    """45 examples became 24 without a word, and the report said 45."""
    console = Console(record=True, width=200)
    run(config(folders, tmp_path / "out", "decoder", "long", max_length=8), console)
    data = json.loads((tmp_path / "out" / "metrics.json").read_text())["data"]
    assert data["train_examples"] + data["dropped"]["train"] == 18
    assert data["eval_examples"] + data["dropped"]["eval"] == 6
    assert data["cut"]["train"] == data["train_examples"]
    assert data["dropped"]["train"] + data["dropped"]["eval"] == 6
    shown = console.export_text()
    assert f"train: {data['train_examples']} of 18 examples; {data['dropped']['train']}" in shown


@pytest.mark.parametrize("settings", [{}, {"fuse_backward": True}, {"adapter": "lora"}])
def test_packed_examples_train_and_are_counted(folders, tmp_path, settings):
    output = tmp_path / "out"
    job = config(folders, output, "decoder", "prompt", packing=True, max_length=32, **settings)
    console = Console(record=True, width=200)
    metrics = run(job, console).metrics
    assert metrics["data"]["train_examples"] == 48
    assert metrics["data"]["packed_rows"] == metrics["used"]["train_rows"] == 16
    assert "6 steps of 8 rows of packed examples on cpu" in console.export_text()
    assert metrics["verified"] is True


def test_packed_batches_reach_the_model_with_positions(folders, tmp_path):
    job = config(folders, tmp_path / "out", "decoder", "prompt", packing=True, max_length=32)
    inputs = load_inputs(job)
    trainer = make_trainer(job, inputs, load_base(job, inputs))
    batch = next(iter(trainer.get_train_dataloader()))
    assert sorted(batch) == ["input_ids", "labels", "position_ids"]
    assert (batch["position_ids"] == 0).sum(1).min() >= 3


def test_packing_is_for_language_models(folders, tmp_path):
    with pytest.raises(FinetuneError, match="--packing is for causal-lm, and the task is sequence"):
        run(config(folders, tmp_path / "out", "encoder", "sequence", packing=True))


def test_chat_needs_a_template(folders, tmp_path):
    with pytest.raises(FinetuneError, match="--chat: the tokenizer has no chat template"):
        run(config(folders, tmp_path / "out", "decoder", "prompt", chat=True))


def test_the_default_length_is_that_of_the_task_and_noted_with_the_delta(folders, tmp_path):
    lengths = {name: task.max_length for name, task in TASKS.items()}
    assert lengths.pop("causal-lm") == lengths.pop("summarization") == 1024
    assert {*lengths.values()} == {128}
    for model, dataset, length in (("decoder", "prompt", 1024), ("encoder", "tagged", 128)):
        job = config(folders, tmp_path / "out", model, dataset, max_length=None)
        inputs = load_inputs(job)
        assert spec_of(job, inputs.data, inputs.lengths).max_length == length


def test_evaluation_of_language_models_has_small_batches(folders, tmp_path):
    """Logits of 64 texts of 1024 tokens over a vocabulary of 49,000 take 13 GB."""
    for model, dataset, size in (("decoder", "prompt", 8), ("encoder", "tagged", 64)):
        job = config(folders, tmp_path / "out", model, dataset)
        inputs = load_inputs(job)
        trainer = make_trainer(job, inputs, load_base(job, inputs))
        assert trainer.args.per_device_eval_batch_size == size


def test_every_task_has_a_pipeline_for_its_model_card():
    assert PIPELINES.keys() == TASKS.keys()


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_several_labels_are_learnt_with_binary_cross_entropy(folders, tmp_path, pooling):
    job = config(folders, tmp_path / "out", "encoder", "tagged", pooling=pooling, steps=2)
    result = run(job)
    names = ("f1_micro", "f1_macro", "subset_accuracy")
    assert result.metrics["metric"]["name"] == "f1_micro"
    assert all(0 <= result.metrics["final"][name] <= 1 for name in names)
    model, _ = load_model(tmp_path / "out")
    assert model.config.problem_type == "multi_label_classification"
    ids = torch.tensor([[2, LETTER_IDS["a"], 3]])
    labels = torch.tensor([[1.0, 0.0, 1.0]])
    with torch.no_grad():
        output = model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels)
    expected = torch.nn.functional.binary_cross_entropy_with_logits(output.logits, labels)
    torch.testing.assert_close(output.loss, expected)


@pytest.mark.parametrize("chat", [None, True])
def test_whether_the_chat_template_was_used_is_recorded(folders, tmp_path, chat):
    """`compare` needs it: the default depends on the data."""
    model = tmp_path / "decoder"
    shutil.copytree(folders["decoder"], model)
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = "{% for turn in messages %}{{ turn['content'] + ' ' }}{% endfor %}"
    tokenizer.save_pretrained(model)
    given = {**folders, "decoder": str(model)}
    job = config(given, tmp_path / "out", "decoder", "prompt", chat=chat, steps=1)
    assert run(job).metrics["used"]["chat"] is (chat is True)

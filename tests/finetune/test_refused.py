"""Bad settings of a job are one line that says what to do, before anything is written."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

pytest.importorskip("transformers", reason="the main job needs the extra 'finetune'")
pytest.importorskip("datasets", reason="the main job needs the extra 'finetune'")
pytest.importorskip("accelerate", reason="the main job needs the extra 'finetune'")

from finetune_jobs import config, make_folders

from sparse_optim.finetune import FinetuneError
from sparse_optim.finetune.job import run

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, str]:
    return make_folders(tmp_path_factory.mktemp("tiny"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "id4"}, r"unknown method 'id4' \(did you mean 'id3'\?\).*frozen"),
        ({"budget": 10**9}, "budget must be 1 to"),
        ({"metric": "rouge"}, "no metric 'rouge'.*accuracy"),
        ({"dtype": "int8"}, "--dtype must be one of float32, bfloat16, float16, got 'int8'"),
        ({"pooling": "max"}, "--pooling must be one of auto, cls, mean, got 'max'"),
        ({"amp": "fp8"}, "--amp must be one of none, bf16, fp16, got 'fp8'"),
        ({"unmask_schedule": "cosine"}, "--unmask-schedule must be one of uniform, linear"),
        ({"unmask_share": 0.0}, "--unmask-share must be above 0 and at most 1"),
        ({"bias_correction": "none"}, "--bias-correction must be one of entry, global"),
        ({"report_to": "paper"}, "'paper' is unknown or not installed; known: none"),
        ({"task": "causal-lm", "text_column": "text"}, "does not generate text"),
        ({"dense": ("head",)}, "no parameter's name begins with 'head'"),
        ({"backend": "fortran"}, "--backend must be one of auto, cpp, cuda"),
        ({"resume": Path("nowhere")}, "nowhere: not a checkpoint of the Trainer"),
        ({"schedule": "lineal"}, r"--schedule 'lineal' \(did you mean 'linear'\?\).*cosine"),
        ({"schedule": "warmup_stable_decay"}, "--schedule 'warmup_stable_decay'"),
        ({"text_column": "label"}, "column 'label' cannot have two uses"),
    ],
)
def test_bad_settings_are_one_line_and_leave_nothing(folders, tmp_path, settings, message):
    output = tmp_path / "out"
    with pytest.raises(FinetuneError, match=message) as caught:
        run(config(folders, output, "encoder", "sequence", **settings))
    assert "\n" not in str(caught.value)
    assert not output.exists()


def test_mean_pooling_is_for_bert(folders, tmp_path):
    with pytest.raises(FinetuneError, match=r"--pooling mean is for BERT.* llama"):
        run(config(folders, tmp_path / "out", "decoder", "sequence", pooling="mean"))


def test_frozen_needs_a_fresh_head(folders, tmp_path):
    with pytest.raises(FinetuneError, match="only a fresh head"):
        run(config(folders, tmp_path / "out", "decoder", "generation", method="frozen"))


@pytest.mark.parametrize("field", ["steps", "lr", "batch_size", "budget", "max_grad_norm"])
def test_numbers_out_of_range_are_named_by_their_option(folders, tmp_path, field):
    with pytest.raises(FinetuneError, match=f"--{field.replace('_', '-')} must be above 0"):
        config(folders, tmp_path, "encoder", "sequence", **{field: 0})


def test_an_output_in_use_is_left_alone(folders, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(FinetuneError, match="not empty; add --overwrite"):
        run(config(folders, tmp_path, "encoder", "sequence"))
    run(config(folders, tmp_path, "encoder", "sequence", overwrite=True, steps=1))
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert (tmp_path / "metrics.json").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"seed": -1}, "--seed must be 0 to 4,294,967,295, got -1"),
        ({"threads": 100_000}, "--threads must be 0 to 1,024"),
        ({"steps": 2**31}, "--steps must be 0 to 2,147,483,646"),
        ({"lr": float("inf")}, "--lr must be a finite number, got inf"),
        ({"warmup": float("nan")}, "--warmup must be a finite number, got nan"),
    ],
)
def test_numbers_that_end_or_hang_a_process_are_refused(folders, tmp_path, settings, message):
    with pytest.raises(FinetuneError, match=message):
        config(folders, tmp_path, "encoder", "sequence", **settings)


def cut(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-200])


def odd_config(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "hidden_size": "wide"}))


def no_json(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def odd_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").write_text('{"model": 3}')


@pytest.mark.parametrize("damage", [cut, odd_config, no_json, odd_tokenizer])
def test_a_damaged_model_is_one_line(folders, tmp_path, damage):
    shutil.copytree(folders["encoder"], tmp_path / "model")
    damage(tmp_path / "model")
    given = {**folders, "encoder": str(tmp_path / "model")}
    with pytest.raises(FinetuneError, match="cannot load model") as caught:
        run(config(given, tmp_path / "out", "encoder", "sequence"))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_examples_longer_than_the_models_positions_are_refused(folders, tmp_path):
    rows = [{"text": "a " * 200, "label": number % 2} for number in range(8)]
    (tmp_path / "long.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = {**folders, "long": str(tmp_path / "long.jsonl")}
    with pytest.raises(FinetuneError, match=r"has 150 tokens.*positions for \d+: use --max-length"):
        run(config(given, tmp_path / "out", "encoder", "long", max_length=150))
    assert not (tmp_path / "out").exists()


def test_empty_texts_of_a_decoder_are_an_end_token(folders, tmp_path):
    """Its tokenizer adds nothing to them: a batch of no tokens crashed the model."""
    rows = [{"text": "", "label": number % 2} for number in range(8)]
    (tmp_path / "empty.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = {**folders, "empty": str(tmp_path / "empty.jsonl")}
    metrics = run(config(given, tmp_path / "out", "decoder", "empty", steps=1)).metrics
    assert metrics["verified"]


def test_a_row_of_too_many_cells_is_named(tmp_path, folders):
    (tmp_path / "ragged.csv").write_text("text,label\na,x\nb,y\na,b,c,d\n")
    given = {**folders, "ragged": str(tmp_path / "ragged.csv")}
    with pytest.raises(FinetuneError, match="Expected 2 fields in line 4, saw 4"):
        run(config(given, tmp_path / "out", "encoder", "ragged"))

"""Bad settings of a job are one line that says what to do, before anything is written."""

from __future__ import annotations

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
        ({"amp": "fp8"}, "--amp must be one of none, bf16, got 'fp8'"),
        ({"unmask_schedule": "cosine"}, "--unmask-schedule must be one of uniform, linear"),
        ({"unmask_share": 0.0}, "--unmask-share must be above 0 and at most 1"),
        ({"bias_correction": "none"}, "--bias-correction must be one of entry, global"),
        ({"report_to": "paper"}, "'paper' is unknown or not installed; known: none"),
        ({"task": "causal-lm", "text_column": "text"}, "does not generate text"),
        ({"dense": ("head",)}, "no parameter's name begins with 'head'"),
        ({"backend": "fortran"}, "--backend must be one of auto, cpp, cuda"),
        ({"resume": Path("nowhere")}, "is not a Trainer checkpoint"),
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

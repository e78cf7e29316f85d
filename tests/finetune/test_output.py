"""The output folder: no file of the user is deleted, and old results stay until new ones exist."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

pytest.importorskip("transformers", reason="the job needs the extra 'finetune'")

from finetune_jobs import write_checkpoint

from sparse_optim.finetune import FinetuneConfig, FinetuneError
from sparse_optim.finetune.output import check_output, earlier_results, replaced_results


def job(output: Path, **options: object) -> FinetuneConfig:
    return FinetuneConfig(**{"model": "minilm", "dataset": "trec6", "output": output, **options})


def earlier(output: Path, *names: str) -> Path:
    """A folder with the results of a job: text files, and folders without a suffix."""
    output.mkdir()
    for name in names:
        if "." in name:
            (output / name).write_text("old")
        else:
            (output / name).mkdir()
            (output / name / "weights").write_text("old")
    (output / "metrics.json").write_text(json.dumps({"files": ["metrics.json", *names]}))
    return output


@pytest.mark.parametrize("option", ["model", "dataset"])
def test_an_input_inside_the_output_is_refused(tmp_path, option):
    """`-m V/model -o V --overwrite` deleted the user's base model."""
    (tmp_path / "out" / "model").mkdir(parents=True)
    inside = {option: str(tmp_path / "out" / "model")}
    with pytest.raises(FinetuneError, match=f"--{option}: .* is inside --output"):
        check_output(job(tmp_path / "out", overwrite=True, **inside))


@pytest.mark.parametrize("name", ["model", "adapter", "delta.safetensors"])
@pytest.mark.parametrize("resumed", [False, True])
def test_what_no_earlier_job_wrote_is_not_replaced(tmp_path, name, resumed):
    output = earlier(tmp_path / "out", "curves.png")
    (output / name).mkdir()
    options: dict[str, object] = {"overwrite": True}
    if resumed:  # which removed V/model without --overwrite
        checkpoint = write_checkpoint(output / "checkpoints" / "checkpoint-2", job(output))
        options = {"resume": checkpoint}
    with pytest.raises(FinetuneError, match=f"{name} is not listed in .*metrics.json"):
        check_output(job(output, **options))


def test_a_checkpoint_of_another_folder_does_not_open_a_folder_in_use(tmp_path):
    checkpoint = tmp_path / "elsewhere" / "checkpoints" / "checkpoint-2"
    write_checkpoint(checkpoint, job(tmp_path))
    output = earlier(tmp_path / "out", "delta.safetensors")
    with pytest.raises(FinetuneError, match="is not empty; add --overwrite"):
        check_output(job(output, resume=checkpoint))
    check_output(job(output, resume=checkpoint, overwrite=True))
    check_output(job(tmp_path / "new", resume=checkpoint))


def test_new_results_take_the_places_of_the_old(tmp_path):
    output = earlier(tmp_path / "out", "delta.safetensors", "model")
    (output / "notes.txt").write_text("mine")
    with replaced_results(output) as folder:
        (folder / "delta.safetensors").write_text("new")
        (folder / "metrics.json").write_text(json.dumps({"files": ["delta.safetensors"]}))
    assert (output / "delta.safetensors").read_text() == "new"
    assert (output / "notes.txt").read_text() == "mine"
    assert not (output / "model").exists()
    assert {path.name for path in output.iterdir()} == {
        "delta.safetensors", "metrics.json", "notes.txt"
    }  # fmt: skip


@pytest.mark.parametrize("where", ["while writing", "while exchanging"])
def test_a_full_disk_leaves_the_old_results(tmp_path, monkeypatch, where):
    output = earlier(tmp_path / "out", "delta.safetensors", "model")
    before = {path: path.read_text() for path in output.rglob("*") if path.is_file()}
    real, calls = os.replace, []

    def full(source, target):
        calls.append(target)
        if len(calls) == 5:  # three old results and a new one have been moved
            raise OSError(28, "No space left on device")
        real(source, target)

    def write() -> None:
        with replaced_results(output) as folder:
            for name in ("curves.png", "delta.safetensors"):
                (folder / name).write_text("new")
            if where == "while writing":
                raise OSError(28, "No space left on device")

    if where == "while exchanging":
        monkeypatch.setattr("sparse_optim.finetune.output.os.replace", full)
    with pytest.raises(OSError, match="No space left"):
        write()
    monkeypatch.undo()
    after = {path: path.read_text() for path in output.rglob("*") if path.is_file()}
    assert after == before


def test_a_record_that_cannot_be_read_lists_nothing(tmp_path):
    output = earlier(tmp_path / "out", "model")
    (output / "metrics.json").write_text("{")
    assert earlier_results(output) == set()
    (output / "metrics.json").write_text(json.dumps({"files": ["model", "/etc/passwd", "../x"]}))
    assert earlier_results(output) == {"model"}

"""What is uploaded to the hub, without a hub."""

from __future__ import annotations

from pathlib import Path

import huggingface_hub
import pytest

pytest.importorskip("transformers", reason="jobs need the extra 'finetune'")

from finetune_jobs import config, make_folders
from huggingface_hub.errors import LocalTokenNotFoundError

from sparse_optim.finetune import FinetuneError
from sparse_optim.finetune.config_file import read_config
from sparse_optim.finetune.job import run
from sparse_optim.finetune.push import push_to_hub

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return make_folders(tmp_path_factory.mktemp("tiny"))


class Hub:
    """Takes the place of HfApi: keeps what is uploaded."""

    def __init__(self, folder: Path):
        self.folder, self.made = folder, []

    def whoami(self):
        return {"name": "ada"}

    def create_repo(self, repo_id, *, private, exist_ok):
        self.made.append((repo_id, private, exist_ok))
        return f"https://hub/{repo_id}"

    def upload_folder(self, *, repo_id, folder_path, commit_message):
        for path in Path(folder_path).rglob("*"):
            if path.is_file():
                target = self.folder / path.relative_to(folder_path)
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(path.read_bytes())


@pytest.fixture
def hub(tmp_path, monkeypatch):
    made = Hub(tmp_path / "hub")
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: made)
    return made


def test_a_run_is_uploaded_with_its_model_at_the_top(folders, tmp_path, hub):
    output = tmp_path / "out"
    settings = {"save_model": True, "save_every": 3, "push_to_hub": "ada/reviews"}
    run(config(folders, output, "encoder", "sequence", **settings))
    assert hub.made == [("ada/reviews", None, True)]
    assert {path.name for path in hub.folder.iterdir()} == {
        *("README.md", "allocation.jsonl", "config.yaml", "curves.png", "delta.safetensors"),
        *("metrics.json", "config.json", "model.safetensors", "tokenizer.json"),
        "tokenizer_config.json",
    }
    assert (
        "pipeline('text-classification', 'ada/reviews')" in (hub.folder / "README.md").read_text()
    )
    assert "push_to_hub" not in read_config(output / "config.yaml")


def test_a_run_without_a_model_is_loaded_by_name(folders, tmp_path, hub):
    output = tmp_path / "out"
    run(config(folders, output, "encoder", "sequence", series=2))
    assert push_to_hub(output, "ada/delta", private=True) == "https://hub/ada/delta"
    assert hub.made == [("ada/delta", True, True)]
    assert "sparse_optim.load_model('ada/delta')" in (hub.folder / "README.md").read_text()
    assert (hub.folder / "series" / "100.safetensors").is_file()  # one step unmasked all
    with pytest.raises(FinetuneError, match="no results of"):
        push_to_hub(tmp_path, "ada/delta")


def test_what_the_hub_refuses_is_one_line(folders, tmp_path, hub, monkeypatch):
    def refuse(**_):
        raise OSError("the disk of the hub is full\nmore")

    job = config(folders, tmp_path / "out", "encoder", "sequence", push_to_hub="ada/reviews")
    monkeypatch.setattr(hub, "upload_folder", refuse)
    with pytest.raises(
        FinetuneError, match=r"cannot upload to ada/reviews: the disk of the hub is full$"
    ):
        run(job)
    assert (tmp_path / "out" / "delta.safetensors").exists()

    def nobody():
        raise LocalTokenNotFoundError("no token")

    monkeypatch.setattr(hub, "whoami", nobody)
    with pytest.raises(FinetuneError, match="log in first"):
        run(config(folders, tmp_path / "other", "encoder", "sequence", push_to_hub="ada/reviews"))
    assert not (tmp_path / "other").exists()

"""Configuration files: what is accepted, what is refused, and a run that repeats another."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from pathlib import Path

import pytest

pytest.importorskip("yaml", reason="configuration files need the extra 'finetune'")
pytest.importorskip("transformers", reason="the main job needs the extra 'finetune'")

from finetune_jobs import make_folders
from typer.testing import CliRunner

from sparse_optim.cli.main import app
from sparse_optim.delta import content_fingerprint, load_delta
from sparse_optim.finetune import FinetuneConfig, FinetuneError
from sparse_optim.finetune.config_file import read_config, write_config
from sparse_optim.finetune.defaults import resolved

BASE = {"model": "minilm", "dataset": "trec6", "output": Path("out")}


def read(tmp_path: Path, text: str) -> dict:
    file = tmp_path / "run.yaml"
    file.write_text(text)
    return read_config(file)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("budget: 1%", 0.01),
        ("budget: 320K", 320_000),
        ("budget: 1000", 1000),
        ("budget: 0.005", 0.005),
        ("budget: null", None),
        ("lr: 5e-4", 5e-4),  # YAML reads text: there is no point
        ("lr: 1", 1.0),
        ("lr: auto", "auto"),
        ("max_grad_norm: null", None),
        ("max_grad_norm: 0", None),
        ("max_grad_norm: 2", 2.0),
        ("output: a/b", Path("a/b")),
        ("dense: [classifier, pooler]", ("classifier", "pooler")),
        ("amp: none", "none"),
        ("cpu: true", True),
        ("task: null", None),
        ("steps: 3", 3),
    ],
)
def test_values(tmp_path, text, value):
    found = read(tmp_path, text)
    assert list(found.values()) == [value]
    assert type(next(iter(found.values()))) is type(value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "batch-size: 3",
            r"unknown setting 'batch-size' \(did you mean 'batch_size'\?\); known",
        ),
        ("1: 2", "unknown setting 1; known: model, dataset, output"),
        ("steps: 1.5", "steps: expected a whole number or null, got 1.5"),
        ("steps: true", "steps: expected a whole number or null, got True"),
        ("lr: fast", "lr: --lr: expected a number such as 5e-4, or auto, got 'fast'"),
        ("cpu: 1", "cpu: expected true or false, got 1"),
        ("model: 7", "model: expected text, got 7"),
        ("model: null", "model: expected text, got None"),
        ("output: [a]", r"output: expected a path, got \['a'\]"),
        ("dense: classifier", "dense: expected a list of text, got 'classifier'"),
        ("dense: [1]", "dense: expected a list of text"),
        ("amp: fp8", "amp: expected none, bf16, fp16, got 'fp8'"),
        ("budget: lots", "budget: --budget: expected entries"),
        ("budget: true", "budget: expected a whole number or a number or null, got True"),
        ("max_grad_norm: much", "max_grad_norm: expected a number or null"),
        ("a: [", "not valid YAML"),
        ("- a", "expected lines of the form 'setting: value'"),
        ("a: !!python/object:os.system {}", "not valid YAML"),
    ],
)
def test_errors_are_one_line_that_names_the_file(tmp_path, text, message):
    with pytest.raises(FinetuneError, match=message) as caught:
        read(tmp_path, text)
    assert str(caught.value).startswith(f"{tmp_path / 'run.yaml'}: ")
    assert "\n" not in str(caught.value)


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(FinetuneError, match=r"none\.yaml: cannot be read"):
        read_config(tmp_path / "none.yaml")
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(FinetuneError, match="not valid YAML"):
        read_config(tmp_path / "bytes.yaml")
    assert read(tmp_path, "# nothing") == {}


@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"max_grad_norm": None, "budget": 300, "dense": ("a", "b"), "verify": False},
        {"lr": 1e-05, "adam_eps": 1e-08, "budget": 0.01, "patience": 3, "best": True},
        {"adapter": "lora", "adapter_targets": ("query",), "task": "regression", "amp": "bf16"},
        {"model": "no: 'colon' # ü", "eval_split": "on"},
    ],
)
def test_what_is_written_is_read_back(tmp_path, changed):
    config = FinetuneConfig(**{**BASE, **changed})
    write_config(config, tmp_path / "config.yaml")
    found = read_config(tmp_path / "config.yaml")
    assert FinetuneConfig(**found) == config
    assert "overwrite" not in found
    write_config(replace(config, resume=Path("x/checkpoint-3")), tmp_path / "config.yaml")
    assert read_config(tmp_path / "config.yaml") == found
    left_out = {field.name for field in fields(config)} - found.keys() - {"overwrite"}
    assert all(getattr(config, name) is None for name in left_out)


@pytest.mark.parametrize(
    ("method", "lr", "budget"),
    [("id3", 1e-3, 0.01), ("full", 1e-4, None), ("top-tuning", 1e-3, None)],
)
def test_defaults_of_the_method_are_filled_in(method, lr, budget):
    found = resolved(FinetuneConfig(**BASE, method=method))
    assert (found.lr, found.budget) == (lr, budget)
    assert found.adam_eps == (1e-6 if method == "top-tuning" else 1e-8)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, str]:
    return make_folders(tmp_path_factory.mktemp("tiny"))


def finetune(*arguments: str):
    return CliRunner().invoke(app, ["finetune", *arguments], env={"COLUMNS": "200"})


@pytest.mark.usefixtures("one_thread")
def test_a_run_is_repeated_from_its_file(folders, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    ran = finetune(
        *("-m", folders["encoder"], "-d", folders["sequence"], "-o", str(first), "--cpu"),
        *("--steps", "3", "--budget", "1%", "--max-grad-norm", "0", "--max-length", "16"),
        *("--dense", "bert.pooler", "--overwrite", "--batch-size", "8"),
    )
    assert ran.exit_code == 0, ran.output
    again = finetune("--config", str(first / "config.yaml"), "-o", str(second))
    assert again.exit_code == 0, again.output
    deltas = [load_delta(folder / "delta.safetensors") for folder in (first, second)]
    assert content_fingerprint(deltas[0]) == content_fingerprint(deltas[1])
    configs = [
        json.loads((folder / "metrics.json").read_text())["config"] for folder in (first, second)
    ]
    assert configs[1]["max_grad_norm"] is None
    assert configs[1]["dense"] == ["bert.pooler"]
    assert [configs[1][name] for name in ("cpu", "steps", "budget", "overwrite")] == [
        *(True, 3, 0.01, False)
    ]
    # Its output is the first folder, which holds results.
    refused = finetune("--config", str(first / "config.yaml"))
    assert refused.exit_code == 1
    assert "not empty; add --overwrite" in refused.output


@pytest.mark.usefixtures("one_thread")
def test_the_command_line_wins(folders, tmp_path):
    file = tmp_path / "run.yaml"
    lines = (f"model: {folders['encoder']}", f"dataset: {folders['sequence']}", "cpu: true")
    file.write_text("\n".join([*lines, "steps: 50", "verify: true", "batch_size: 8", "seed: 3"]))
    out = tmp_path / "out"
    arguments = ("-c", str(file), "-o", str(out), "--steps", "2", "--no-verify", "--seed", "0")
    ran = finetune(*arguments, "--budget", "50", "--max-length", "16")
    assert ran.exit_code == 0, ran.output
    metrics = json.loads((out / "metrics.json").read_text())
    assert (metrics["steps"], metrics["verified"]) == (2, None)
    assert metrics["config"]["seed"] == 0  # given, though it is the default
    assert metrics["config"]["batch_size"] == 8


@pytest.mark.parametrize(
    ("text", "code", "message"),
    [
        ("modle: x", 1, "run.yaml: unknown setting 'modle' (did you mean 'model'?)"),
        ("{model: x, dataset: y, output: z, lr: 0}", 1, "--lr must be above 0, got 0.0 (with the"),
        ("{model: x, dataset: y}", 2, "'--output' / '-o'"),
    ],
)
def test_a_wrong_file_on_the_command_line(tmp_path, text, code, message):
    (tmp_path / "run.yaml").write_text(text)
    result = finetune("--config", str(tmp_path / "run.yaml"))
    assert result.exit_code == code
    assert message in " ".join(result.output.split())

"""The `sparse-optim` command: help, options, errors in one line."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import pytest
import torch

pytest.importorskip("typer", reason="the command needs the extra 'finetune'")
pytest.importorskip("transformers", reason="the command needs the extra 'finetune'")

from rich.style import Style
from rich.text import Text
from tiny_models import save_encoder
from typer.main import get_command
from typer.testing import CliRunner

from sparse_optim.cli import finetune as command
from sparse_optim.cli.main import app
from sparse_optim.finetune import FinetuneConfig, FinetuneError, parse_budget
from sparse_optim.finetune.builtin_data import DATASETS, MODELS
from sparse_optim.finetune.config import field_types, settings
from sparse_optim.finetune.models import DTYPES
from sparse_optim.finetune.settings import choices
from sparse_optim.finetune.tasks import TASKS
from sparse_optim.methods import METHODS, SPARSE_SCORES
from sparse_optim.policy.schedule import SCHEDULES

WIDE = {"COLUMNS": "160", "NO_COLOR": "1", "TERM": "dumb"}


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Tiny models are faster on one thread, by far where other processes want the cores, too."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def invoke(*arguments: str):
    return CliRunner().invoke(app, list(arguments), env=WIDE)


def finetune(folder: Path, *more: str):
    model, data = folder / "model", folder / "set.jsonl"
    if not model.exists():
        save_encoder(model)
        rows = [{"text": "a b" if i % 2 else "c d", "label": i % 2} for i in range(24)]
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    required = ("-m", str(model), "-d", str(data), "-o", str(folder / "out"))
    return invoke("finetune", *required, "--cpu", *more)


def test_help_lists_commands_and_what_is_built_in():
    assert all(
        name in invoke("--help").output
        for name in ("finetune", "analyse", "inspect", "apply", "diff")
    )
    shown = invoke("finetune", "--help").output
    assert all(name in shown for name in (*METHODS, *MODELS, *DATASETS))
    assert "ID3 needs learning rates of 1e-4 to 7e-4, ten times those of full" in shown


def every_command(command, name=""):
    """A command and all below it, with their names."""
    yield command, name
    for part, inner in getattr(command, "commands", {}).items():
        yield from every_command(inner, f"{name} {part}".strip())


def test_help_loses_no_brackets():
    """rich takes [word] for a style; a word that is no style vanishes from the help."""
    checked = 0
    for shown, name in every_command(get_command(app)):
        for text in (shown.help, *(getattr(param, "help", None) for param in shown.params)):
            for span in Text.from_markup(text or "").spans:
                Style.parse(str(span.style))  # raises an error for [paths]
                checked += 1
        if name == "analyse":
            assert '"pictures": [paths]}' in " ".join(invoke(name, "--help").output.split())
    assert checked > 20


def test_every_setting_is_an_option_with_its_default_and_help():
    parameters = inspect.signature(command.build_command()).parameters
    required = ("model", "dataset", "output")
    assert list(parameters) == ["context", "config", *settings(), "debug"]
    for field in fields(FinetuneConfig):
        expected = None if field.name in required or field.default == () else field.default
        assert parameters[field.name].default == expected
        assert settings()[field.name].help[-1] in ".)"
    shown = invoke("finetune", "--help").output
    for name in settings():
        assert f"--{name.replace('_', '-')} " in shown
    assert all(f" {flag} " in shown for flag in ("-m", "-d", "-o", "--no-verify", "--no-cpu"))


def test_names_that_need_no_torch_are_those_of_the_sources():
    types = field_types()
    assert choices(types["unmask_schedule"]) == tuple(SCHEDULES)
    assert choices(types["sparse_score"]) == tuple(SPARSE_SCORES)
    assert choices(types["dtype"]) == tuple(DTYPES)
    assert choices(types["task"]) == tuple(TASKS)


@pytest.mark.parametrize(
    ("text", "budget"),
    [
        ("1000", 1000),
        ("320K", 320_000),
        ("3.5M", 3_500_000),
        ("320_000", 320_000),
        ("1%", 0.01),
        ("0.5%", 0.005),
        ("0.01", 0.01),
        ("100%", 1.0),
    ],
)
def test_budgets(text, budget):
    assert parse_budget(text) == budget
    assert type(parse_budget(text)) is type(budget)


@pytest.mark.parametrize("text", ["", "x", "-5", "0", "1.5", "200%", "0%", "K", "nan%", "1e400M"])
def test_bad_budgets(text):
    with pytest.raises(FinetuneError, match="--budget"):
        parse_budget(text)


def test_finetune_then_inspect(tmp_path):
    result = finetune(tmp_path, "--steps", "4", "--budget", "200", "--batch-size", "8")
    assert result.exit_code == 0, result.output
    assert "step 4/4" in result.output
    assert "yes, bit for bit" in result.output
    assert "Traceback" not in result.output
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert metrics["config"]["budget"] == 200
    assert metrics["config"]["model"] == str(tmp_path / "model")
    shown = invoke("inspect", str(tmp_path / "out" / "delta.safetensors"))
    assert shown.exit_code == 0, shown.output
    again = finetune(tmp_path, "--steps", "1")
    assert again.exit_code == 1
    assert "not empty; add --overwrite" in again.output


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (("--method", "id4"), 1, "unknown method 'id4'"),
        (("--budget", "lots"), 1, "expected entries"),
        (("--budget", "900M"), 1, "budget must be 1 to"),
        (("--text-column", "body"), 1, "no column 'body'; the data set has columns text, label"),
        (("--lr", "0"), 1, "--lr must be above 0"),
        (("--max-grad-norm", "-1"), 1, "--max-grad-norm must be above 0"),
        (("--amp", "fp8"), 2, "Invalid value for '--amp'"),
        (("--lr", "fast"), 1, "--lr: expected a number such as 5e-4, or auto"),
        (("--colour",), 2, "No such option"),
    ],
)
def test_errors_are_one_line_with_an_exit_code(tmp_path, options, code, message):
    result = finetune(tmp_path, *options)
    assert result.exit_code == code
    assert message in " ".join(result.output.split())
    assert "Traceback" not in result.output
    assert not (tmp_path / "out").exists()


def test_debug_shows_the_traceback(tmp_path):
    result = finetune(tmp_path, "--method", "id4", "--debug")
    assert isinstance(result.exception, FinetuneError)

"""Every command reports an error that the user can mend in one line, and Ctrl-C as 130."""

from __future__ import annotations

import pytest

pytest.importorskip("typer", reason="the command needs the extra 'finetune'")
pytest.importorskip("transformers", reason="the command needs the extra 'finetune'")

import typer
from typer.testing import CliRunner

from sparse_optim.analysis.record import RecordError
from sparse_optim.cli import demo
from sparse_optim.cli.console import one_line_errors
from sparse_optim.cli.main import app
from sparse_optim.delta import DeltaError
from sparse_optim.errors import SparseOptimError
from sparse_optim.experiments.presets import ExperimentError
from sparse_optim.finetune import FinetuneError

COMMANDS = {
    "finetune": ("-m", "[x]/no/model", "-d", "[x].csv", "-o", "{tmp}/out"),
    "experiment": ("glue", "--dry-run", "--tasks", "[x]"),
    "predict": ("{tmp}/[x]", "text"),
    "evaluate": ("{tmp}/[x]", "trec6"),
    "push": ("{tmp}/[x]", "ada/x"),
    "inspect": ("{tmp}/[x].safetensors",),
    "apply": ("{tmp}", "{tmp}/[x].safetensors", "{tmp}/out"),
    "diff": ("{tmp}/[x].safetensors", "{tmp}"),
    "merge": ("{tmp}/[x].safetensors", "-o", "{tmp}/out.safetensors"),
    "unmerge": ("{tmp}/[x].safetensors", "{tmp}/a", "{tmp}/b", "-o", "{tmp}/out.safetensors"),
    "analyse": ("{tmp}/[x]",),
    "compare": ("{tmp}/[x]",),
    "export-peft": ("{tmp}/[x].safetensors", "--base", "minilm", "-o", "{tmp}/out"),
    "import-summary": ("{tmp}/[x].pt", "-m", "minilm", "-o", "{tmp}/out"),
    "estimate": ("-m", "/no/[x]"),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_an_error_is_one_line_on_stderr(tmp_path, command):
    arguments = [text.format(tmp=tmp_path) for text in COMMANDS[command]]
    result = CliRunner().invoke(app, [command, *arguments])
    assert result.exit_code == 1, result.output
    if command == "finetune":  # it says first what it understood
        labels = [line.split()[0] for line in result.stdout.splitlines()]
        assert labels == ["model", "data", "method"]
    else:
        assert result.stdout == ""
    assert result.stderr.startswith("Error: ")
    assert result.stderr.count("\n") == 1
    if command != "diff":  # its message names no path
        assert "[x]" in result.stderr  # not read as markup


def test_every_command_is_tried_here():
    listed = {command.name for command in typer.main.get_command(app).commands.values()}
    assert listed == set(COMMANDS)


def test_the_demo_reports_errors_alike(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo, "MODEL", "/no/model")
    with pytest.raises(typer.Exit) as caught:
        demo.main(tmp_path / "out", steps=1)
    assert caught.value.exit_code == 1
    assert capsys.readouterr().err.startswith("Error: ")


def outcome(error: BaseException, **options: object):
    tiny = typer.Typer()

    @tiny.command()
    def fail() -> None:
        with one_line_errors(**options):
            raise error

    return CliRunner().invoke(tiny)


@pytest.mark.parametrize(
    "error", [SparseOptimError, FinetuneError, ExperimentError, DeltaError, RecordError, OSError]
)
def test_errors_that_users_can_mend(error):
    result = outcome(error("first\n  second [red]"))
    assert (result.exit_code, result.stderr) == (1, "Error: first second [red]\n")
    assert result.stdout == ""
    assert isinstance(outcome(error("x"), debug=True).exception, error)
    assert issubclass(error, OSError | ValueError)


def test_a_missing_package_is_named():
    result = outcome(ModuleNotFoundError("No module named 'datasets'", name="datasets"))
    assert result.exit_code == 1
    assert "'datasets'; install it with: pip install 'sparse-optim[finetune]'" in result.stderr


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("x"),
        ValueError("x"),
        ModuleNotFoundError("no", name="sparse_optim.gone"),
    ],
)
def test_defects_keep_their_traceback(error):
    assert outcome(error).exception is error


def test_ctrl_c():
    result = outcome(KeyboardInterrupt(), interrupted="Repeat the command.")
    assert (result.exit_code, result.stderr) == (130, "Interrupted. Repeat the command.\n")

"""Help and completion answer at once: what is slow to import is imported when a command runs."""

from __future__ import annotations

import subprocess
import sys

import pytest
from repository import ROOT

import sparse_optim

SLOW = ("torch", "transformers", "datasets", "matplotlib", "sklearn", "peft")

RUN = """
import runpy, sys
sys.argv = ["sparse-optim", *{arguments!r}]
try:
    runpy.run_module("sparse_optim", run_name="__main__")
except SystemExit as ending:
    assert not ending.code, ending.code
print("imported:", *[name for name in {slow!r} if name in sys.modules])
"""


def run(code: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={"PATH": "", "COLUMNS": "160", **environment},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_version_needs_nothing_slow():
    pytest.importorskip("typer", reason="the command needs the extra 'finetune'")
    shown = run(RUN.format(arguments=("--version",), slow=SLOW))
    assert shown == f"sparse-optim {sparse_optim.__version__}\nimported:\n"


def test_what_it_understood_is_shown_before_torch_is_imported():
    pytest.importorskip("typer", reason="the command needs the extra 'finetune'")
    code = """
import sys
from sparse_optim.cli import finetune
def stop():
    print("imported:", *[name for name in {slow!r} if name in sys.modules])
    raise SystemExit
finetune.{last} = stop
from sparse_optim.cli.main import app
app(["finetune", "-m", "minilm", "-d", "trec6", "-o", "/nowhere"], standalone_mode=False)
"""
    shown = run(code.format(slow=SLOW, last="quiet_datasets"))
    assert "MiniLM-L6 encoder" in shown
    assert "id3, 1% of the Linear weights, lr 0.001" in shown
    assert shown.endswith("imported:\n")
    shown = run(code.format(slow=SLOW, last="quiet_libraries"))
    assert "loaded 4,499 examples to train on, 881 to evaluate (test)" in shown
    assert "6 labels: ABBR, DESC" in shown
    assert shown.endswith("imported: datasets\n")


@pytest.mark.parametrize(
    "arguments",
    [
        ("--help",),
        ("finetune", "--help"),
        ("experiment", "--help"),
        ("experiment", "glue", "--help"),
        ("inspect", "--help"),
        ("apply", "--help"),
        ("diff", "--help"),
        ("analyse", "--help"),
        ("compare", "--help"),
        ("export-peft", "--help"),
        ("estimate", "--help"),
    ],
    ids=" ".join,
)
def test_help_imports_nothing_slow(arguments):
    pytest.importorskip("typer", reason="the command needs the extra 'finetune'")
    shown = run(RUN.format(arguments=arguments, slow=SLOW))
    assert "Usage: sparse-optim" in shown
    assert shown.endswith("imported:\n")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("sparse-optim ", "finetune"),
        ("sparse-optim finetune --ba", "budget"),
        ("sparse-optim finetune --method st", "stochastic-tuning"),
        ("sparse-optim finetune --adapter d", "dora"),
        ("sparse-optim finetune -m min", "minilm"),
        ("sparse-optim finetune -m READ", "README.md"),
        ("sparse-optim finetune -d conll", "conll2003"),
        ("sparse-optim finetune --amp f", "fp16"),
    ],
)
def test_completion_imports_nothing_slow(words, expected):
    pytest.importorskip("typer", reason="the command needs the extra 'finetune'")
    expected = {"budget": "--batch-size"}.get(expected, expected)
    shown = run(
        RUN.format(arguments=(), slow=SLOW),
        _SPARSE_OPTIM_COMPLETE="complete_bash",
        COMP_WORDS=words,
        COMP_CWORD=str(len(words.split()) - (0 if words.endswith(" ") else 1)),
    )
    assert expected in shown
    assert shown.endswith("imported:\n")


def test_the_package_imports_nothing_slow():
    slow = run(f"import sparse_optim, sys; print([n for n in {SLOW!r} if n in sys.modules])")
    assert slow == "[]\n"


def test_the_optimizer_imports_torch_alone():
    slow = run(
        "import sys; from sparse_optim import *; sys.modules.pop('torch')\n"
        f"print([n for n in {SLOW!r} if n in sys.modules])"
    )
    assert slow == "[]\n"


def test_names_of_the_package():
    assert set(sparse_optim.__all__) <= set(dir(sparse_optim))
    for name in sparse_optim.__all__:
        assert getattr(sparse_optim, name) is not None
    assert sparse_optim.delta.load_delta is sparse_optim.load_delta
    with pytest.raises(AttributeError, match="'sparse_optim' has no attribute 'Adam'"):
        _ = sparse_optim.Adam

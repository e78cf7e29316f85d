"""The examples and the notebook run, on tiny models, and print a result that is true."""

from __future__ import annotations

import ast
import csv
import importlib.util
import json
import re
from pathlib import Path

import pytest

pytest.importorskip("transformers", reason="the examples need the extra 'finetune'")
pytest.importorskip("datasets", reason="the examples need the extra 'finetune'")

import torch
from repository import ROOT
from tiny_models import save_decoder, save_encoder
from transformers import AutoTokenizer, BertModel

from sparse_optim import load_delta
from sparse_optim.finetune import FinetuneError, builtin_data

pytestmark = [
    pytest.mark.usefixtures("one_thread", "few_examples"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),  # in peft
    pytest.mark.filterwarnings("ignore:'pin_memory' argument:UserWarning"),  # without a GPU
]
EXAMPLES = ROOT / "examples"
CHAT_TEMPLATE = (
    "{% for turn in messages %}{% generation %}{{ turn['content'] }} {% endgeneration %}"
    "{% endfor %}"
)


@pytest.fixture
def few_examples(tmp_path, monkeypatch):
    """The built-in sets with 64 and 32 short texts, told apart by a letter; a folder to work in."""

    def texts(labels, count):
        names = [labels[i % len(labels)] for i in range(count)]
        rows = [f"{'abcdefgh'[labels.index(name)]} {i % 10}" for i, name in enumerate(names)]
        return {"text": rows, "label": names}

    def load(name):
        labels = ["DESC", "HUM", "LOC"] if name == "trec6" else ["negative", "positive"]
        return {"train": texts(labels, 64), "test": texts(labels, 32)}

    monkeypatch.setattr(builtin_data, "load_builtin", load)
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """A tiny encoder with words that differ enough to be learned in a few steps."""
    folder = save_encoder(tmp_path_factory.mktemp("models") / "encoder")
    model = BertModel.from_pretrained(folder)
    with torch.no_grad():
        for param in model.parameters():
            param.mul_(10 if param.dim() > 1 else 1)
    model.save_pretrained(folder)
    return str(folder)


def load(name):
    """Import an example."""
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(name, capsys, *arguments):
    """Import an example, run it, and return what it printed."""
    load(name).main([str(argument) for argument in arguments])
    return " ".join(capsys.readouterr().out.split())


def check_delta(printed, file):
    """The delta is the file that the sentence names, with as many entries."""
    entries, named = (re.search(p, printed).group(1) for p in (r"holds ([\d,]+) ", r"(\S+) holds"))
    assert named == str(file)
    assert load_delta(file).num_entries == int(entries.replace(",", "")) > 100


@pytest.mark.parametrize("name", ["own_loop", "trainer"])
def test_a_loop_learns_and_saves_a_delta(name, encoder, tmp_path, capsys):
    file = tmp_path / "task.safetensors"
    options = ("--steps", 30, "--lr", 0.01, "--output", file)
    printed = run(name, capsys, "--model", encoder, *options)
    share = float(re.search(r"([\d.]+)% of .* are right after 30 steps", printed).group(1))
    assert share > 90, printed
    check_delta(printed, file)


def test_the_adapter_is_loaded_by_peft_alone(encoder, tmp_path, capsys):
    pytest.importorskip("peft", reason="needs the extra 'peft'")
    options = ("--model", encoder, "--output", tmp_path / "adapter", "--steps", 5, "--rank", 4)
    printed = run("lora", capsys, *options)
    active, ranked = re.search(r"with ([\d,]+) of the adapter's ([\d,]+) entries", printed).groups()
    assert int(active) == round(int(ranked.replace(",", "")) / 5)
    assert "with the same outputs" in printed
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()


def test_a_csv_file_is_classified_and_files_of_the_user_stay(encoder, capsys):
    """The files that the README names are left alone; only its own folder may be there already."""
    Path("reviews.csv").write_text("mine")
    Path("runs/reviews").mkdir(parents=True)
    Path("runs/reviews/delta.safetensors").write_text("mine")
    Path("runs/example-reviews").mkdir()
    Path("runs/example-reviews/notes.txt").write_text("of an earlier run")
    options = ("--model", encoder, "--steps", 30, "--lr", 0.01, "--text", "b 3")
    printed = run("classify_csv", capsys, *options)
    with open("example-reviews.csv", newline="") as file:
        assert len(list(csv.DictReader(file))) == 64
    assert Path("reviews.csv").read_text() == "mine"
    assert Path("runs/reviews/delta.safetensors").read_text() == "mine"
    with pytest.raises(FinetuneError, match="not empty"):
        run("classify_csv", capsys, *options, "--output", "runs/reviews")
    value = float(re.match(r"accuracy ([\d.]+) on the rows held out", printed).group(1))
    assert value > 0.9, printed
    assert "'b 3' is positive" in printed


@pytest.mark.parametrize("name", ["classify_csv", "chat", "lora", "own_loop", "trainer"])
def test_an_example_writes_under_names_that_a_user_would_not_choose(name):
    """Files and folders named in its source; vit.py writes only what --output names."""
    text = (EXAMPLES / f"{name}.py").read_text()
    code = text.partition('"""\n\nimport')[2]
    written = re.findall(r'(?:Path\(|default=|output_dir=)"([\w/.-]+)"', code)
    files = [path for path in written if "/" in path or "." in path or "adapter" in path]
    assert files
    assert all(Path(path).name.startswith("example-") for path in files), files


def test_a_file_that_is_there_is_not_written_again(tmp_path):
    mine = tmp_path / "mine"
    mine.write_text("mine")
    for name, function in (("classify_csv", "write_reviews"), ("chat", "write_chats")):
        assert getattr(load(name), function)(mine) == mine
        assert mine.read_text() == "mine"


def test_a_chat_model_is_asked(tmp_path, capsys):
    decoder = save_decoder(tmp_path / "decoder")
    tokenizer = AutoTokenizer.from_pretrained(decoder)
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(decoder)
    options = ("--model", decoder, "--steps", 2, "--output", tmp_path / "runs" / "shop")
    printed = run("chat", capsys, *options)
    entries = load_delta(tmp_path / "runs" / "shop" / "delta.safetensors").num_entries
    assert f"After 2 steps on {entries:,} entries, 'When do you open" in printed
    assert "is answered: " in printed


def test_the_notebook_runs(encoder, capsys):
    notebook = json.loads((EXAMPLES / "quickstart.ipynb").read_text())
    cells = ["".join(c["source"]) for c in notebook["cells"] if c["cell_type"] == "code"]
    assert all(not cell.get("outputs") for cell in notebook["cells"])
    python = [cell for cell in cells if "pip install" not in cell]
    assert len(python) == len(cells) - 1  # all but the installation
    rows = [
        {"text": "a b" if i % 2 else "c d", "label": "HUM" if i % 2 else "LOC"} for i in range(24)
    ]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    names: dict[str, object] = {}
    for cell in python:
        exec(compile(cell, "quickstart.ipynb", "exec"), names)
        if "STEPS = " in cell:
            names |= {"MODEL": encoder, "DATA": "rows.jsonl", "STEPS": 4}
    assert [answer["label"] in ("HUM", "LOC") for answer in names["answers"]] == [True] * 2
    assert len(names["rows"]) == 2
    (training,) = (cell for cell in python if "def train(" in cell)
    assert isinstance(ast.parse(training).body[-1], ast.Assign)  # else Jupyter shows its repr
    assert not any("](../" in "".join(cell["source"]) for cell in notebook["cells"])  # Colab
    assert Path("example-comparison.png").stat().st_size > 10_000
    assert "is the trained model, bit for bit: True" in capsys.readouterr().out


def test_every_example_is_listed_and_says_how_to_run_it():
    listed = set(re.findall(r"\]\((\w+\.\w+)\)", (EXAMPLES / "README.md").read_text()))
    assert listed == {path.name for path in EXAMPLES.iterdir()} - {"README.md", "__pycache__"}
    for path in EXAMPLES.glob("*.py"):
        assert f"python examples/{path.name}" in path.read_text(), path

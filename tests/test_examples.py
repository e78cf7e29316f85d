"""The examples and the notebook run, on tiny models, and print a result that is true."""

from __future__ import annotations

import ast
import csv
import json
import re
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers", reason="the examples need the extra 'finetune'")
pytest.importorskip("datasets", reason="the examples need the extra 'finetune'")

import torch
from few_examples import EXAMPLES, load_example, load_few
from processes import free_port, start_group
from repository import ROOT
from tiny_models import save_decoder, save_encoder
from transformers import AutoModelForCausalLM, AutoTokenizer, BertModel

from sparse_optim import load_delta
from sparse_optim.finetune import FinetuneError, builtin_data
from sparse_optim.publish import PatchFolder, WeightReceiver

pytestmark = [
    pytest.mark.usefixtures("one_thread", "few_examples"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),  # in peft
    pytest.mark.filterwarnings("ignore:'pin_memory' argument:UserWarning"),  # without a GPU
]
CHAT_TEMPLATE = (
    "{% for turn in messages %}{% generation %}{{ turn['content'] }} {% endgeneration %}"
    "{% endfor %}"
)


@pytest.fixture
def few_examples(tmp_path, monkeypatch):
    """The built-in sets with 64 and 32 short texts, told apart by a letter; a folder to work in."""

    monkeypatch.setattr(builtin_data, "load_builtin", load_few)
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


def run(name, capsys, *arguments):
    """Import an example, run it, and return what it printed."""
    load_example(name).main([str(argument) for argument in arguments])
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


def test_a_recipe_builds_what_its_config_names(encoder, tmp_path, capsys):
    file = tmp_path / "task.safetensors"
    options = (f"model={encoder}", "steps=60", "optimizer.lr=0.02", f"output={file}")
    printed = run("recipe", capsys, *options)
    first, last = re.search(r"from ([\d.]+) to ([\d.]+) in 60 steps", printed).groups()
    assert float(last) < 0.5 < float(first), printed
    check_delta(printed, file)


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="torch has no gloo")
def test_two_processes(encoder, tmp_path):
    """DDP; FSDP, and again from its checkpoint in mid-run, with the same delta bit for bit."""
    options = ["--model", encoder, "--steps", "30", "--lr", "0.01", "--output"]
    shards = [tmp_path / f"fsdp{number}.safetensors" for number in range(2)]
    resumed = ["--checkpoint", str(tmp_path / "half")]
    ddp = tmp_path / "ddp.safetensors"
    calls = [[free_port(), "ddp", *options, str(ddp)]]
    calls += [[free_port(), "fsdp", *options, str(file), *resumed] for file in shards]
    script = ROOT / "tests" / "support" / "few_examples.py"
    first, second = start_group(
        [sys.executable, str(script), json.dumps(calls)], PYTHONPATH=str(ROOT)
    )
    assert (first.returncode, second.returncode) == (0, 0), first.stderr + second.stderr
    assert second.stdout == ""
    printed = re.findall(r"([\d.]+)% of .* after 30 steps (.*)of 2 processes; (.*)", first.stdout)
    assert all(float(share) > 80 for share, _, _ in printed), first.stdout
    assert [words for _, words, _ in printed] == ["", "(0 of them before) ", "(15 of them before) "]
    for file, (_, _, told) in zip([ddp, *shards], printed, strict=True):
        check_delta(told, file)
    assert shards[0].read_bytes() == shards[1].read_bytes()


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


@pytest.mark.parametrize(
    "name", ["classify_csv", "chat", "ddp", "fsdp", "lora", "own_loop", "trainer"]
)
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
        assert getattr(load_example(name), function)(mine) == mine
        assert mine.read_text() == "mine"


@pytest.fixture
def decoder(tmp_path):
    """A language model with a chat template."""
    folder = save_decoder(tmp_path / "decoder")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")  # in trl
def test_trls_trainer_saves_deltas_with_its_checkpoints(decoder, tmp_path, capsys):
    pytest.importorskip("trl", reason="needs trl, of the extra 'dev'")
    file = tmp_path / "task.safetensors"
    printed = run("trl_sft", capsys, "--model", decoder, "--steps", 4, "--output", file)
    check_delta(printed[printed.index(str(file)) :], file)
    assert "'When do you open on Sunday?' is answered: " in printed
    last = load_delta("runs/example-trl/checkpoint-4/delta.safetensors")
    assert last.num_entries == load_delta(file).num_entries


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")  # in trl
def test_grpo_publishes_and_a_copy_follows(decoder, capsys):
    pytest.importorskip("trl", reason="needs trl, of the extra 'dev'")
    printed = run("trl_grpo", capsys, "--model", decoder, "--steps", 3, "--weights", "weights")
    assert "version 3 is weights/000000003.patch.safetensors, " in printed
    assert "'What is a lake?' was answered " in printed
    receiver = WeightReceiver(AutoModelForCausalLM.from_pretrained(decoder))
    assert PatchFolder("weights").follow(receiver) == 3


def test_a_chat_model_is_asked(decoder, tmp_path, capsys):
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
        start = "(python|torchrun --nproc_per_node [234])"
        assert re.search(f"    {start} examples/{path.name}", path.read_text()), path

"""What the docs show is true: names exist, commands parse, Python runs, links lead somewhere."""

from __future__ import annotations

import ast
import builtins
import importlib
import importlib.util
import inspect
import re
import shlex
import symtable
from functools import cache
from types import SimpleNamespace

import pytest
import torch
from repository import ROOT

from sparse_optim import IncrementalMaskedAdamW, apply_delta, load_delta

pytestmark = pytest.mark.usefixtures("one_thread")
TABLE = ROOT / "docs" / "compatibility.md"
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "examples/README.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
]


def blocks(page, language):
    """The text of the page's blocks in a language, in order."""
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)


def test_the_tests_of_the_table_of_compatibility_exist():
    file, named = None, 0
    for where in re.findall(r"`([\w/.]+?\.py|\.\.\.)((?:::\w+)?)`", TABLE.read_text()):
        path, test = where
        file = ROOT / "tests" / path if path != "..." else file
        assert file is not None
        assert file.is_file(), path
        if test:
            assert f"\ndef {test.removeprefix('::')}(" in file.read_text(), where
        named += 1
    assert named > 40


class Classifier(torch.nn.Module):
    """A model whose call returns an object with a loss, as transformers' do."""

    def __init__(self):
        super().__init__()
        self.body, self.classifier = torch.nn.Linear(8, 8), torch.nn.Linear(8, 2)

    def forward(self, inputs, labels):
        logits = self.classifier(torch.relu(self.body(inputs)))
        return SimpleNamespace(loss=torch.nn.functional.cross_entropy(logits, labels))


def given():
    """What blocks may use without defining it: a model, its base, data."""
    torch.manual_seed(0)
    model, base = Classifier(), Classifier()
    base.load_state_dict(model.state_dict())
    torch.manual_seed(1)
    batch = {"inputs": torch.randn(16, 8), "labels": torch.randint(2, (16,))}
    optimizer = IncrementalMaskedAdamW(
        model.named_parameters(), budget=0.01, total_steps=1000, unmask_steps=1.0
    )
    return {
        "model": model, "base": base, "base_model": base, "optimizer": optimizer, "torch": torch,
        "loader": [batch] * 40, "evaluate": id, "train": lambda model, optimizer: None,
    }  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*total_steps")
@pytest.mark.parametrize("document", ["README.md", "docs/guide/loop.md"])
def test_the_loop_of_the_document_runs(document, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (loop,) = (b for b in blocks(ROOT / document, "python") if "for batch in loader" in b)
    names = given()
    exec(loop, names)
    base, model = names["base"], names["model"]
    apply_delta(base, load_delta("task.safetensors"))
    for name, tensor in model.state_dict().items():
        assert torch.equal(base.state_dict()[name], tensor), name


def free_names(code):
    """Names that a block uses and does not bind."""
    table = symtable.symtable(code, "block", "exec")
    tables, used, bound = [table], set(), set()
    while tables:
        scope = tables.pop()
        tables += scope.get_children()
        for symbol in scope.get_symbols():
            if symbol.is_global() or scope is table:
                used |= {symbol.get_name()} if symbol.is_referenced() else set()
        if scope is table:
            bound = {
                s.get_name() for s in scope.get_symbols() if s.is_assigned() or s.is_imported()
            }
    return used - bound - set(dir(builtins))


# What needs a finished run, the hub, another package or minutes: compiled and checked, not run.
NOT_RUN = ("load_model(", "selective_optimizers", "peft", "SelectiveTrainer(", "job import run",
           "runs/", "budget=100_000", "summary.pt", "trl", "lightning", "torch.distributed",
           "DistributedDataParallel(")  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*total_steps")
def test_complete_blocks_run_and_print_what_they_show(tmp_path, monkeypatch, capsys):
    """The blocks of a page one after another; ```text after a block is what it prints."""
    monkeypatch.chdir(tmp_path)
    ran = []
    for page in PAGES:
        pattern = r"^```python\n(.*?)^```\n(?:\n```text\n(.*?)^```)?"
        found = re.findall(pattern, page.read_text(), re.MULTILINE | re.DOTALL)
        names = given() if found else {}
        for code, shown in found:
            if any(word in code for word in NOT_RUN) or free_names(code) - names.keys():
                continue
            exec(compile(code, str(page), "exec"), names)
            assert capsys.readouterr().out == shown, page
            ran.append(page.name)
    assert {"README.md", "loop.md", "delta-format.md", "migrating.md", "tasks.md"} <= set(ran)
    assert len(ran) >= 12


def imported(tree):
    """Name in a block -> the object of ours that it stands for."""
    found = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module.startswith("sparse_optim"):
            home = importlib.import_module(node.module)
            found |= {a.asname or a.name: getattr(home, a.name) for a in node.names}
        elif isinstance(node, ast.Import):
            ours = [alias for alias in node.names if alias.name.startswith("sparse_optim")]
            found |= {
                a.asname or a.name.split(".")[0]: importlib.import_module(a.name) for a in ours
            }
    return found


def test_blocks_name_what_exists_and_call_it_with_its_arguments():
    checked = 0
    for page in PAGES:
        for code in blocks(page, "python"):
            tree = ast.parse(code, str(page))
            names = imported(tree)
            for node in ast.walk(tree):
                if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                    module = names.get(node.value.id)
                    found = not inspect.ismodule(module) or hasattr(module, node.attr)
                    assert found, (page, node.attr)
                if not isinstance(node, ast.Call):
                    continue
                target = node.func
                if isinstance(target, ast.Attribute) and isinstance(target.value, ast.Name):
                    called = getattr(names.get(target.value.id), target.attr, None)
                else:
                    called = names.get(target.id) if isinstance(target, ast.Name) else None
                if called is not None:
                    keywords = {word.arg: None for word in node.keywords}
                    inspect.signature(called).bind_partial(*node.args, **keywords)
                    checked += 1
    assert checked > 20


@cache
def whole_command():
    """`sparse-optim` with all its commands."""
    typer = pytest.importorskip("typer", reason="the command needs the extra 'finetune'")
    from sparse_optim.cli.main import app

    return typer.main.get_command(app)


def command_of(words):
    """The command that a line names, and its arguments."""
    command, words = whole_command(), list(words)
    while getattr(command, "commands", None) and words and not words[0].startswith("-"):
        assert words[0] in command.commands, f"no command {words[0]}"
        command = command.commands[words.pop(0)]
    return command, words


def split_line(line):
    """The words after `sparse-optim`; None if the line does not run it."""
    words = shlex.split(line, comments=True)
    if words[:1] == ["sparse-optim"]:
        words = words[1:]
    elif "sparse_optim" in words and words[words.index("sparse_optim") - 1] == "-m":
        words = words[words.index("sparse_optim") + 1 :]
    else:
        return None
    return [word for word in words if word != "..."]


def test_lines_of_the_command_parse():
    """As the command would parse them; what an option's value means is not looked at."""
    assert sum(map(parsed_lines, PAGES)) > 60


def parsed_lines(page):
    """The number of lines and snippets of a page that run the command; all of them parse."""
    parsed = 0
    typed = [line for block in blocks(page, "bash") for line in block.splitlines()]
    for block in blocks(page, "console"):  # with what the commands print
        typed += re.findall(r"^\$ (.*)$", block, re.MULTILINE)
    for line in typed:
        if (words := split_line(line)) is None:
            continue
        command, arguments = command_of(words)
        if command.params and "--help" not in arguments and "--version" not in arguments:
            command.make_context(command.name, arguments)
        parsed += 1
    for words in re.findall(r"`(sparse-optim [^`]+)`", page.read_text()):
        command, arguments = command_of(split_line(words))
        known = {name for param in command.params for name in (*param.opts, *param.secondary_opts)}
        options = {word for word in arguments if word.startswith("-")}
        assert options <= known | {"--help"}, words
        parsed += 1
    return parsed


def test_options_that_the_docs_name_exist():
    """`--option` in prose, of any command."""
    commands, known = [whole_command()], {"--help", "--dry-gpu", "--no-build-isolation"}
    while commands:
        command = commands.pop()
        commands += getattr(command, "commands", {}).values()
        known |= {n for param in command.params for n in (*param.opts, *param.secondary_opts)}
    for page in PAGES:
        prose = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
        named = {
            o for code in re.findall(r"`(--[^`]+)`", prose) for o in re.findall(r"--[\w-]+", code)
        }
        assert named <= known, (page, named - known)


def test_links_and_pictures_lead_to_files_and_headings():
    for page in (*PAGES, ROOT / "bench" / "README.md"):
        for target, anchor in re.findall(r"\]\(([^)#:\s]*)(?:#([^)\s]*))?\)", page.read_text()):
            file = page.parent / target if target else page
            if file.name == "commands.md":  # only on the site, where the strict build follows it
                continue
            assert file.exists(), (page, target)
            if anchor and file.suffix == ".md":
                headings = re.findall(r"^#+ (.*)$", file.read_text(), re.MULTILINE)
                slugs = [re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings]
                assert anchor in slugs, (page, target, anchor)


@pytest.fixture(scope="module")
def hooks():
    pytest.importorskip("mkdocs", reason="needs the extra 'docs'")
    spec = importlib.util.spec_from_file_location("site_hooks", ROOT / "docs" / "hooks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_of_the_commands_has_all_of_them(hooks):
    text = "\n".join(hooks.describe(whole_command(), "sparse-optim"))
    headings = re.findall(r"^## sparse-optim (.*)$", text, re.MULTILINE)
    groups = {name for name, part in whole_command().commands.items() if hasattr(part, "commands")}
    assert {heading.split()[0] for heading in headings} == whole_command().commands.keys()
    assert not groups & set(headings)  # their commands instead
    assert re.search(r"^\| `--batch-size` \| Batch size\. Default: 16\. \|$", text, re.MULTILINE)
    assert "Values: `none`, `bf16`, `fp16`. Default: none. |" in text
    assert re.search(r"^\| `--task` \|.* Values: `sequence-classification`, ", text, re.MULTILINE)
    assert re.search(
        r"^\| `--verify`, `--no-verify` .* Default: `--verify`. \|$", text, re.MULTILINE
    )
    assert re.search(r"^\| `--cpu`, `--no-cpu` .* Default: `--no-cpu`. \|$", text, re.MULTILINE)
    assert not re.search(r"^\| `--debug` .* Default:", text, re.MULTILINE)
    assert '"pictures": [paths]}' in text
    assert "[cyan]" not in text
    assert "\n\n- minilm: " in text


def test_links_of_the_site_lead_to_its_pages(hooks):
    """Links are written for GitHub; the hooks turn those that leave docs/ to pages, or to text."""
    pages = {
        "index.md",
        "methods.md",
        "guide/data.md",
        "recipes/tag.md",
        "bench/results/quality.png",
    }
    files = SimpleNamespace(get_file_from_path=lambda uri: uri if uri in pages else None)

    def shown(page, text):
        held = SimpleNamespace(file=SimpleNamespace(src_uri=page))
        return hooks.on_page_markdown(text, held, None, files)

    assert shown("index.md", "[a](docs/guide/data.md#a-run)") == "[a](guide/data.md#a-run)"
    assert shown("index.md", "![a](bench/results/quality.png)") == "![a](bench/results/quality.png)"
    assert shown("methods.md", "[a](../bench/README.md) b") == "a b"
    assert shown("methods.md", "![a](../bench/results/quality.png)") == shown(
        "index.md", "![a](bench/results/quality.png)"
    )
    assert shown("recipes/tag.md", "[a](../../README.md#install)") == "[a](../index.md#install)"
    assert shown("recipes/tag.md", "[a](../methods.md)") == "[a](../methods.md)"
    assert shown("methods.md", "[a](absent.md)") == "[a](absent.md)"  # the strict build finds it
    code = "```python\n[a](../README.md)\n```"
    assert shown("methods.md", code) == code


def test_every_public_name_has_its_place_in_the_reference():
    pages = [page.read_text() for page in (ROOT / "docs" / "api").glob("*.md")]
    documented = re.findall(r"^::: ([\w.]+)$", "\n".join(pages), re.MULTILINE)
    shown = {path.rpartition(".")[2] for path in documented}
    homes = ("", ".delta", ".integrations", ".calibration", ".analysis", ".methods", ".finetune")
    for home in homes:
        public = set(importlib.import_module(f"sparse_optim{home}").__all__)
        unknown = {name for name in public - shown if not name.isupper() and name != "__version__"}
        assert unknown <= {"parse_budget"}, f"sparse_optim{home}: add ::: lines to docs/api"
    assert len(documented) == len(set(documented))

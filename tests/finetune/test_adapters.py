"""Jobs on adapters: what is trained, and the files that rebuild it."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import replace

import pytest
import torch

pytest.importorskip("peft", reason="adapters need the extra 'peft'")
pytest.importorskip("transformers", reason="jobs need the extra 'finetune'")

from adapter_cases import reloaded
from tiny_models import save_decoder, save_encoder
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
from typer.testing import CliRunner

from sparse_optim import apply_delta, load_delta, save_delta
from sparse_optim.cli.main import app
from sparse_optim.finetune import FinetuneConfig, FinetuneError
from sparse_optim.finetune.adapter_kinds import ADAPTERS, DEFAULT_RATE
from sparse_optim.finetune.defaults import learning_rate
from sparse_optim.finetune.job import run
from sparse_optim.integrations import adapter_parameters, load_bottlenecks

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    # peft's forward pass makes a sparse tensor without saying whether to check it.
    pytest.mark.filterwarnings("ignore:Sparse invariant checks:UserWarning"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny encoder, a tiny decoder, and data for them."""
    root = tmp_path_factory.mktemp("tiny")
    save_encoder(root / "encoder")
    save_decoder(root / "decoder")
    rows = [{"text": "a b c" if i % 2 else "d e", "label": i % 2} for i in range(32)]
    for name, keys in (("encoder", ("text", "label")), ("decoder", ("text",))):
        lines = (json.dumps({key: row[key] for key in keys}) + "\n" for row in rows)
        (root / f"{name}.jsonl").write_text("".join(lines))
    return root


def config(folder, output, model="encoder", **settings):
    defaults = {"steps": 4, "batch_size": 8, "max_length": 16, "budget": 50, "cpu": True}
    arguments = {**defaults, "eval_fraction": 0.25, **settings}
    return FinetuneConfig(str(folder / model), str(folder / f"{model}.jsonl"), output, **arguments)


def scores(model):
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        return model.eval()(input_ids=ids, attention_mask=torch.ones_like(ids)).logits


def from_files(kind, folder, output):
    base = AutoModelForSequenceClassification.from_pretrained(folder / "encoder")
    if kind not in ("pfeiffer", "houlsby"):
        return reloaded(base, output / "adapter")
    load_bottlenecks(base, output / "adapter")
    return base


@pytest.mark.parametrize(
    ("kind", "method"),
    [
        *((kind, method) for kind in ADAPTERS for method in ("id3", "full") if kind != "houlsby"),
        ("houlsby", "id3"),
        *(("lora", method) for method in ("static-d3", "fish", "r-mask")),
        ("pfeiffer", "sparse-adapter"),
        ("lora", "sparse-adapter@rand"),
        *(("pfeiffer", f"sparse-adapter@{score}") for score in ("mag", "grasp", "synflow")),
    ],
)
def test_the_adapter_is_trained_verified_and_saved(folder, tmp_path, kind, method):
    method, _, score = method.partition("@")
    settings = {"method": method, "lr": 1e-2, "sparse_score": score or "snip"}
    result = run(config(folder, tmp_path / "out", adapter=kind, **settings))
    assert result.metrics["verified"] is True
    model, metrics = result.model, result.metrics
    adapter = sum(param.numel() for param in adapter_parameters(model).values())
    head = metrics["model"]["fresh_entries"]
    assert head == 2 * 32 + 2
    assert metrics["active_entries"] == head + (adapter if method == "full" else 50)
    base = AutoModelForSequenceClassification.from_pretrained(folder / "encoder").bert.state_dict()
    trained = model.state_dict()
    for name, tensor in base.items():
        held = [key for key in trained if key.replace(".base_layer", "").endswith("bert." + name)]
        assert len(held) == 1
        assert torch.equal(trained[held[0]], tensor), name
    assert torch.equal(scores(from_files(kind, folder, tmp_path / "out")), scores(model))
    note = load_delta(tmp_path / "out" / "delta.safetensors").method
    assert (note["name"], note["model"]["adapter"]) == (method, kind)


def test_pafi_on_a_fresh_adapter_warns_of_the_zeros_that_it_takes_first(folder, tmp_path):
    with pytest.warns(UserWarning, match=r"are all zeros .*lora_B"):
        result = run(config(folder, tmp_path / "out", adapter="lora", method="pafi"))
    assert result.metrics["verified"] is True
    delta = load_delta(tmp_path / "out" / "delta.safetensors")
    assert delta.num_entries == 50
    assert all("lora_B" in name for name in delta.sparse)


def test_lora_takes_all_linear_modules_but_the_head(folder, tmp_path):
    model = run(config(folder, tmp_path / "out", adapter="lora", adapter_rank=3)).model
    shapes = {name: tuple(param.shape) for name, param in adapter_parameters(model).items()}
    assert len(shapes) == 2 * (2 * 6 + 1)
    assert {min(shape) for shape in shapes.values()} == {3}
    assert not any("classifier" in name for name in shapes)


def test_lora_goes_where_it_is_asked_for(folder, tmp_path):
    placing = {"adapter_targets": ("query", "attention.output.dense"), "adapter_alpha": 3.0}
    output = tmp_path / "out"
    model = run(config(folder, output, adapter="lora", adapter_rank=2, **placing)).model
    adapted = {name.rpartition(".lora_")[0] for name in adapter_parameters(model)}
    assert len(adapted) == 2 * 2
    assert {name.rpartition(".layer.")[2][2:] for name in adapted} == {
        "attention.self.query",
        "attention.output.dense",
    }
    assert {model.get_submodule(name).scaling["default"] for name in adapted} == {1.5}
    assert torch.equal(scores(from_files("lora", folder, output)), scores(model))


def test_a_language_model_has_no_head_and_its_output_layer_no_adapter(folder, tmp_path):
    output = tmp_path / "out"
    result = run(config(folder, output, "decoder", adapter="lora", task="causal-lm"))
    assert result.metrics["verified"] is True
    assert result.metrics["model"]["fresh"] == []
    assert not any("lm_head" in name for name in adapter_parameters(result.model))
    base = AutoModelForCausalLM.from_pretrained(folder / "decoder")
    assert torch.equal(scores(reloaded(base, output / "adapter")), scores(result.model))


@pytest.mark.parametrize("kind", ["lora", "pfeiffer"])
def test_resume_ends_where_the_uninterrupted_run_ends(folder, tmp_path, kind):
    whole = run(config(folder, tmp_path / "whole", adapter=kind, save_every=2))
    checkpoint = tmp_path / "whole" / "checkpoints" / "checkpoint-2"
    rest = run(config(folder, tmp_path / "rest", adapter=kind, resume=checkpoint))
    assert rest.metrics["verified"] is True
    deltas = [(result.output / "delta.safetensors").read_bytes() for result in (whole, rest)]
    assert deltas[0] == deltas[1]


def test_a_later_job_without_an_adapter_leaves_none_behind(folder, tmp_path):
    run(config(folder, tmp_path / "out", adapter="ia3"))
    assert (tmp_path / "out" / "adapter" / "adapter_config.json").exists()
    run(config(folder, tmp_path / "out", overwrite=True))
    assert not (tmp_path / "out" / "adapter").exists()


def test_dense_methods_take_the_rate_of_adapters(folder, tmp_path):
    given = config(folder, tmp_path, adapter="lora", method="full")
    assert learning_rate(given) == DEFAULT_RATE == 2e-3
    assert learning_rate(config(folder, tmp_path, method="full")) == 1e-4
    assert learning_rate(config(folder, tmp_path, adapter="lora", lr=1e-6)) == 1e-6


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"adapter": "lara"}, r"unknown adapter 'lara' \(did you mean 'lora'\?\)"),
        ({"adapter": "ia3", "adapter_rank": 4}, "ia3 has no rank"),
        ({"adapter_rank": 4}, "--adapter-rank needs --adapter"),
        ({"adapter_alpha": 4.0}, "--adapter-alpha needs --adapter"),
        ({"adapter_targets": ("query",)}, "--adapter-targets needs --adapter"),
        ({"adapter": "lora", "adapter_alpha": -1.0}, "--adapter-alpha must be above 0"),
        ({"adapter": "pfeiffer", "adapter_alpha": 4.0}, "for lora and dora, not for pfeiffer"),
        ({"adapter": "ia3", "adapter_targets": ("query",)}, "for lora and dora, not for ia3"),
        (
            {"adapter": "lora", "adapter_targets": ("query", "q_proj")},
            "name ends in 'q_proj'; they end in query, key, value, dense",
        ),
        ({"adapter": "lora", "adapter_rank": 0}, "--adapter-rank must be above 0"),
        ({"adapter": "lora", "save_model": True}, "--save-model is for runs without --adapter"),
        ({"adapter": "lora", "method": "sparse-adapter"}, r"all zeros \(a fresh LoRA B\)"),
        ({"adapter": "dora", "method": "sparse-adapter"}, r"all zeros \(a fresh LoRA B\)"),
        ({"sparse_score": "snap"}, "--sparse-score must be one of rand, mag, snip.* got 'snap'"),
        ({"adapter": "lora", "budget": 10**6}, "budget must be 1 to"),
    ],
)
def test_errors(folder, tmp_path, settings, message):
    with pytest.raises(FinetuneError, match=message):
        run(config(folder, tmp_path / "out", **settings))
    assert not (tmp_path / "out").exists()


def test_without_peft_the_message_says_how_to_install_it(folder, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(
        FinetuneError, match=r"--adapter lora: .*pip install 'sparse-optim\[peft\]'"
    ):
        run(config(folder, tmp_path / "out", adapter="lora"))


def invoke(*arguments):
    wide = {"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"}
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env=wide)


def test_export_peft_computes_the_same(folder, tmp_path):
    run(config(folder, tmp_path / "out", budget=4000, lr=1e-2, rank="all"))
    delta = load_delta(tmp_path / "out" / "delta.safetensors")
    weights = {name: held for name, held in delta.sparse.items() if name.endswith("weight")}
    prints = {name: delta.fingerprints[name] for name in weights}
    delta = replace(delta, sparse=weights, fingerprints=prints)
    save_delta(delta, tmp_path / "delta")
    base = folder / "encoder"
    command = ("export-peft", tmp_path / "delta", "--base", base, "-o", tmp_path / "shira")
    refused = invoke(*command)
    assert refused.exit_code == 1
    assert refused.stdout == ""
    assert refused.stderr.startswith("Error: SHiRA stores only changed entries of Linear weights")
    assert refused.stderr.count("\n") == 1
    written = invoke(*command, "--whole")
    assert written.exit_code == 0, written.output
    assert re.search(
        r"stored whole: \d+ modules: bert\.embeddings\S+, \S+, \S+, \.\.\.", written.output
    )
    models = [AutoModelForSequenceClassification.from_pretrained(base) for _ in range(2)]
    apply_delta(models[0], delta)
    again = reloaded(models[1], tmp_path / "shira")
    torch.testing.assert_close(scores(again), scores(models[0]), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--task", "chess"), "the delta was trained for sequence-classification"),
        (("--base", "nowhere/nothing"), "cannot load model 'nowhere/nothing'"),
    ],
)
def test_export_peft_errors_are_one_line(folder, tmp_path, monkeypatch, options, message):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    run(config(folder, tmp_path / "out"))
    delta = tmp_path / "out" / "delta.safetensors"
    base = ("--base", folder / "encoder")
    shown = invoke("export-peft", delta, *base, "-o", tmp_path / "shira", *options)
    assert shown.exit_code == 1
    assert shown.stderr.startswith("Error: ")
    assert message in shown.stderr
    assert not (tmp_path / "shira").exists()

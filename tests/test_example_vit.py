"""The example of a vision transformer: what competes for the budget, and what its delta holds."""

from __future__ import annotations

import importlib.util

import pytest

pytest.importorskip("transformers", reason="the example needs the extra 'finetune'")
pytest.importorskip("sklearn", reason="the example needs the extra 'finetune'")

from repository import ROOT

from sparse_optim import load_delta, param_groups

pytestmark = pytest.mark.usefixtures("one_thread")


def test_it_trains_one_percent_of_the_transformer_and_the_head(tmp_path, capsys):
    spec = importlib.util.spec_from_file_location("example_vit", ROOT / "examples" / "vit.py")
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    model = example.new_model()
    ranked, whole, frozen = param_groups(model, dense="classifier")
    assert {name for name, _ in whole["params"]} == {"classifier.weight", "classifier.bias"}
    names = {name for name, _ in ranked["params"]}
    assert all(param.ndim == 2 for _, param in ranked["params"])
    rest = {name for name, _ in frozen["params"]}
    embeddings = "vit.embeddings."
    assert {embeddings + "cls_token", embeddings + "position_embeddings"} <= rest
    everything = {name for name, _ in model.named_parameters() if name.startswith("vit.")}
    assert names | rest == everything
    budget = round(0.01 * sum(param.numel() for _, param in ranked["params"]))

    file = tmp_path / "delta.safetensors"
    found = example.main(["--steps", "6", "--output", str(file)])
    delta = load_delta(file)
    assert delta.num_entries == budget
    assert sorted(delta.dense) == ["classifier.bias", "classifier.weight"]
    head = sum(tensor.numel() for tensor in delta.dense.values())
    printed = capsys.readouterr().out
    assert f"{found['id3']:.3f}, {budget + head:,} entries changed" in printed
    assert f"{found['head alone']:.3f}, {head} entries changed" in printed

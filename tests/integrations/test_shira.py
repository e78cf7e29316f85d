"""Deltas as SHiRA adapters: what peft computes from the file, and what is refused."""

from __future__ import annotations

import json
import sys
from dataclasses import replace

import pytest
import torch

pytest.importorskip("peft", reason="SHiRA needs the extra 'peft'")
pytest.importorskip("transformers", reason="the models need the extra 'finetune'")

from adapter_cases import adapted, classifier, copied, logits, reloaded, train
from safetensors.torch import load_file
from torch import nn

from sparse_optim import IncrementalMaskedAdamW, apply_delta
from sparse_optim.delta import Delta, DeltaError, SparseValues, increment
from sparse_optim.delta._fingerprint import fingerprint
from sparse_optim.integrations import adapter_groups, export_shira

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    # peft's forward pass makes a sparse tensor without saying whether to check it.
    pytest.mark.filterwarnings("ignore:Sparse invariant checks:UserWarning"),
]

KEY = "bert.encoder.layer.1.intermediate.dense"


def tuned(ranked, dtype=torch.float32, budget=300):
    """(trained model, delta): entries of the parameters that `ranked` takes, and a dense head."""
    model = classifier(dtype)
    named = list(model.named_parameters())
    head = [(name, param) for name, param in named if name.startswith("classifier")]
    groups = [
        {"params": [(name, param) for name, param in named if ranked(name)]},
        {"params": head, "unmask": "all"},
    ]
    optimizer = IncrementalMaskedAdamW(
        groups, lr=5e-2, budget=budget, total_steps=4, unmask_steps=1.0
    )
    train(model, optimizer)
    return model, optimizer.delta(model)


def linear_weight(name):
    return name.startswith("bert.encoder") and name.endswith("weight") and "LayerNorm" not in name


def any_weight(name):
    return not name.startswith("classifier") and name.endswith("weight")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_peft_computes_what_base_and_delta_compute(tmp_path, dtype):
    model, delta = tuned(linear_weight, dtype)
    base = classifier(dtype)
    written = export_shira(delta, base, tmp_path / "shira")
    assert written.whole == ("classifier",)
    assert written.entries == delta.num_entries == 300
    again = reloaded(classifier(dtype), tmp_path / "shira")
    tolerance = 1e-6 if dtype == torch.float32 else 1e-3
    torch.testing.assert_close(logits(again), logits(model), rtol=0, atol=tolerance)
    apply_delta(base, replace(delta, sparse={}, fingerprints={}))  # the head alone
    assert (logits(model) - logits(base)).abs().max() > 10 * tolerance


def test_every_weight_is_base_plus_difference_to_the_last_place(tmp_path):
    model, delta = tuned(linear_weight)
    export_shira(delta, classifier(), tmp_path / "shira")
    merged = reloaded(classifier(), tmp_path / "shira").merge_and_unload().state_dict()
    base = copied(classifier())
    for name, expected in model.state_dict().items():
        torch.testing.assert_close(merged[name], expected, rtol=0, atol=2**-24)
        changed = (merged[name] != base[name]).sum() if "classifier" not in name else 0
        assert changed <= (delta.sparse[name].num_entries if name in delta.sparse else 0), name


def test_the_file_holds_r_times_m_plus_n_entries_a_layer_filled_up_with_zeros(tmp_path):
    _, delta = tuned(linear_weight)
    written = export_shira(delta, classifier(), tmp_path / "shira")
    tensors = load_file(tmp_path / "shira" / "adapter_model.safetensors")
    config = json.loads((tmp_path / "shira" / "adapter_config.json").read_text())
    sizes = {name: values.num_entries / sum(values.shape) for name, values in delta.sparse.items()}
    assert config["r"] == written.r == -int(-max(sizes.values()) // 1)
    assert set(config["target_modules"]) == {name.removesuffix(".weight") for name in sizes}
    assert config["modules_to_save"] == ["classifier"]
    stored = 0
    for name, values in delta.sparse.items():
        key = "base_model.model." + name.removesuffix("weight") + "shira_"
        weight, indices = tensors[key + "weight"], tensors[key + "indices"]
        assert weight.shape == (written.r * sum(values.shape),)
        position = indices[0].long() * values.shape[1] + indices[1]
        assert (position.diff() > 0).all()
        assert torch.isin(values.position, position).all()
        assert not weight[~torch.isin(position, values.position)].any()
        stored += weight.numel()
    assert stored == written.stored


def test_other_modules_are_refused_or_stored_whole(tmp_path):
    model, delta = tuned(any_weight, budget=2000)
    with pytest.raises(DeltaError, match=r"not those of \d+ modules .*: a LayerNorm.*--whole") as e:
        export_shira(delta, classifier(), tmp_path / "shira")
    assert "bert.embeddings" in str(e.value)
    assert not (tmp_path / "shira").exists()
    written = export_shira(delta, classifier(), tmp_path / "shira", allow_whole=True)
    assert {"classifier", "bert.embeddings.word_embeddings"} <= set(written.whole)
    again = reloaded(classifier(), tmp_path / "shira")
    torch.testing.assert_close(logits(again), logits(model), rtol=0, atol=1e-6)


def changes(base, **entries):
    """A delta that adds 1 to the first so many entries of parameters (dots written as __)."""
    params = dict(base.named_parameters())
    sparse = {}
    for name, count in entries.items():
        name = name.replace("__", ".")
        flat = params[name].detach().view(-1)
        position = torch.arange(count)
        sparse[name] = SparseValues(
            tuple(params[name].shape), flat.dtype, position, flat[position] + 1
        )
    return Delta(sparse, fingerprints={name: fingerprint(params[name]) for name in sparse})


WEIGHT = KEY.replace(".", "__") + "__weight"


def test_a_changed_bias_needs_the_layer_whole(tmp_path):
    base = classifier()
    delta = changes(base, **{WEIGHT: 3, WEIGHT[:-6] + "bias": 1, "bert__pooler__dense__weight": 2})
    with pytest.raises(DeltaError, match=f"{KEY}: its bias changed"):
        export_shira(delta, base, tmp_path / "shira")
    written = export_shira(delta, base, tmp_path / "shira", allow_whole=True)
    assert (written.layers, written.whole) == (("bert.pooler.dense",), (KEY,))
    expected = classifier()
    apply_delta(expected, delta)
    again = reloaded(classifier(), tmp_path / "shira")
    torch.testing.assert_close(logits(again), logits(expected), rtol=0, atol=1e-6)


def test_small_layers_limit_r(tmp_path):
    """The classifier, (2, 32), holds r = 1; 200 entries of a (64, 32) layer need r = 3."""
    base = classifier()
    delta = changes(base, classifier__weight=4, **{WEIGHT: 200})
    with pytest.raises(DeltaError, match="classifier: holds at most r=1, and r is 3"):
        export_shira(delta, base, tmp_path / "a")
    written = export_shira(delta, base, tmp_path / "a", allow_whole=True)
    assert (written.r, written.layers, written.whole) == (3, (KEY,), ("classifier",))
    full = changes(base, classifier__weight=64, **{WEIGHT: 1})
    with pytest.raises(DeltaError, match="classifier: too small for its 64 changed entries"):
        export_shira(full, base, tmp_path / "b")


def test_r_can_be_given(tmp_path):
    base = classifier()
    delta = changes(base, **{WEIGHT: 200})
    with pytest.raises(DeltaError, match=f"r=2 is too small: {KEY} needs r=3"):
        export_shira(delta, base, tmp_path / "shira", r=2)
    with pytest.raises(DeltaError, match="r=22 is larger than any layer allows"):
        export_shira(delta, base, tmp_path / "shira", r=22, allow_whole=True)
    written = export_shira(delta, base, tmp_path / "shira", r=5)
    assert (written.r, written.entries, written.stored) == (5, 200, 5 * 96)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
        self.second.weight = self.first.weight


class Nested(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(8, 8))
        self.body.scale = nn.Parameter(torch.ones(8))


class Alike(nn.Module):
    def __init__(self):
        super().__init__()
        self.query = nn.Linear(8, 8)
        self.body = nn.ModuleDict({"query": nn.Linear(8, 8)})


@pytest.mark.parametrize(
    ("base", "entries", "message"),
    [
        (Tied(), {"first__weight": 2}, "'first.weight' and 'second.weight' are tied"),
        (Nested(), {"body__scale": 2}, "'body.scale' belongs to 'body', which holds further"),
        (Alike(), {"query__weight": 2}, "peft would take 'body.query' for 'query'"),
        (Alike(), {"query__bias": 2}, "there are none .query: its bias changed"),
    ],
)
def test_models_that_peft_would_get_wrong_are_refused(tmp_path, base, entries, message):
    with pytest.raises(DeltaError, match=message):
        export_shira(changes(base, **entries), base, tmp_path / "shira", allow_whole=True)
    assert not list(tmp_path.iterdir())


def test_other_bases_increments_and_folders_in_use_are_refused(tmp_path):
    base = classifier()
    delta = changes(base, **{WEIGHT: 3})
    other = classifier()
    other.get_parameter(KEY + ".weight").data[0, 0] += 1
    with pytest.raises(DeltaError, match="not the base of this delta"):
        export_shira(delta, other, tmp_path / "shira")
    with pytest.raises(DeltaError, match="compose it"):
        export_shira(increment(delta, changes(base, **{WEIGHT: 5})), base, tmp_path / "shira")
    (tmp_path / "file").write_text("mine")
    with pytest.raises(DeltaError, match="expected a new or empty folder"):
        export_shira(delta, base, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_the_base_is_not_changed(tmp_path):
    base = classifier()
    before = copied(base)
    export_shira(changes(base, **{WEIGHT: 3}), base, tmp_path / "shira")
    assert list(base.state_dict()) == list(before)
    assert all(torch.equal(before[name], now) for name, now in base.state_dict().items())
    assert all(param.requires_grad for param in base.parameters())


def test_a_delta_over_an_adapter_is_told_what_to_do(tmp_path):
    model = adapted("lora")
    optimizer = IncrementalMaskedAdamW(
        adapter_groups(model), budget=20, total_steps=1, unmask_steps=1.0
    )
    train(model, optimizer, steps=1)
    with pytest.raises(DeltaError, match=r"PeftModel\.save_pretrained"):
        export_shira(optimizer.delta(model), classifier(), tmp_path / "shira")


def test_without_peft_the_message_says_how_to_install_it(tmp_path, monkeypatch):
    base = classifier()
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'sparse-optim\[peft\]'"):
        export_shira(changes(base, **{WEIGHT: 3}), base, tmp_path / "shira")

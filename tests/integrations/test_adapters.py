"""Param groups of adapted models, deltas over adapters, zeroing."""

from __future__ import annotations

import re

import pytest
import torch

pytest.importorskip("peft", reason="adapters need the extra 'peft'")
pytest.importorskip("transformers", reason="the models need the extra 'finetune'")

import peft
from adapter_cases import KINDS, adapted, classifier, copied, logits, reloaded, train, with_peft

from sparse_optim import IncrementalMaskedAdamW, MaskedAdamW, Static, apply_delta, load_delta
from sparse_optim.delta import save_delta
from sparse_optim.integrations import (
    adapter_groups,
    adapter_parameters,
    add_bottlenecks,
    zero_inactive_,
)
from sparse_optim.policy.importance import D3

pytestmark = pytest.mark.usefixtures("one_thread")

BLOCK = r"(base_model\.model\.)?bert\.encoder\.layer\.[01]\."
DENSE = r"(attention\.self\.query|attention\.output\.dense|intermediate\.dense|output\.dense)"
EXPECTED = {
    "lora": (
        rf"({BLOCK}{DENSE}|base_model\.model\.bert\.pooler\.dense)\.lora_[AB]\.default\.weight",
        2 * (2 * 4 + 1),
    ),
    "dora": (
        rf"{BLOCK}attention\.self\.(query|value)\.lora_([AB]|magnitude_vector)\.default\.weight",
        2 * 2 * 3,
    ),
    "ia3": (
        rf"{BLOCK}(attention\.self\.(key|value)|(attention\.)?output\.dense)\.ia3_l\.default",
        2 * 4,
    ),
    "bottleneck": (rf"{BLOCK}output\.dense\.adapter\.(down|up)\.(weight|bias)", 2 * 4),
}


def optimizer_for(model, **settings):
    arguments = {"lr": 1e-2, "budget": 0.3, "total_steps": 4, "weight_decay": 0.1, **settings}
    return IncrementalMaskedAdamW(adapter_groups(model), **arguments, unmask_steps=1.0)


@pytest.mark.parametrize("kind", KINDS)
def test_the_pool_is_the_adapter_and_the_head_is_dense(kind):
    groups = adapter_groups(adapted(kind))
    assert [group["unmask"] for group in groups] == ["rank", "all"]
    ranked, whole = ([name for name, _ in group["params"]] for group in groups)
    pattern, count = EXPECTED[kind]
    assert len(set(ranked)) == count
    assert [name for name in ranked if not re.fullmatch(pattern, name)] == []
    head = {"bottleneck": "classifier."}.get(
        kind, "base_model.model.classifier.modules_to_save.default."
    )
    assert set(whole) == {head + "weight", head + "bias"}


@pytest.mark.parametrize("kind", KINDS)
def test_the_base_keeps_its_bits_and_only_the_budget_moves(kind):
    model = adapted(kind)
    before = copied(model)
    optimizer = optimizer_for(model, budget=20)
    train(model, optimizer)
    ranked, whole = (dict(group["params"]) for group in adapter_groups(model))
    moved = {name: int((before[name] != now).sum()) for name, now in model.state_dict().items()}
    assert 0 < sum(moved[name] for name in ranked) <= 20
    assert optimizer.metrics()["active"] == 20
    assert all(moved[name] for name in whole)
    assert all(not count for name, count in moved.items() if name not in ranked | whole)


def test_without_a_head_there_is_one_group():
    model = with_peft(peft.LoraConfig(r=2, target_modules=["query"]))
    assert [group["unmask"] for group in adapter_groups(model)] == ["rank"]


def test_an_added_adapter_is_in_the_pool_only_when_it_is_active():
    model = with_peft(peft.LoraConfig(r=2, target_modules=["query"]))
    model.add_adapter("other", peft.LoraConfig(r=3, target_modules=["value"]))
    assert {".default." in name for name, _ in adapter_groups(model)[0]["params"]} == {True}
    assert {".other." in name for name in adapter_parameters(model)} == {True, False}
    model.set_adapter("other")
    assert {".other." in name for name, _ in adapter_groups(model)[0]["params"]} == {True}


@pytest.mark.parametrize("kind", KINDS)
def test_a_delta_on_a_fresh_adapter_is_the_trained_model(kind, tmp_path):
    model = adapted(kind)
    optimizer = optimizer_for(model)
    train(model, optimizer)
    save_delta(optimizer.delta(model), tmp_path / "delta")
    fresh = adapted(kind)
    apply_delta(fresh, load_delta(tmp_path / "delta"))
    expected = copied(model)
    assert fresh.state_dict().keys() == expected.keys()
    for name, tensor in fresh.state_dict().items():
        assert torch.equal(tensor, expected[name]), name


@pytest.mark.parametrize("kind", ["lora", "dora", "ia3"])
def test_the_sparsified_adapter_is_an_ordinary_peft_checkpoint(kind, tmp_path):
    model = adapted(kind)
    model.save_pretrained(tmp_path / "initial")
    optimizer = optimizer_for(model)
    train(model, optimizer)
    model.save_pretrained(tmp_path / "trained")
    again = reloaded(classifier(), tmp_path / "trained")
    assert torch.equal(logits(again), logits(model))
    # From the file of the initial adapter, too.
    rebuilt = reloaded(classifier(), tmp_path / "initial")
    assert not torch.equal(logits(rebuilt), logits(model))
    apply_delta(rebuilt, optimizer.delta(model))
    assert torch.equal(logits(rebuilt), logits(model))


def test_models_without_trainable_adapters_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"no adapter layers: use peft\.get_peft_model"):
        adapter_groups(classifier())
    model = adapted("lora")
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is_trainable=True"):
        adapter_groups(reloaded(classifier(), tmp_path))


def pruned_run(kind):
    """One static step, then zeros everywhere else; (model, optimizer, zeroed)."""
    model = adapted(kind)
    optimizer = MaskedAdamW(
        adapter_groups(model), lr=1e-2, importance=D3(exp=1.0), selection=Static(50)
    )
    train(model, optimizer, steps=1)
    zeroed = zero_inactive_(model, optimizer.active_entries())
    optimizer.refresh()  # the zeros are meant, and not in the delta
    return model, optimizer, zeroed


@pytest.mark.parametrize("kind", ["lora", "bottleneck"])
def test_zeroing_leaves_exactly_the_active_entries(kind):
    untouched = adapted(kind)
    initial = copied(untouched)
    model, optimizer, zeroed = pruned_run(kind)
    params = adapter_parameters(model)
    assert zeroed == sum(param.numel() for param in params.values()) - 50
    active = optimizer.active_entries()
    for name, param in params.items():
        flat = param.detach().view(-1)
        kept = torch.zeros(flat.numel(), dtype=torch.bool)
        kept[active[name]] = True
        assert not flat[~kept].any()
        assert flat[kept].all()
    for name, tensor in model.state_dict().items():
        if name not in params and "classifier" not in name:
            assert torch.equal(tensor, initial[name]), name


@pytest.mark.parametrize("kind", ["lora", "bottleneck"])
def test_a_pruned_adapter_is_rebuilt_by_its_delta_and_the_same_zeros(kind):
    model, optimizer, _ = pruned_run(kind)
    train(model, optimizer, steps=3)
    delta = optimizer.delta(model)
    fresh = adapted(kind)
    apply_delta(fresh, delta)
    assert not torch.equal(logits(fresh), logits(model))
    zero_inactive_(fresh, {name: values.position for name, values in delta.sparse.items()})
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, fresh.state_dict()[name]), name


@pytest.mark.parametrize(
    ("kind", "active", "message"),
    [
        ("dora", {}, "lora_magnitude_vector multiplies"),
        ("ia3", {}, "ia3_l multiplies"),
        ("lora", {"bert.embeddings": torch.tensor([0])}, "'bert.embeddings' is not a parameter"),
    ],
)
def test_zeroing_refuses_and_changes_nothing(kind, active, message):
    model = adapted(kind)
    before = copied(model)
    with pytest.raises(ValueError, match=message):
        zero_inactive_(model, active)
    assert all(torch.equal(before[name], now) for name, now in model.state_dict().items())


def test_training_goes_on_with_zeroed_entries_frozen():
    model = classifier()
    add_bottlenecks(model, 4)
    optimizer = MaskedAdamW(adapter_groups(model), lr=1e-2, importance=D3(), selection=Static(30))
    train(model, optimizer, steps=1)
    zero_inactive_(model, optimizer.active_entries())
    train(model, optimizer, steps=2)
    nonzero = sum(int(param.count_nonzero()) for param in adapter_parameters(model).values())
    assert nonzero <= 30

"""Several deltas over one base: names, ties, heads, bases, and what cannot be merged."""

from __future__ import annotations

import json
import math

import pytest
import torch
from delta_cases import assert_identical, clone, example_base, example_delta, tied_pair
from safetensors.torch import save_file
from torch import nn

from sparse_optim.delta import (
    Delta,
    DeltaError,
    SparseValues,
    apply_delta,
    conflicts,
    content_fingerprint,
    folder_tensors,
    increment,
    merge,
    merge_deltas,
    merge_folder,
)
from sparse_optim.delta._fingerprint import fingerprint

pytestmark = pytest.mark.usefixtures("one_thread")


def delta_at(base, **changes):
    """A delta from {name with _ for .: {position: value}}."""
    tuned = clone(base)
    for name, entries in changes.items():
        flat = tuned[name.replace("_", ".")].view(-1)
        for position, value in entries.items():
            flat[position] = value
    return Delta.from_models(base, tuned)


def headed(delta, **dense):
    return Delta(delta.sparse, dense=dense, fingerprints=delta.fingerprints)


def write_folder(folder, tensors, shards=1):
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    files = [f"model-{at + 1:05}-of-{shards:05}.safetensors" for at in range(shards)]
    where = {name: files[at % shards] for at, name in enumerate(tensors)}
    for file in files:
        save_file({name: tensors[name] for name in tensors if where[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    return folder


def test_every_kind_of_base_gives_the_same(tmp_path):
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 3))
    base = clone(model.state_dict())
    tuned = [{n: t + (torch.rand_like(t) < 0.2) for n, t in base.items()} for _ in range(2)]
    deltas = [Delta.from_models(base, state, store_original=True) for state in tuned]
    folder = write_folder(tmp_path / "base", base, shards=2)
    bases = (None, base, model, folder, str(folder))
    found = {content_fingerprint(merge_deltas(deltas, each)) for each in bases}
    assert len(found) == 1


@pytest.mark.parametrize("prefixes", [("bert.", "bert."), ("bert.", ""), ("", "module.")])
def test_names_may_differ(tmp_path, prefixes):
    base = example_base(torch.float32)
    deltas = []
    for at, prefix in enumerate(prefixes):
        named = {prefix + name: tensor for name, tensor in base.items()}
        tuned = clone(named)
        tuned[prefix + "a.weight"].view(-1)[at] += 1
        tuned[prefix + "c.bias"][at] += 1
        deltas.append(Delta.from_models(named, tuned))
    expected = clone(base)
    for at in range(2):
        expected["a.weight"].view(-1)[at] += 1
        expected["c.bias"][at] += 1
    for each in (base, write_folder(tmp_path / "base", base, shards=2)):
        merged = merge_deltas(deltas, each)
        assert merged.num_entries == 4
        assert_identical(merge(merged, base), expected)


def test_a_head_on_a_bare_encoder_keeps_the_models_names(tmp_path):
    base = example_base(torch.float32)
    named = {"bert." + name: tensor for name, tensor in base.items()}
    deltas = [
        headed(delta_at(named, bert_c_bias={0: 1.0}), **{"classifier.weight": torch.ones(2, 3)}),
        delta_at(named, bert_c_bias={1: 2.0}),
    ]
    merged = merge_deltas(deltas, write_folder(tmp_path / "base", base))
    assert list(merged.sparse) == ["bert.c.bias"]
    assert list(merged.dense) == ["classifier.weight"]


@pytest.mark.parametrize("swap", [False, True])
def test_a_tied_tensor_has_one_name(swap):
    base, tuned = tied_pair()
    known = Delta.from_models(base, tuned)  # tied: output.weight is embedding.weight
    assert known.tied == {"output.weight": "embedding.weight"}
    plain = clone(base.state_dict())
    other = {"output.weight": plain["output.weight"].clone()}
    other["output.weight"][5] += 1
    unaware = Delta.from_models(plain, other)
    deltas = [unaware, known] if swap else [known, unaware]
    merged = merge_deltas(deltas, base)
    assert merged.tied == {"output.weight": "embedding.weight"}
    assert "output.weight" not in merged.sparse
    apply_delta(base, merged)
    assert base.output.weight is base.embedding.weight
    assert torch.equal(base.embedding.weight[3], tuned.embedding.weight[3])
    assert torch.equal(base.embedding.weight[5], other["output.weight"][5])


def test_tensors_that_one_delta_changed_apart_are_not_tied_any_more():
    base = {"a": torch.zeros(4), "b": torch.zeros(4)}
    apart = delta_at(base, a={0: 1.0}, b={1: 2.0})
    values = delta_at(base, a={2: 3.0})
    together = Delta(values.sparse, fingerprints=values.fingerprints, tied={"b": "a"})
    merged = merge_deltas([apart, together], base)
    assert not merged.tied
    found = merge(merged, base)
    assert found["a"].tolist() == [1.0, 0.0, 3.0, 0.0]
    assert found["b"].tolist() == [0.0, 2.0, 3.0, 0.0]


def test_whole_tensors_that_the_base_has_are_merged_like_others():
    base = {"w": torch.zeros(4, 2), "b": torch.ones(3)}
    one = Delta.from_models(base, {"w": base["w"] + 1, "b": torch.tensor([1.0, 3.0, 1.0])}, True)
    two = Delta.from_models(base, {"w": base["w"], "b": base["b"] + 0.5}, True)
    assert set(one.dense) == {"w"}
    assert set(two.dense) == {"b"}
    for given in (base, None):
        merged = merge_deltas([one, two], given, weights=[0.5, 2.0])
        assert not merged.dense
        found = merge(merged, base)
        assert torch.equal(found["w"], torch.full((4, 2), 0.5))
        assert found["b"].tolist() == [2.0, 3.0, 2.0]


def test_heads_are_kept_where_they_agree_and_chosen_where_not():
    base = {"w": torch.zeros(4)}
    first, second, third = (delta_at(base, w={at: 1.0}) for at in range(3))
    one = headed(first, head=torch.ones(2, 3), other=torch.ones(1))
    same = headed(second, head=torch.ones(2, 3))
    wider = headed(third, head=torch.ones(5, 3))
    agreed = merge_deltas([one, same], base)
    assert_identical(dict(agreed.dense), dict(one.dense))
    with pytest.raises(DeltaError, match=r"'head': .*deltas\[2\].*--dense in `sparse-optim merge`"):
        merge_deltas([one, same, wider], base)
    for index, shape in ((0, (2, 3)), (2, (5, 3))):
        chosen = merge_deltas([one, same, wider], base, dense=index)
        assert chosen.dense["head"].shape == shape
        assert chosen.dense["other"].tolist() == [1.0]
        assert chosen.num_entries == 3
    headless = merge_deltas([one, first], base)
    assert headless.dense["head"].shape == (2, 3)
    with pytest.raises(DeltaError, match="'head'"):
        merge_deltas([one, wider, first], base, dense=2)
    with pytest.raises(DeltaError, match="dense: expected an index below 2, got 2"):
        merge_deltas([one, same], base, dense=2)


def test_the_note_of_the_model_is_kept_where_it_is_clear():
    base = {"w": torch.zeros(4)}
    part = delta_at(base, w={0: 1.0})

    def noted(**model):
        method = {"name": "id3", "model": model} if model else {"name": "id3"}
        return Delta(part.sparse, fingerprints=part.fingerprints, method=method)

    a, b, none = noted(task="a"), noted(task="b"), noted()
    assert merge_deltas([a, a], base).method["model"] == {"task": "a"}
    assert "model" not in merge_deltas([a, b], base).method
    assert "model" not in merge_deltas([none, a], base).method
    assert merge_deltas([a, b], base, dense=1).method["model"] == {"task": "b"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "mean"}, "expected one of sum, ties, dare, dare-ties, got 'mean'"),
        ({"density": 0.5}, "sum keeps all entries"),
        ({"method": "ties", "density": 0.0}, "expected above 0 and up to 1, got 0.0"),
        ({"method": "ties", "density": math.nan}, "expected above 0 and up to 1, got nan"),
        ({"method": "dare", "density": 1.5}, "up to 1, got 1.5"),
        ({"method": "dare"}, "dare needs the share of entries that stays"),
        ({"method": "ties", "seed": 1}, "ties draws no random numbers"),
        ({"weights": [1.0]}, "weights: expected 2, one for each delta, got 1"),
        ({"weights": [1.0, math.inf]}, "weights: expected finite numbers"),
        ({"weights": [1e30, 1.0]}, r"'a.weight': the result overflows torch.bfloat16"),
        ({"base": None}, r"deltas\[.\] stores no originals of 'a.weight': give the base"),
    ],
)
def test_what_cannot_be_merged(arguments, message):
    base = example_base()
    deltas = [delta_at(base, a_weight={0: 1e10}), delta_at(base, a_weight={1: 2.0})]
    with pytest.raises(DeltaError, match=message):
        merge_deltas(deltas, **{"base": base, **arguments})


def test_a_result_that_is_no_number_is_refused():
    base = example_base()
    deltas = [delta_at(base, a_weight={0: value}) for value in (1e10, 2e10)]
    with pytest.raises(DeltaError, match=r"'a.weight': the result overflows torch.bfloat16"):
        merge_deltas(deltas, base, weights=[1e308, -1e308])  # inf - inf


def test_no_deltas_and_increments_are_refused():
    base = example_base()
    whole = example_delta(base)
    with pytest.raises(DeltaError, match="expected at least one, got none"):
        merge_deltas([], base)
    step = increment(whole, whole.prefix(3))
    with pytest.raises(DeltaError, match=r"deltas\[1\]: an increment: compose it"):
        merge_deltas([whole, step], base)


def test_another_base_is_refused(tmp_path):
    base = example_base()
    other = clone(base)
    other["c.bias"][0] += 1
    first, second = delta_at(base, c_bias={1: 9.0}), delta_at(other, c_bias={2: 9.0})
    for given in (other, write_folder(tmp_path / "other", other)):
        with pytest.raises(DeltaError, match=r"not the base of this delta: .* 'c.bias'"):
            merge_deltas([first], given)
    with pytest.raises(DeltaError, match=r"'c.bias' has another base fingerprint"):
        merge_deltas([first, second], base)
    with pytest.raises(DeltaError, match="load the class of model that was fine-tuned"):
        merge_deltas([first], {"z": torch.zeros(3)})
    with pytest.raises(DeltaError, match="expected a local model folder"):
        merge_deltas([first], tmp_path / "none")
    with pytest.raises(DeltaError, match=r"'c.bias': the delta is for torch.bfloat16, the model"):
        merge_deltas([first], {name: tensor.float() for name, tensor in base.items()})
    whole = {"c.bias": base["c.bias"] + 1}
    stored = Delta({}, dense=whole, dense_original={"c.bias": base["c.bias"]})
    with pytest.raises(DeltaError, match=r"'c.bias' was not fine-tuned from the given base"):
        merge_deltas([stored], other)


def test_entries_without_arithmetic_are_refused():
    integers = {"w": torch.arange(9)}
    with pytest.raises(DeltaError, match=r"'w' is torch.int64, which has no task vector"):
        merge_deltas([delta_at(integers, w={0: 5})], integers)
    base = {"v": torch.zeros(9), "w": torch.zeros(9)}
    for wrong in (math.nan, math.inf):
        delta = delta_at(base, v={1: 1.0}, w={3: 1.0, 4: wrong})
        with pytest.raises(DeltaError, match="'w': NaN or infinite at position 4"):
            merge_deltas([delta], base)


def test_deltas_of_different_models_are_refused():
    base = {"w": torch.zeros(6)}
    one = delta_at(base, w={0: 1.0})
    values = SparseValues(
        (2, 3), torch.float32, torch.tensor([1]), torch.ones(1), None, torch.zeros(1)
    )
    other = Delta({"w": values}, fingerprints={"w": fingerprint(base["w"])})
    with pytest.raises(DeltaError, match=r"the delta is for shape|of different models"):
        merge_deltas([one, other], base)
    replaced = Delta({}, dense={"w": torch.zeros(8)})
    with pytest.raises(DeltaError, match="'w': a delta changes entries of it"):
        merge_deltas([one, replaced], base)


def test_empty_deltas_merge_to_an_empty_one():
    base = example_base()
    empty = Delta.from_models(base, base)
    assert merge_deltas([empty, empty], base).num_entries == 0
    assert merge_deltas([empty]).num_entries == 0
    one = delta_at(base, c_bias={2: 4.0})
    for method in ("sum", "ties"):
        merged = merge_deltas([empty, one, empty], base, method=method)
        assert_identical(merge(merged, base), merge(one, base))


def test_conflicts_by_parameter_and_in_all():
    base = {"v": torch.zeros(16), "w": torch.ones(16)}
    one = delta_at(base, v={0: 1.0, 1: 1.0, 2: 2.0}, w={0: 3.0})
    two = delta_at(base, v={1: -1.0, 2: 1.0, 3: 1.0, 4: 1.0, 5: 5.0})
    far = delta_at(base, w={7: 0.0})
    first, second, third = conflicts([one, headed(two, head=torch.ones(1)), far], base)
    assert [(each.a, each.b) for each in (first, second, third)] == [(0, 1), (0, 2), (1, 2)]
    assert (first.total.entries_a, first.total.entries_b) == (4, 5)
    assert (first.total.both, first.total.opposite) == (2, 1)
    assert first.total.overlap == 0.5
    assert first.total.opposite_share == 0.5
    norms = math.sqrt(1 + 1 + 4 + 4) * math.sqrt(1 + 1 + 1 + 1 + 25)
    assert first.total.cosine == pytest.approx(1 / norms, rel=1e-12)
    ((name, part),) = first.parameters.items()
    assert (name, part.both, part.entries_a) == ("v", 2, 3)
    assert part.cosine == pytest.approx(1 / (math.sqrt(6) * math.sqrt(29)), rel=1e-12)
    assert (second.total.both, second.total.overlap, second.total.cosine) == (0, 0.0, 0.0)
    assert not second.parameters
    (same,) = conflicts([one, one], base)
    assert (same.total.cosine, same.total.overlap, same.total.opposite_share) == (1.0, 1.0, 0.0)
    with pytest.raises(DeltaError, match="at least two"):
        conflicts([one], base)
    empty = Delta.from_models(base, base)
    assert conflicts([one, empty], base)[0].total.overlap == 0.0


def test_a_merged_delta_goes_into_a_folder_with_several_shards(tmp_path):
    base = {f"layer.{at}": torch.randn(4, 3) for at in range(5)}
    folder = write_folder(tmp_path / "base", base, shards=3)
    tuned = [{n: t + (torch.rand_like(t) < 0.2) for n, t in base.items()} for _ in range(2)]
    merged = merge_deltas([Delta.from_models(base, state) for state in tuned], folder)
    merge_folder(folder, merged, tmp_path / "out")
    found = folder_tensors(tmp_path / "out")
    assert_identical({name: found[name] for name in base}, merge(merged, base))

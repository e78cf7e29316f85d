"""Names that differ between a delta and its base: wrappers, prefixes, tied tensors, buffers."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from delta_cases import assert_identical, example_base, example_delta, tied_pair, with_head
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from training import give_grads

from sparse_optim import IncrementalMaskedAdamW
from sparse_optim.delta import (
    Delta,
    DeltaError,
    DeltaSwitcher,
    apply_delta,
    folder_tensors,
    load_delta,
    merge,
    merge_folder,
    revert_delta,
    save_delta,
)
from sparse_optim.delta._wrappers import plain_names


def build(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 3))


def checkpointed(net: nn.Sequential) -> nn.Sequential:
    net[0] = checkpoint_wrapper(net[0])
    return net


WRAPPERS: dict[str, Callable[[nn.Sequential], nn.Module]] = {
    "none": lambda net: net,
    "torch.compile": lambda net: torch.compile(net, backend="eager"),
    "DataParallel": nn.DataParallel,
    "compiled, then DataParallel": lambda net: nn.DataParallel(torch.compile(net, backend="eager")),
    "DataParallel, then compiled": lambda net: torch.compile(nn.DataParallel(net), backend="eager"),
    "checkpoint_wrapper": checkpointed,
}


def train(model: nn.Module, named: bool) -> IncrementalMaskedAdamW:
    params = model.named_parameters() if named else list(model.parameters())
    optimizer = IncrementalMaskedAdamW(params, lr=0.1, budget=30, total_steps=2, unmask_steps=1.0)
    for step in range(2):
        give_grads(list(model.parameters()), "normal", torch.Generator().manual_seed(step))
        optimizer.step()
    for name, buffer in model.named_buffers():
        buffer.fill_(7 if name.endswith("tracked") else 0.25)
    return optimizer


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("onto", WRAPPERS)
@pytest.mark.parametrize("of", WRAPPERS)
def test_a_delta_of_one_wrapper_serves_every_other(of, onto, tmp_path):
    """Built from the wrapper's names; written, read, applied, switched, reverted, merged."""
    net = build()
    model = WRAPPERS[of](net)
    optimizer = train(model, named=True)
    tuned = {plain_names(net.state_dict())[name]: value for name, value in state(net).items()}
    save_delta(optimizer.delta(model), tmp_path / "delta.safetensors")
    delta = load_delta(tmp_path / "delta.safetensors")
    assert set(delta.sparse) | set(delta.dense) <= set(tuned)
    inner = build()
    target = WRAPPERS[onto](inner)
    before = state(inner)
    with apply_delta(target, delta) as handle:
        assert_identical_values(state(inner), tuned)
        assert handle.skipped == ()
    assert_identical_values(state(inner), before)
    tasks = DeltaSwitcher(target, {"task": delta})
    tasks.use("task")
    assert_identical_values(state(inner), tuned)
    tasks.use(None)
    assert_identical_values(merge(delta, target.state_dict()), tuned)
    assert_identical_values(state(inner), before)
    found = Delta.from_models(target, model, store_original=True)
    apply_delta(inner, found)
    revert_delta(target, found)
    assert_identical_values(state(inner), before)


def assert_identical_values(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Equal bits under names that differ by wrappers alone."""
    plain = plain_names(got)
    assert {plain[name] for name in got} == set(expected)
    for name, value in got.items():
        assert torch.equal(value, expected[plain[name]]), name


@pytest.mark.parametrize("kind", WRAPPERS)
def test_names_alone_suffice_for_parameters(kind):
    """Without a model there are no buffers, and the names of its wrapper come off."""
    net = build()
    delta = train(WRAPPERS[kind](net), named=True).delta()
    plain = build()
    apply_delta(plain, delta)
    for got, expected in zip(plain.parameters(), net.parameters(), strict=True):
        assert torch.equal(got, expected)


def test_a_child_called_module_keeps_its_name():
    net = nn.ModuleDict({"module": nn.Linear(8, 3), "head": nn.Linear(3, 4)})
    optimizer = train(net, named=True)
    assert set(optimizer.delta(net).sparse) <= set(net.state_dict())
    with pytest.raises(DeltaError, match=r"not in the (model|base)"):
        apply_delta(nn.Linear(8, 3), optimizer.delta(net))


@given(st.lists(st.sampled_from(["a", "module", "_orig_mod", "b"]), min_size=1, max_size=4))
def test_plain_names_never_merge_two(parts):
    names = {".".join(parts[:end]) for end in range(1, len(parts) + 1)}
    names |= {"module." + name for name in names}
    plain = plain_names(names)
    assert plain.keys() == names
    assert len(set(plain.values())) == len(names)
    assert all(plain.values())


def prefixed(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {prefix + name: tensor.clone() for name, tensor in tensors.items()}


def test_a_bare_backbone_takes_its_part():
    """`strict=False` left the encoder as it was and said nothing."""
    base = prefixed(example_base(), "bert.")
    delta = example_delta(base)
    bare = prefixed(example_base(), "")
    with pytest.raises(DeltaError, match=r"1 of the delta's 4 tensors.*'head\.weight'"):
        apply_delta(bare, delta)
    handle = apply_delta(bare, delta, strict=False)
    assert handle.skipped == ("head.weight",)
    expected = merge(delta, base)
    assert_identical(bare, {name: expected["bert." + name] for name in bare})
    revert_delta(bare, delta, strict=False)
    assert_identical(bare, example_base())


def test_a_model_with_a_prefix_takes_a_backbones_delta():
    delta = example_delta(example_base())
    model = prefixed(with_head(example_base()), "encoder.")
    apply_delta(model, delta)
    assert_identical(model, prefixed(merge(delta, with_head(example_base())), "encoder."))


@pytest.mark.parametrize("strict", [True, False])
def test_nothing_to_apply_is_an_error(strict):
    model = {"other.weight": torch.zeros(3), "x.weight": torch.zeros(3)}
    with pytest.raises(DeltaError, match=r"first is 'a\.weight'"):
        apply_delta(model, example_delta(example_base()), strict=strict)
    heads = Delta(sparse={}, dense={"head.weight": torch.zeros(2)})
    with pytest.raises(DeltaError, match=r"first is 'head\.weight'"):
        apply_delta(model, heads, strict=strict)


def test_two_prefixes_that_fit_are_refused():
    model = prefixed(example_base(), "a.") | prefixed(example_base(), "b.")
    with pytest.raises(DeltaError, match="fit in several ways"):
        apply_delta(model | {"head.weight": torch.zeros(2, 4)}, example_delta(example_base()))


def tied_delta(**options: Any) -> tuple[nn.Module, nn.Module, Delta]:
    """A base and what it became with its tied weight trained, and the delta."""
    base, _ = tied_pair()
    tuned = copy.deepcopy(base)
    optimizer = train(tuned, named=True)
    return base, tuned, optimizer.delta(tuned, **options)


def test_tied_names_are_in_the_file_and_in_its_hash(tmp_path):
    base, tuned, delta = tied_delta()
    assert dict(delta.tied) == {"output.weight": "embedding.weight"}
    save_delta(delta, tmp_path / "delta.safetensors")
    assert load_delta(tmp_path / "delta.safetensors").tied == delta.tied
    with pytest.raises(DeltaError, match="tied 'x': 'y' is not in sparse or dense"):
        Delta(sparse={}, tied={"x": "y"})
    assert Delta.from_models(base, tuned).tied == delta.tied


def folder_with_copies(base: nn.Module, folder: Path, shards: int, config: dict[str, Any]) -> Path:
    """A model folder whose files hold both copies of the tied weight."""
    folder.mkdir()
    tensors = {name: value.clone() for name, value in base.state_dict().items()}
    (folder / "config.json").write_text(json.dumps(config))
    if shards == 1:
        save_file(tensors, folder / "model.safetensors")
        return folder
    where = {name: f"{int(name == 'output.weight')}.safetensors" for name in tensors}
    for file in set(where.values()):
        part = {name: value for name, value in tensors.items() if where[name] == file}
        save_file(part, folder / file)
    index = {"metadata": {}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize("known", [True, False], ids=["tied in the delta", "tied by config"])
def test_both_copies_of_a_tied_weight_follow(known, shards, tmp_path):
    """Also where the two are in different files."""
    base, tuned, delta = tied_delta()
    if not known:
        delta = Delta(delta.sparse, delta.dense, delta.fingerprints, delta.method)
    folder = folder_with_copies(base, tmp_path / "base", shards, {"vocab_size": 30})
    merge_folder(folder, delta, tmp_path / "merged")
    found = folder_tensors(tmp_path / "merged")
    assert found.keys() == tuned.state_dict().keys()
    for name, value in tuned.state_dict().items():
        assert torch.equal(found[name], value), name


def test_copies_that_are_not_tied_stay_apart(tmp_path):
    """config.json says so; the delta knows of no tie."""
    base, _, delta = tied_delta()
    delta = Delta(delta.sparse, delta.dense, delta.fingerprints, delta.method)
    config = {"vocab_size": 30, "tie_word_embeddings": False}
    folder = folder_with_copies(base, tmp_path / "base", 1, config)
    merge_folder(folder, delta, tmp_path / "merged")
    found = folder_tensors(tmp_path / "merged")["output.weight"]
    assert torch.equal(found, base.state_dict()["output.weight"])


def test_a_live_model_with_two_copies_follows_or_is_refused():
    base, tuned, delta = tied_delta()
    apart = copy.deepcopy(base)
    apart.output.weight = nn.Parameter(apart.embedding.weight.detach().clone())
    before = state(apart)
    handle = apply_delta(apart, delta)
    assert_identical_values(state(apart), tuned.state_dict())
    handle.revert()
    assert_identical_values(state(apart), before)
    assert_identical_values(merge(delta, before), tuned.state_dict())
    with torch.no_grad():
        apart.output.weight[0] += 1
    with pytest.raises(DeltaError, match=r"not the base of this delta.*'output\.weight'"):
        apply_delta(apart, delta)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_delta_in_another_dtype_serves_the_converted_base(dtype, tmp_path):
    """Trained in float32, served in bfloat16: the rounded tuned model, bit for bit."""
    base, tuned, delta = tied_delta()
    served = copy.deepcopy(base).to(dtype)
    with pytest.raises(DeltaError, match=rf"delta\.to\({dtype}, base="):
        apply_delta(served, delta)
    save_delta(delta.to(dtype, base), tmp_path / "delta.safetensors")
    apply_delta(served, load_delta(tmp_path / "delta.safetensors"))
    assert_identical_values(state(served), tuned.to(dtype).state_dict())
    with pytest.raises(DeltaError, match="is not what was fine-tuned"):
        delta.to(dtype, tuned)


def test_buffers_that_training_moves_are_stored():
    """Base + delta was not the trained model where it had running statistics."""
    net = build()
    net.register_buffer("mask", torch.ones(4096, dtype=torch.bool))
    net.register_buffer("scratch", torch.ones(3), persistent=False)
    delta = train(net, named=True).delta(net)
    assert set(delta.dense) == {"1.running_mean", "1.running_var", "1.num_batches_tracked"}


def test_dense_tensors_alone_find_their_names_too(tmp_path):
    """They were added beside the base's own, which stayed as they were."""
    base = prefixed(example_base(), "bert.") | {"cls.bias": torch.zeros(2)}
    delta = Delta(sparse={}, dense={name: value + 1 for name, value in example_base().items()})
    merged = merge(delta, base)
    assert merged.keys() == base.keys()
    for name, value in example_base().items():
        assert torch.equal(merged["bert." + name], value + 1)
    heads = Delta(sparse={}, dense={"head.weight": torch.zeros(2)})
    assert merge(heads, base).keys() == base.keys() | {"head.weight"}
    twice = {"a.dense.weight": torch.zeros(2), "b.dense.weight": torch.zeros(2)}
    head = Delta(sparse={}, dense={"dense.weight": torch.ones(2)})  # fits in several ways: new
    assert merge(head, twice).keys() == twice.keys() | {"dense.weight"}


def test_a_base_under_a_wrapper_gets_new_tensors_under_it():
    base = prefixed(example_base(), "module.")
    delta = example_delta(example_base())
    assert merge(delta, base).keys() == {*base, "module.head.weight"}


def test_a_base_that_has_the_tied_name_alone():
    """As a file of safetensors' save_model, which keeps one of the two."""
    base, tuned, delta = tied_delta()
    tensors = state(base)
    del tensors["embedding.weight"]
    merged = merge(delta, tensors)
    assert torch.equal(merged["output.weight"], tuned.embedding.weight)
    assert "embedding.weight" not in merged
    converted = delta.to(torch.bfloat16, tensors)
    assert converted.sparse["embedding.weight"].dtype == torch.bfloat16


def test_a_tie_that_fits_two_tensors_is_refused():
    values, print_of = example_delta({"emb.weight": torch.ones(8, 6)}), torch.ones(8, 6)
    delta = Delta(values.sparse, {}, values.fingerprints, tied={"head.weight": "emb.weight"})
    base = {name: print_of.clone() for name in ("model.emb.weight", "head.weight")}
    merged = merge(delta, base)
    assert torch.equal(merged["head.weight"], merged["model.emb.weight"])
    with pytest.raises(DeltaError, match=r"the base has head\.weight and model\.head\.weight"):
        merge(delta, base | {"model.head.weight": torch.zeros(8, 6)})


def test_a_dense_tied_tensor_leaves_what_is_no_copy():
    delta = Delta(sparse={}, dense={"emb.weight": torch.ones(8, 4)}, tied={"head.w": "emb.weight"})
    zeros = torch.zeros(8, 4)
    merged = merge(delta, {"emb.weight": zeros, "head.w": zeros.clone()})
    assert torch.equal(merged["head.w"], torch.ones(8, 4))
    for other in (torch.full((3, 3), 5.0), torch.full((8, 4), 5.0)):
        assert torch.equal(merge(delta, {"emb.weight": zeros, "head.w": other})["head.w"], other)
        model = {"emb.weight": zeros.clone(), "head.w": other.clone()}
        apply_delta(model, delta)
        assert torch.equal(model["head.w"], other)


class NamedModule(nn.Module):
    """Its only child beside a tied head is called as DDP's."""

    def __init__(self):
        super().__init__()
        self.module = nn.Embedding(9, 4)
        self.head = nn.Linear(4, 9, bias=False)
        self.head.weight = self.module.weight


def test_names_of_tied_parameters_are_stripped_alike():
    net = NamedModule()
    base = copy.deepcopy(net)
    delta = train(net, named=True).delta(net)
    assert set(delta.sparse) == {"module.weight"}
    apply_delta(base, delta)
    assert torch.equal(base.head.weight, net.head.weight)


@pytest.mark.parametrize("tied", [{"b": ["a"]}, {"b": 3}, {"": "a"}])
def test_odd_ties_are_refused(tied):
    with pytest.raises(DeltaError, match="parameter name"):
        Delta(sparse={}, dense={"a": torch.zeros(1)}, tied=tied)


def test_conversion_needs_a_dtype_of_floats_and_all_names():
    base, _, delta = tied_delta()
    with pytest.raises(DeltaError, match=r"expected a floating-point dtype, got torch\.int8"):
        delta.to(torch.int8, base)
    with pytest.raises(DeltaError, match="is not in the given base"):
        delta.to(torch.float16, {"other": torch.zeros(3)})
    named = {f"module.{name}": value for name, value in state(base).items()}
    assert delta.to(torch.float16, named).sparse.keys() == delta.sparse.keys()

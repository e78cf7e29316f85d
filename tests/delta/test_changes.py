"""`tensor_changes` and `compare_deltas`, against sums over whole tensors."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace

import pytest
import torch
from delta_cases import example_base, example_delta, models
from hypothesis import given
from hypothesis import strategies as st

from sparse_optim.delta import (
    Agreement,
    Change,
    Common,
    Delta,
    DeltaError,
    compare_deltas,
    conflicts,
    increment,
    tensor_changes,
)
from sparse_optim.delta._tensors import bits


@given(models(), st.booleans())
def test_entries_are_counted_as_between_the_models(pair, originals):
    base, tuned = pair
    delta = Delta.from_models(base, tuned, store_original=originals)
    found = tensor_changes(delta)
    assert list(found) == [*delta.sparse, *delta.dense]
    for name, change in found.items():
        differ = int((bits(base[name]) != bits(tuned[name])).sum())
        whole = name in delta.dense and not originals
        assert change == Change(tuned[name].numel() if whole else differ, tuned[name].numel())


def finite_models(seed: int, dtype: torch.dtype) -> list[dict[str, torch.Tensor]]:
    """A base and two tuned models; in "c" more changes than a delta stores as entries."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"a.0.weight": (7, 9), "a.1.weight": (40, 3), "b": (12,), "c": (8, 8), "same": (3,)}
    base = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    shares = {"a.0.weight": 0.3, "a.1.weight": 0.1, "b": 0.2, "c": 0.95, "same": 0.0}
    tuned = [
        {
            name: torch.where(
                torch.rand(tensor.shape, generator=generator) < shares[name],
                tensor + torch.randn(tensor.shape, generator=generator),
                tensor,
            )
            for name, tensor in base.items()
        }
        for _ in range(2)
    ]
    return [{name: t.to(dtype) for name, t in model.items()} for model in (base, *tuned)]


@pytest.mark.parametrize("given_base", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sizes_are_norms_over_the_changed_entries(dtype, given_base):
    base, tuned, _ = finite_models(1, dtype)
    delta = Delta.from_models(base, tuned, store_original=not given_base)
    delta = replace(delta, dense={**delta.dense, "head": torch.ones(4)})
    found = tensor_changes(delta, base if given_base else None, sizes=True)
    assert found.pop("head") == Change(4, 4)
    assert found.keys() == {"a.0.weight", "a.1.weight", "b", "c"}
    for name, change in found.items():
        before, after = base[name].double(), tuned[name].double()
        differ = before != after
        assert change.entries == int(differ.sum()) > 0
        assert change.share == change.entries / before.numel()
        expected = (after - before)[differ].norm() / before[differ].norm()
        assert change.relative == pytest.approx(float(expected), rel=1e-12)


def test_changes_add_up():
    some, more = Change(2, 10, (9.0, 1.0)), Change(1, 10, (7.0, 3.0))
    assert some + more == Change(3, 20, (16.0, 4.0))
    assert (some + more).relative == 2.0
    assert some + Change(0, 5) == Change(2, 15, (9.0, 1.0))  # nothing there to be measured
    assert some + Change(1, 5) == Change(3, 15)
    assert (some + Change(1, 5)).relative is None
    assert Change(1, 4, (1.0, 0.0)).relative == math.inf
    assert Change(1, 4, (0.0, 0.0)).relative == 0.0
    assert Change(0, 0).share == 0.0


def test_sizes_need_the_base():
    base = example_base()
    delta = example_delta(base)
    bare = replace(
        delta, sparse={n: replace(each, original=None) for n, each in delta.sparse.items()}
    )
    with pytest.raises(DeltaError, match=r"the delta stores no originals of 'a\.weight'"):
        tensor_changes(bare, sizes=True)
    assert tensor_changes(bare, base, sizes=True) == tensor_changes(delta, sizes=True)
    other = {name: tensor + 1 for name, tensor in base.items()}
    with pytest.raises(DeltaError, match=r"'a\.weight'"):
        tensor_changes(bare, other, sizes=True)
    grown = increment(delta, example_delta(base, seed=3))
    found = tensor_changes(grown)
    assert {name: found[name].entries for name in grown.sparse} == {
        name: values.num_entries for name, values in grown.sparse.items()
    }
    with pytest.raises(DeltaError, match="the delta: an increment"):
        tensor_changes(grown, sizes=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("group", [str, lambda name: name[0]])
def test_comparison_equals_that_of_whole_tensors(dtype, group):
    base, *tuned = finite_models(2, dtype)
    deltas = [Delta.from_models(base, model) for model in tuned]
    found = compare_deltas(*deltas, base, group=group)
    taus: dict[str, list[torch.Tensor]] = {}
    expected = Counter()
    for name in base:
        tau = [(model[name].double() - base[name].double()).flatten() for model in tuned]
        taus.setdefault(group(name), []).append(torch.stack(tau))
        counts = [int((each != 0).sum()) for each in tau]
        expected[group(name)] += counts[0] * counts[1] / base[name].numel()
    joined = {name: torch.cat(parts, dim=1) for name, parts in taus.items()}
    joined = {name: tau for name, tau in joined.items() if bool(tau.any())}
    assert found.parameters.keys() == joined.keys()
    everything = {None: torch.cat(list(joined.values()), dim=1)}
    expected[None] = sum(expected.values())
    for name, (first, second) in (joined | everything).items():
        part = found.total if name is None else found.parameters[name]
        both = (first != 0) & (second != 0)
        assert isinstance(part, Agreement)
        assert (part.entries_a, part.entries_b) == (
            int((first != 0).sum()),
            int((second != 0).sum()),
        )
        assert part.both == int(both.sum()) > 0
        assert part.opposite == int((first * second < 0).sum())
        assert part.jaccard == part.both / int(((first != 0) | (second != 0)).sum())
        assert part.expected == pytest.approx(expected[name], rel=1e-12)
        for cosine, where in ((part.cosine, slice(None)), (part.cosine_both, both)):
            a, b = first[where], second[where]
            assert cosine == pytest.approx(float(a @ b / (a.norm() * b.norm())), rel=1e-9)
    (pair,) = conflicts(deltas, base)
    assert pair.total == found.total


@given(models())
def test_without_a_base_entries_alone_are_counted(first):
    base, tuned = first
    other = {
        name: torch.where(
            torch.rand(tensor.shape, generator=torch.Generator().manual_seed(at)) < 0.5,
            bits(tensor),
            bits(tensor) ^ 1,
        ).view(tensor.dtype)
        for at, (name, tensor) in enumerate(base.items())
    }
    deltas = [Delta.from_models(base, model) for model in (tuned, other)]
    found = compare_deltas(*deltas)
    assert type(found.total) is Common
    for name, part in found.parameters.items():
        sets = [
            set(delta.sparse[name].position.tolist()) if name in delta.sparse else set()
            for delta in deltas
        ]
        counts = (len(sets[0]), len(sets[1]), len(sets[0] & sets[1]))
        assert (part.entries_a, part.entries_b, part.both) == counts
        assert part.expected == pytest.approx(counts[0] * counts[1] / base[name].numel())
    assert found.total.both == sum(part.both for part in found.parameters.values())
    assert found.total.entries_a == deltas[0].num_entries


def test_originals_stand_for_the_base():
    base, *tuned = finite_models(3, torch.float32)
    stored = [Delta.from_models(base, model, store_original=True) for model in tuned]
    bare = [Delta.from_models(base, model) for model in tuned]
    given, found = compare_deltas(*bare, base), compare_deltas(*stored)
    assert found.parameters == {n: part for n, part in given.parameters.items() if n != "c"}
    assert found.total.both == given.total.both - given.parameters["c"].both
    assert type(compare_deltas(stored[0], bare[1]).total) is Common
    elsewhere = Delta.from_models(
        base | {"b": base["b"] + 1}, tuned[1] | {"b": tuned[1]["b"] + 1}, store_original=True
    )
    assert type(compare_deltas(stored[0], elsewhere).total) is Common
    broken = tuned[1] | {"b": torch.where(tuned[1]["b"] > 1, torch.inf, base["b"])}
    broken = Delta.from_models(base, broken, store_original=True)
    assert type(compare_deltas(stored[0], broken).total) is Common
    with pytest.raises(DeltaError, match="a: an increment"):
        compare_deltas(increment(bare[0], bare[1]), bare[1])
    half = {name: tensor.half() for name, tensor in base.items()}
    changed = {name: tensor + 1 for name, tensor in half.items()}
    changed["a.0.weight"] = half["a.0.weight"].clone()
    changed["a.0.weight"][0, 0] += 1
    with pytest.raises(DeltaError, match=r"'a.0.weight'.*of different models"):
        compare_deltas(bare[0], Delta.from_models(half, changed))

"""Deltas in memory: checks, sizes, from two models, prefix."""

import pytest
import torch
from delta_cases import (
    assert_identical,
    clone,
    delta_of,
    example_base,
    example_delta,
    identical,
    integer_bits,
    models,
    sparse_values,
    with_head,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_optim.delta import (
    Delta,
    DeltaError,
    apply_delta,
    content_fingerprint,
    increment,
    merge,
)
from sparse_optim.delta._packing import packed_bytes

FAST = settings(max_examples=40, deadline=None)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"position": torch.tensor([3, 1])}, "ascending"),
        ({"position": torch.tensor([1, 1])}, "ascending"),
        ({"position": torch.tensor([-1, 1])}, "got -1"),
        ({"position": torch.tensor([1, 4])}, "position < 4, got 4"),
        ({"position": torch.tensor([1, 3], dtype=torch.int32)}, "position: expected int64"),
        ({"position": torch.tensor([[1, 3]])}, r"of shape \(1, 2\)"),
        ({"value": torch.ones(3)}, "value: expected"),
        ({"value": torch.ones(2).half()}, "got torch.float16"),
        ({"unmask_step": torch.ones(2)}, "unmask_step: expected torch.int32"),
        ({"unmask_step": torch.tensor([1, -1], dtype=torch.int32)}, "steps >= 0"),
        ({"original": torch.ones(1)}, "original: expected"),
        ({"shape": (-4,)}, "shape: expected"),
        ({"shape": (2**40, 2**40)}, "shape: expected at most"),
        ({"shape": (1,) * 65}, "shape: expected at most"),
        ({"dtype": torch.complex128}, "cannot hold torch.complex128"),
    ],
)
def test_sparse_values_are_checked(changes, message):
    with pytest.raises(DeltaError, match=message):
        sparse_values(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dense": {"x": torch.ones(1)}}, "in both"),
        ({"fingerprints": {}}, "'x' is in only one"),
        ({"fingerprints": {"x": "0" * 31}}, "hex digits"),
        ({"fingerprints": {"x": "G" * 32}}, "hex digits"),
        ({"dense_original": {"h": torch.ones(1)}}, "'h': expected a name that is in dense"),
        ({"dense": {"h": torch.ones(1)}, "dense_original": {"h": torch.ones(2)}}, "as in dense"),
        ({"dense": {"": torch.ones(1)}}, "parameter name"),
        ({"dense": {"a\nb": torch.ones(1)}}, "parameter name"),
        ({"method": {"lr": torch.ones(1)}}, "method: expected values that JSON can hold"),
        ({"parent": "xyz"}, "parent: expected 32"),
        ({"removed": {"x": torch.tensor([0])}}, "only an increment"),
        ({"removed": {"y": torch.tensor([0])}, "parent": "0" * 32}, "'y': expected a name"),
        ({"removed": {"x": torch.tensor([1])}, "parent": "0" * 32}, "both removed and changed"),
    ],
)
def test_deltas_are_checked(changes, message):
    arguments = {"sparse": {"x": sparse_values()}, "fingerprints": {"x": "0" * 32}}
    with pytest.raises(DeltaError, match=message):
        Delta(**(arguments | changes))


def test_a_delta_shares_no_memory_with_its_arguments():
    value, dense = torch.ones(2), {"h": torch.ones(3)}
    sparse, method = {"x": sparse_values(value=value)}, {"betas": [0.9, 0.99]}
    delta = Delta(sparse, dense, {"x": "0" * 32}, method)
    value.zero_()
    dense["h"].zero_()
    for argument in (sparse, dense, method["betas"]):
        argument.clear()
    assert delta.method == {"betas": [0.9, 0.99]}
    assert delta.sparse["x"].value.tolist() == [1, 1]
    assert delta.dense["h"].tolist() == [1, 1, 1]


def test_sizes():
    delta = example_delta(example_base())
    assert delta.num_entries == 18
    packed = sum(packed_bytes(6, numel) for numel in (48, 60, 7))
    assert delta.nbytes == 18 * (2 + 4 + 2) + packed + 2 * 4 * 4
    plain = sparse_values(dtype=torch.bfloat16, value=torch.ones(2).bfloat16())
    assert plain.nbytes == 2 * 2 + 1 + 1


@FAST
@given(models(), st.booleans())
def test_from_models_and_merge_give_the_tuned_model(pair, store_original):
    base, tuned = pair
    before = clone(base)
    delta = Delta.from_models(base, tuned, store_original)
    assert_identical(merge(delta, base), tuned)
    assert_identical(base, before)
    for name, values in delta.sparse.items():
        differ = integer_bits(base[name]) != integer_bits(tuned[name])
        assert torch.equal(values.position, differ.reshape(-1).nonzero().view(-1))
        assert (values.original is not None) == store_original
        kept = values.num_entries * (values.dtype.itemsize + 4)
        assert store_original or kept < tuned[name].nbytes
    for name in delta.dense:
        differ = int((integer_bits(base[name]) != integer_bits(tuned[name])).sum())
        width = base[name].dtype.itemsize
        assert (
            differ * (4 + (1 + store_original) * width) >= (1 + store_original) * base[name].nbytes
        )


@pytest.mark.parametrize(
    ("dtype", "numel", "dense_from"), [(torch.float32, 8, 4), (torch.bfloat16, 9, 3)]
)
def test_from_models_stores_whole_what_is_no_smaller_as_entries(dtype, numel, dense_from):
    base = {"x": torch.zeros(numel, dtype=dtype)}
    for changed in range(1, numel + 1):
        tuned = {"x": torch.zeros(numel, dtype=dtype)}
        tuned["x"][:changed] = 1
        assert list(Delta.from_models(base, tuned).dense) == ["x"] * (changed >= dense_from)


def test_from_models_tensors_in_one_model_only():
    base = {"x": torch.zeros(100), "dropped": torch.zeros(3), "head": torch.zeros(2, 5)}
    tuned = {"x": torch.zeros(100), "head": torch.ones(3, 5), "new": torch.ones(2)}
    tuned["x"][7] = -0.0
    delta = Delta.from_models(base, tuned)
    assert delta.sparse["x"].position.tolist() == [7]
    assert list(delta.dense) == ["head", "new"]
    merged = merge(delta, base)
    assert_identical(
        merged,
        {"x": tuned["x"], "dropped": base["dropped"]}
        | {"head": tuned["head"], "new": tuned["new"]},
    )


def test_from_models_refuses_another_dtype():
    with pytest.raises(DeltaError, match=r"'x': the base is torch.float32, the tuned model"):
        Delta.from_models({"x": torch.zeros(2)}, {"x": torch.zeros(2).half()})


@FAST
@given(st.integers(0, 20), st.integers(0, 20), st.integers(0, 1000))
def test_prefix_is_the_first_entries_and_nested(budget, smaller, seed):
    delta = example_delta(example_base(), seed=seed)
    ranked = sorted(
        (int(step), order, int(position), float(value))
        for order, values in enumerate(delta.sparse.values())
        for step, position, value in zip(
            values.unmask_step, values.position, values.value, strict=True
        )
    )
    prefix = delta.prefix(budget)
    kept = [
        (int(step), order, int(position), float(value))
        for order, values in enumerate(prefix.sparse.values())
        for step, position, value in zip(
            values.unmask_step, values.position, values.value, strict=True
        )
    ]
    assert sorted(kept) == ranked[:budget]
    assert prefix.num_entries == min(budget, 18)
    assert identical(prefix.dense["head.weight"], delta.dense["head.weight"])
    nested = prefix.prefix(min(smaller, budget))
    direct = delta.prefix(min(smaller, budget))
    assert content_fingerprint(nested) == content_fingerprint(direct)
    live = with_head(example_base())
    apply_delta(live, prefix).revert()
    assert_identical(live, with_head(example_base()))


def test_prefix_errors():
    delta = example_delta(example_base())
    with pytest.raises(DeltaError, match="expected >= 0, got -1"):
        delta.prefix(-1)
    with pytest.raises(DeltaError, match="compose it"):
        increment(delta, delta).prefix(1)
    with pytest.raises(DeltaError, match="'x': no unmask_step"):
        delta_of("x", sparse_values(), torch.zeros(4)).prefix(1)
    head = Delta(sparse={}, dense={"head": torch.ones(2)})
    assert head.prefix(3).dense["head"].tolist() == [1, 1]

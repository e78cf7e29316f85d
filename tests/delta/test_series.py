"""Increments over an earlier delta, and comparisons."""

from itertools import pairwise

import pytest
import torch
from delta_cases import example_base, example_delta, integer_bits, models
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_optim.delta import (
    Delta,
    DeltaError,
    SparseValues,
    compose,
    content_fingerprint,
    increment,
    load_delta,
    overlap,
    save_delta,
)

FAST = settings(max_examples=60, deadline=None)


def later(base, tuned, seed, share):
    """A later checkpoint: some entries moved on, some are back at the base's value."""
    generator = torch.Generator().manual_seed(seed)
    result = {}
    for name, tensor in tuned.items():
        moved = torch.rand(tensor.shape, generator=generator) < share
        back = torch.rand(tensor.shape, generator=generator) < share
        bits = torch.where(moved, integer_bits(tensor) ^ 1, integer_bits(tensor))
        result[name] = torch.where(back, integer_bits(base[name]), bits).view(tensor.dtype)
    return result


@FAST
@given(models(), st.integers(0, 1000), st.sampled_from([0.0, 0.05, 0.3, 1.0]), st.booleans())
def test_compose_undoes_increment(pair, seed, share, store_original):
    base, tuned = pair
    parent = Delta.from_models(base, tuned, store_original)
    delta = Delta.from_models(base, later(base, tuned, seed, share), store_original)
    step = increment(delta, parent)
    assert content_fingerprint(compose(parent, step)) == content_fingerprint(delta)
    for name, values in step.sparse.items():
        before = parent.sparse.get(name)
        if before is None:
            continue
        known = dict(zip(before.position.tolist(), integer_bits(before.value), strict=True))
        for position, value in zip(
            values.position.tolist(), integer_bits(values.value), strict=True
        ):
            assert known.get(position) != value


@st.composite
def delta_pairs(draw) -> tuple[Delta, Delta]:
    """Two deltas with some parameters in common, of several dtypes and with several columns."""
    found = []
    shapes = {name: draw(st.sampled_from([(5,), (3, 4), (), (0,), (40,)])) for name in "abcde"}
    dtypes = {name: draw(st.sampled_from([torch.float32, torch.bfloat16])) for name in "abcde"}
    columns = st.tuples(st.booleans(), st.booleans())
    alike = draw(columns)  # mostly the same ones, as in the deltas of one run
    for _ in range(2):
        sparse = {}
        for name in draw(st.permutations("abcde"))[: draw(st.integers(0, 5))]:
            numel = int(torch.tensor(shapes[name]).prod())
            position = sorted(draw(st.sets(st.integers(0, numel - 1)))) if numel else []
            small = st.lists(st.integers(0, 2), min_size=len(position), max_size=len(position))
            steps, originals = draw(st.one_of(st.just(alike), columns))
            sparse[name] = SparseValues(
                shapes[name],
                dtypes[name],
                torch.tensor(position, dtype=torch.int64),
                torch.tensor(draw(small), dtype=dtypes[name]),
                torch.tensor(draw(small), dtype=torch.int32) if steps else None,
                torch.tensor(draw(small), dtype=dtypes[name]) if originals else None,
            )
        found.append(Delta(sparse, fingerprints=dict.fromkeys(sparse, "0" * 32)))
    return found[0], found[1]


def entries_of(values: SparseValues) -> dict[int, tuple]:
    """position -> value, unmask step and original, by their bits."""
    columns = [integer_bits(values.value).tolist()]
    columns.append([None] * values.num_entries)
    if values.unmask_step is not None:
        columns[1] = values.unmask_step.tolist()
    columns.append([None] * values.num_entries)
    if values.original is not None:
        columns[2] = integer_bits(values.original).tolist()
    return dict(zip(values.position.tolist(), zip(*columns, strict=True), strict=True))


def layout(values: SparseValues) -> tuple[bool, bool]:
    return values.unmask_step is None, values.original is None


@settings(max_examples=300, deadline=None)
@given(delta_pairs())
def test_increments_entry_by_entry(pair):
    parent, delta = pair
    step = increment(delta, parent)
    assert list(step.sparse) == list(delta.sparse)
    for name, values in delta.sparse.items():
        found, now = step.sparse[name], entries_of(values)
        before = parent.sparse.get(name)
        then = {} if before is None else entries_of(before)
        assert (found.shape, found.dtype, layout(found)) == (
            values.shape, values.dtype, layout(values),
        )  # fmt: skip
        changed = {at: entry for at, entry in now.items() if then.get(at) != entry}
        alike = before is None or layout(before) == layout(values)
        assert entries_of(found) == (changed if alike else now)
        gone = sorted(then.keys() - now.keys())
        assert step.removed.get(name, torch.empty(0)).tolist() == gone
        assert (name in step.removed) == bool(gone)
    if all(
        name not in parent.sparse or layout(parent.sparse[name]) == layout(values)
        for name, values in delta.sparse.items()
    ):
        assert content_fingerprint(compose(parent, step)) == content_fingerprint(delta)


@settings(max_examples=200, deadline=None)
@given(delta_pairs(), st.integers(0, 60))
def test_prefixes_entry_by_entry(pair, budget):
    bare = [
        name for name, each in pair[0].sparse.items()
        if each.unmask_step is None and each.num_entries
    ]  # fmt: skip
    if bare:
        with pytest.raises(DeltaError, match=f"'{bare[0]}': no unmask_step was stored"):
            pair[0].prefix(budget)
        return
    found = pair[0].prefix(budget)
    order = sorted(
        (entry[1], number, at)
        for number, values in enumerate(pair[0].sparse.values())
        for at, entry in entries_of(values).items()
    )
    kept = {(number, at) for _, number, at in order[:budget]}
    assert list(found.sparse) == list(pair[0].sparse)
    for number, (name, values) in enumerate(pair[0].sparse.items()):
        expected = {at: e for at, e in entries_of(values).items() if (number, at) in kept}
        assert entries_of(found.sparse[name]) == expected
        assert layout(found.sparse[name]) == layout(values)


def test_a_delta_of_huge_parameters_is_composed():
    """Their flat positions together do not fit in int64."""
    shape, prints = (2**40, 2**22), dict.fromkeys("abc", "0" * 32)
    first, second = (
        Delta(
            {
                name: SparseValues(
                    shape,
                    torch.float32,
                    torch.tensor([0, 2**61, 2**62 - 1]),
                    torch.tensor([1.0, value, 3.0]),
                    torch.tensor([1, 3, 2], dtype=torch.int32),
                )
                for name in "abc"
            },
            fingerprints=prints,
        )
        for value in (2.0, 5.0)
    )
    step = increment(second, first)
    assert all(values.position.tolist() == [2**61] for values in step.sparse.values())
    assert content_fingerprint(compose(first, step)) == content_fingerprint(second)
    assert [each.num_entries for each in first.prefix(4).sparse.values()] == [2, 1, 1]


def test_increment_of_a_nested_budget_holds_only_the_new_entries(tmp_path):
    delta = example_delta(example_base())
    for budget in range(19):
        parent = delta.prefix(budget)
        step = increment(delta, parent)
        assert step.num_entries == 18 - budget
        assert not step.removed
        save_delta(step, tmp_path / "step")
        save_delta(parent, tmp_path / "parent")
        whole = compose(load_delta(tmp_path / "parent"), load_delta(tmp_path / "step"))
        assert content_fingerprint(whole) == content_fingerprint(delta)


def test_a_series_of_increments():
    series = [example_delta(example_base(), entries, seed) for entries, seed in ((3, 1), (7, 2))]
    series.append(example_delta(example_base(), 1, 3))
    steps = [increment(after, before) for before, after in pairwise(series)]
    whole = series[0]
    for step, expected in zip(steps, series[1:], strict=True):
        whole = compose(whole, step)
        assert content_fingerprint(whole) == content_fingerprint(expected)


def test_parameters_may_come_and_go():
    base = example_base()
    delta = example_delta(base)
    part = example_delta({name: base[name] for name in ("b.weight",)})
    for child, parent in ((delta, part), (part, delta)):
        step = increment(child, parent)
        assert content_fingerprint(compose(parent, step)) == content_fingerprint(child)


def test_other_columns_than_the_parent_are_stored_in_full():
    values = example_delta(example_base()).sparse["c.bias"]
    bare = SparseValues(values.shape, values.dtype, values.position, values.value)
    prints = {"c.bias": "0" * 32}
    with_steps = Delta(sparse={"c.bias": values}, fingerprints=prints)
    without = Delta(sparse={"c.bias": bare}, fingerprints=prints)
    for child, parent in ((with_steps, without), (without, with_steps)):
        step = increment(child, parent)
        assert step.num_entries == 6
        assert content_fingerprint(compose(parent, step)) == content_fingerprint(child)


def test_a_changed_unmask_step_alone_is_stored():
    parent = example_delta(example_base())
    values = parent.sparse["a.weight"]
    steps = values.unmask_step.clone()
    steps[2] += 1
    moved = SparseValues(
        values.shape, values.dtype, values.position, values.value, steps, values.original
    )
    delta = Delta(
        sparse=dict(parent.sparse) | {"a.weight": moved},
        dense=parent.dense,
        fingerprints=parent.fingerprints,
    )
    step = increment(delta, parent)
    assert step.sparse["a.weight"].position.tolist() == [int(values.position[2])]
    assert step.num_entries == 1


def test_wrong_parents_are_refused():
    base = example_base()
    delta, parent = example_delta(base), example_delta(base, seed=9)
    step = increment(delta, parent)
    with pytest.raises(DeltaError, match="parent: the increment was made over delta"):
        compose(delta, step)
    with pytest.raises(DeltaError, match="expected an increment, got a whole delta"):
        compose(parent, delta)
    with pytest.raises(DeltaError, match="delta: an increment"):
        increment(step, parent)
    with pytest.raises(DeltaError, match="parent: an increment"):
        increment(delta, step)
    other = example_delta(base | {"c.bias": base["c.bias"] + 1})
    with pytest.raises(DeltaError, match=r"'c.bias': the parent delta is over another base"):
        increment(delta, other)
    half = example_delta(example_base(torch.float16))
    with pytest.raises(DeltaError, match="over another base"):
        increment(delta, half)


@FAST
@given(st.integers(0, 100), st.integers(0, 100), st.integers(0, 7), st.integers(0, 7))
def test_overlap_counts(seed_a, seed_b, count_a, count_b):
    a = example_delta(example_base(), count_a, seed_a)
    b = example_delta(example_base(), count_b, seed_b)
    a, b = a.prefix(15), b.prefix(15)
    values_a, values_b = (
        {
            (name, position): value
            for name, values in delta.sparse.items()
            for position, value in zip(values.position.tolist(), values.value.tolist(), strict=True)
        }
        for delta in (a, b)
    )
    both = values_a.keys() & values_b.keys()
    distances = [abs(values_a[key] - values_b[key]) for key in both]
    found = overlap(a, b)
    assert found.both == len(both)
    assert found.only_a == len(values_a.keys() - both)
    assert found.only_b == len(values_b.keys() - both)
    union = len(values_a.keys() | values_b.keys())
    assert found.jaccard == (len(both) / union if union else 1)
    assert found.equal == sum(distance == 0 for distance in distances)
    assert found.max_difference == max(distances, default=0)
    assert found.mean_difference == pytest.approx(sum(distances) / max(len(both), 1))
    assert found.same_base


def one_entry(value, fingerprint, dtype=torch.float32):
    values = SparseValues((3,), dtype, torch.tensor([1]), torch.tensor([value], dtype=dtype))
    return Delta(sparse={"x": values}, fingerprints={"x": fingerprint * 32})


def test_overlap_of_nan_and_of_other_bases():
    found = overlap(one_entry(float("nan"), "0"), one_entry(float("nan"), "1"))
    assert (found.both, found.equal, found.max_difference) == (1, 1, 0)
    assert not found.same_base
    found = overlap(one_entry(0.0, "0"), one_entry(-0.0, "0"))
    assert (found.equal, found.max_difference) == (0, 0)
    with pytest.raises(DeltaError, match="they are of different models"):
        overlap(one_entry(1.0, "0"), one_entry(1.0, "0", torch.float16))

"""Merged deltas equal merged models: every method against a dense oracle on small models."""

from __future__ import annotations

from itertools import permutations

import pytest
import torch
from delta_cases import assert_identical, clone
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparse_optim.delta import (
    Delta,
    DeltaError,
    SparseValues,
    apply_delta,
    content_fingerprint,
    load_delta,
    merge,
    merge_deltas,
    revert_delta,
    save_delta,
    unmerge,
)
from sparse_optim.delta._combine import rounded
from sparse_optim.delta._fingerprint import fingerprint

pytestmark = pytest.mark.usefixtures("one_thread")
FAST = settings(max_examples=60, deadline=None)
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
SHAPES = {"a": (6, 5), "b": (4, 3, 2), "c": (7,), "empty": (0, 3), "scalar": ()}
Model = dict[str, Tensor]


def grid(shape, generator, dtype) -> Tensor:
    """Multiples of 1/8: sums of them are exact in any order."""
    return (torch.randint(-16, 17, shape, generator=generator) / 8).to(dtype)


def models(seed: int, dtype: torch.dtype, shares: list[float]) -> list[Model]:
    """A base, and a tuned model for each share of changed entries."""
    generator = torch.Generator().manual_seed(seed)
    base = {name: grid(shape, generator, dtype) for name, shape in SHAPES.items()}
    result = [base]
    for share in shares:
        tuned = {}
        for name, tensor in base.items():
            changed = torch.rand(tensor.shape, generator=generator) < share
            tuned[name] = torch.where(changed, grid(tensor.shape, generator, dtype), tensor)
        result.append(tuned)
    return result


def nearest(value: float, dtype: torch.dtype) -> Tensor:
    """The number of `dtype` next to a float64 value; of two, the one with even bits."""
    start = torch.tensor(value, dtype=torch.float64).to(dtype).view(())
    bits = start.view({8: torch.int64, 4: torch.int32, 2: torch.int16}[dtype.itemsize])
    around = torch.stack([bits - 1, bits, bits + 1])
    candidates = around.view(dtype).double()
    distance = (candidates - value).abs().nan_to_num(torch.inf)
    best = (distance == distance.min()).nonzero().view(-1).tolist()
    chosen = next((at for at in best if int(around[at]) % 2 == 0), best[0])
    return candidates[chosen].to(dtype)


def oracle(base: Model, tuned: list[Model], weights, method="sum", density=1.0) -> Model:
    """The merge of whole models, entry by entry, in Python numbers."""
    flat = [[float(x) for name in SHAPES for x in state[name].view(-1)] for state in (base, *tuned)]
    start, states = flat[0], flat[1:]
    taus = [[x - b for x, b in zip(state, start, strict=True)] for state in states]
    if method == "ties":
        for tau in taus:
            changed = sorted(
                (at for at in range(len(tau)) if tau[at]), key=lambda at: -abs(tau[at])
            )
            for at in changed[max(1, round(density * len(changed))) :]:
                tau[at] = 0.0
    result = []
    for at, origin in enumerate(start):
        added = [w * tau[at] for w, tau in zip(weights, taus, strict=True)]
        total = sum(added)
        if method == "ties":
            agree = [x for x in added if x * total > 0]
            total = sum(agree) / len(agree) if agree else 0.0
        result.append(origin + total)
    merged, at = {}, 0
    for name, tensor in base.items():
        values = [nearest(x, tensor.dtype) for x in result[at : at + tensor.numel()]]
        at += tensor.numel()
        stacked = torch.stack(values) if values else tensor.view(-1)
        merged[name] = stacked.view(tensor.shape)
    return merged


def sparse_delta(base: Model, tuned: Model, originals: bool = False, **changes) -> Delta:
    """The difference as sparse entries alone, however many there are."""
    sparse = {}
    for name, before in base.items():
        after = tuned[name].view(-1)
        position = (before.view(-1) != after).nonzero().view(-1)
        sparse[name] = SparseValues(
            shape=tuple(before.shape),
            dtype=before.dtype,
            position=position,
            value=after[position],
            original=before.view(-1)[position] if originals else None,
        )
    prints = {name: fingerprint(tensor) for name, tensor in base.items()}
    return Delta(sparse, fingerprints=prints, **changes)


WEIGHTS = st.lists(st.sampled_from([1.0, 0.5, -1.0, 2.0, 0.0]), min_size=4, max_size=4)


@FAST
@given(
    st.integers(0, 2**20),
    st.sampled_from(DTYPES),
    st.lists(st.sampled_from([0.0, 0.1, 0.4, 1.0]), min_size=1, max_size=4),
    WEIGHTS,
    st.sampled_from([("sum", None), ("ties", None), ("ties", 0.5), ("ties", 0.2)]),
    st.booleans(),
    st.booleans(),
)
def test_equal_to_merged_models(seed, dtype, shares, weights, how, originals, whole):
    method, density = how
    base, *tuned = models(seed, dtype, shares)
    weights = weights[: len(tuned)]
    make = Delta.from_models if whole else sparse_delta  # the first stores much of it whole
    deltas = [make(base, state, originals) for state in tuned]
    given_base = None if originals else base
    merged = merge_deltas(deltas, given_base, method=method, weights=weights, density=density)
    assert not merged.dense
    assert_equal_models(merge(merged, base), oracle(base, tuned, weights, method, density or 1.0))


def assert_equal_models(found: Model, expected: Model) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name


def changed(model: Model, base: Model) -> int:
    return sum(int((model[name] != base[name]).sum()) for name in base)


@pytest.mark.parametrize("method", ["dare", "dare-ties"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_dare_drops_at_random_and_divides_the_rest(method, dtype):
    base, tuned = models(1, dtype, [1.0])
    delta = sparse_delta(base, tuned)
    merged = merge_deltas([delta], base, method=method, density=0.5, seed=3)
    model = merge(merged, base)
    kept = {name: model[name] != base[name] for name in base}
    expected = {  # by two: exact
        name: torch.where(kept[name], 2 * tuned[name] - base[name], base[name]) for name in base
    }
    assert_equal_models(model, expected)
    assert 0.25 < changed(model, base) / changed(tuned, base) < 0.75
    again, other = (
        merge_deltas([delta], base, method=method, density=0.5, seed=seed) for seed in (3, 4)
    )
    assert content_fingerprint(again) == content_fingerprint(merged)
    assert changed(merge(other, base), model)


@pytest.mark.parametrize("dtype", DTYPES)
def test_dare_ties_is_ties_of_what_dare_leaves(dtype):
    base, *tuned = models(3, dtype, [0.5, 0.5, 0.5])
    deltas, weights = [sparse_delta(base, state) for state in tuned], [1.0, -1.0, 0.5]
    kept = []
    for delta in deltas:
        alone = merge_deltas([delta], base, method="dare", density=0.5, seed=4)
        sparse = {
            name: delta.sparse[name].take(torch.isin(delta.sparse[name].position, left.position))
            for name, left in alone.sparse.items()
        }
        kept.append(Delta(sparse, fingerprints={n: delta.fingerprints[n] for n in sparse}))
        assert 0 < kept[-1].num_entries < delta.num_entries
    expected = merge_deltas(kept, base, method="ties", weights=[2 * w for w in weights])
    found = merge_deltas(deltas, base, method="dare-ties", weights=weights, density=0.5, seed=4)
    assert_equal_models(merge(found, base), merge(expected, base))


def test_dare_is_unbiased():
    base = {"w": torch.zeros(20_000)}
    delta = sparse_delta(base, {"w": torch.ones(20_000)})
    for density in (0.1, 0.9):
        merged = merge_deltas([delta], base, method="dare", density=density)
        values = merged.sparse["w"].value
        assert torch.equal(values, torch.full_like(values, 1 / density))
        assert abs(values.numel() / 20_000 - density) < 0.01


def test_what_dare_drops_depends_on_the_delta_alone():
    base, one, two = models(2, torch.float32, [0.4, 0.4])
    first, second = sparse_delta(base, one), Delta.from_models(base, two)
    settings = {"method": "dare", "density": 0.5}
    alone = [merge_deltas([delta], base, **settings) for delta in (first, second)]
    both = merge_deltas([first, second], base, **settings)
    expected = oracle(base, [merge(delta, base) for delta in alone], [1, 1])
    assert_equal_models(merge(both, base), expected)


@pytest.mark.parametrize(
    "how",
    [
        {"method": "sum"},
        {"method": "ties", "density": 0.5},
        {"method": "dare", "density": 0.5},
        {"method": "dare-ties", "density": 0.5, "seed": 7},
    ],
)
def test_the_order_of_the_inputs_makes_no_difference(how):
    """Random values, whose sums round: also to the last bit."""
    torch.manual_seed(0)
    base = {"a": torch.randn(40, 5), "b": torch.randn(300)}
    deltas = []
    for _ in range(3):
        tuned = {name: tensor + torch.randn_like(tensor) for name, tensor in base.items()}
        deltas.append(sparse_delta(base, tuned))
    weights = [0.3, -0.7, 1.1]
    found = {
        content_fingerprint(
            merge_deltas(
                [deltas[at] for at in order], base, weights=[weights[at] for at in order], **how
            )
        )
        for order in permutations(range(3))
    }
    assert len(found) == 1


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"method": "ties", "density": 0.3},
        {"method": "dare", "density": 0.5},
    ],
)
def test_groups_of_parameters_make_no_difference(how, monkeypatch):
    """Also where changes of the same size in several of them compete for the density."""
    base = {name: torch.zeros(9) for name in "abcd"} | {"e": torch.zeros(9, dtype=torch.float16)}
    tuned = [{name: torch.full_like(t, sign) for name, t in base.items()} for sign in (1, -1)]
    deltas = [sparse_delta(base, state) for state in tuned]
    found = []
    for entries in (1, 40, 1000):
        monkeypatch.setattr("sparse_optim.delta._vectors.GROUP_ENTRIES", entries)
        found.append(merge_deltas(deltas, base, weights=[1, 3], **how))
    assert len(set(map(content_fingerprint, found))) == 1
    if how.get("method") == "ties":
        assert found[0].num_entries == round(0.3 * 45)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_random_values_are_rounded_once(dtype):
    torch.manual_seed(0)
    base = {name: torch.randn(shape).to(dtype) for name, shape in SHAPES.items()}
    tuned = [{n: torch.randn_like(t) for n, t in base.items()} for _ in range(2)]
    deltas = [sparse_delta(base, state) for state in tuned]
    order = sorted(range(2), key=lambda at: content_fingerprint(deltas[at]))
    merged = merge_deltas(deltas, base, weights=[0.3, 0.9])
    expected = oracle(base, [tuned[at] for at in order], [(0.3, 0.9)[at] for at in order])
    assert_equal_models(merge(merged, base), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rounding_goes_to_the_nearest(dtype):
    info = torch.finfo(dtype)
    generator = torch.Generator().manual_seed(0)
    numbers = torch.randn(300, generator=generator, dtype=torch.float64)
    middles = 1 + info.eps / 2 + torch.tensor([0.0, 2.0**-40, -(2.0**-40)], dtype=torch.float64)
    small = numbers[:50] * info.smallest_normal
    everything = torch.cat([numbers, middles, -middles, middles + info.eps, small])
    found = rounded(everything.numpy(), dtype)
    for value, result in zip(everything.tolist(), found, strict=True):
        assert result == nearest(value, dtype), value
    beyond = torch.tensor([4.0, -4.0], dtype=torch.float64) * min(info.max, 1e300)
    assert rounded(beyond.numpy(), dtype).isinf().all() or dtype == torch.float64


@pytest.mark.parametrize("method", ["sum", "ties"])
def test_disjoint_deltas_keep_their_bits(method):
    """Whatever the base holds: 1e-20 is lost in 1 + (1e-20 - 1)."""
    base = {"w": torch.ones(6)}
    first, second = (torch.ones(6) for _ in range(2))
    first[:2] = torch.tensor([1e-20, -0.0])
    second[3:] = torch.tensor([3e-39, -7e20, 0.1])
    deltas = [sparse_delta(base, {"w": tensor}) for tensor in (first, second)]
    values = merge_deltas(deltas, base, method=method).sparse["w"]
    assert values.position.tolist() == [0, 1, 3, 4, 5]
    expected = torch.cat([first[:2], second[3:]])
    assert torch.equal(values.value.view(torch.int32), expected.view(torch.int32))


@pytest.mark.parametrize("count", [1, 2, 3])
def test_the_mean_of_ties_over_identical_deltas_is_each_of_them(count):
    base, tuned = models(3, torch.bfloat16, [0.3])
    delta = sparse_delta(base, tuned)
    assert_equal_models(merge(merge_deltas([delta] * count, base, method="ties"), base), tuned)
    summed = merge_deltas([delta] * count, base, weights=[1 / count] * count)
    assert_equal_models(merge(summed, base), tuned)


def test_a_task_is_taken_away_by_a_negative_weight():
    base, tuned = models(4, torch.float32, [0.3])
    delta = sparse_delta(base, tuned)
    nothing = merge_deltas([delta, delta], base, weights=[1, -1])
    assert nothing.num_entries == 0
    assert nothing.fingerprints == delta.fingerprints
    away = merge(merge_deltas([delta], base, weights=[-1]), base)
    assert_equal_models(away, {name: 2 * base[name] - tuned[name] for name in base})


def test_originals_and_a_file(tmp_path):
    base, *tuned = models(5, torch.bfloat16, [0.3, 0.3])
    deltas = [sparse_delta(base, state, True) for state in tuned]
    merged = merge_deltas(deltas, store_original=True)
    save_delta(merged, tmp_path / "merged.safetensors")
    loaded = load_delta(tmp_path / "merged.safetensors")
    assert content_fingerprint(loaded) == content_fingerprint(merged)
    live = clone(base)
    apply_delta(live, loaded)
    assert_equal_models(live, oracle(base, tuned, [1, 1]))
    revert_delta(live, loaded)
    assert_identical(live, base)


@pytest.mark.parametrize(
    "how", [{}, {"method": "ties", "density": 0.4}, {"method": "dare", "density": 0.4, "seed": 5}]
)
@pytest.mark.parametrize("store_original", [False, True])
def test_unmerge_is_the_merge_without_it(how, store_original):
    torch.manual_seed(1)
    base = {"a": torch.randn(9, 5), "b": torch.randn(30)}
    tuned = [{n: t + torch.randn_like(t) for n, t in base.items()} for _ in range(3)]
    deltas = [sparse_delta(base, state, method={"name": "id3"}) for state in tuned]
    weights = [0.3, 1.0, -0.7]
    merged = merge_deltas(deltas, base, weights=weights, store_original=store_original, **how)
    for out in range(3):
        rest = [at for at in range(3) if at != out]
        expected = merge_deltas(
            [deltas[at] for at in rest],
            base,
            weights=[weights[at] for at in rest],
            store_original=store_original,
            **how,
        )
        found = unmerge(merged, deltas[out], [deltas[at] for at in reversed(rest)], base)
        assert content_fingerprint(found) == content_fingerprint(expected)


def test_unmerge_wants_the_inputs_of_the_merge():
    base, *tuned = models(6, torch.float32, [0.3, 0.3, 0.3])
    one, two, three = (sparse_delta(base, state) for state in tuned)
    merged = merge_deltas([one, two], base)
    with pytest.raises(DeltaError, match=r"delta: it is not an input of the merged delta"):
        unmerge(merged, three, [one, two], base)
    with pytest.raises(DeltaError, match=r"rest\[1\]: it is not an input"):
        unmerge(merged, one, [two, three], base)
    with pytest.raises(DeltaError, match=r"rest\[1\]: it is not an input"):
        unmerge(merged, one, [two, two], base)
    with pytest.raises(
        DeltaError,
        match="rest: expected all other inputs of the merge, 2; missing is one of method",
    ):
        unmerge(merge_deltas([one, two, three], base), one, [two], base)
    with pytest.raises(DeltaError, match="that a merge made"):
        unmerge(one, two, [], base)
    with pytest.raises(DeltaError, match="nothing would be left"):
        unmerge(merge_deltas([one], base), one, [], base)
    twice = merge_deltas([one, one, two], base, weights=[1, 2, 1])
    with pytest.raises(DeltaError, match="merged twice, with two weights"):
        unmerge(twice, one, [one, two], base)
    same = unmerge(merge_deltas([one, one, two], base), one, [two, one], base)
    assert content_fingerprint(same) == content_fingerprint(merged)
    for damage in ({"inputs": 3}, {"inputs": [{}]}, {"seed": None, "recipe": 0}):
        method = {**merged.method, **damage}
        if "recipe" in damage:
            del method["density"]
        with pytest.raises(DeltaError, match="damaged"):
            unmerge(
                Delta(merged.sparse, fingerprints=merged.fingerprints, method=method), one, [two]
            )

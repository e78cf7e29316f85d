"""Deltas in live models: apply, revert, swap, merge."""

import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace

import pytest
import torch
from delta_cases import (
    assert_identical,
    clone,
    example_base,
    example_delta,
    models,
    sparse_values,
    tied_pair,
    with_head,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_optim.delta import (
    Delta,
    DeltaError,
    DeltaSwitcher,
    apply_delta,
    content_fingerprint,
    increment,
    merge,
    revert_delta,
)
from sparse_optim.delta._fingerprint import fingerprint

FAST = settings(max_examples=40, deadline=None)


@FAST
@given(models(), st.booleans())
def test_apply_and_revert_are_bit_exact(pair, store_original):
    base, tuned = pair
    delta = Delta.from_models(base, tuned, store_original)
    live = clone(base)  # Keeps the strides.
    handle = apply_delta(live, delta)
    assert_identical(live, tuned)
    handle.revert()
    assert_identical(live, base)
    if store_original:
        apply_delta(live, delta)
        revert_delta(live, delta)
        assert_identical(live, base)


def test_tied_weights_are_stored_and_applied_once():
    base, tuned = tied_pair()
    before = clone(base.state_dict())
    delta = Delta.from_models(base, tuned)
    assert list(delta.sparse) == ["embedding.weight"]
    assert set(delta.dense) == {"norm.weight", "norm.num_batches_tracked"}
    version = base.embedding.weight._version
    handle = apply_delta(base, delta)
    assert base.embedding.weight._version == version + 1
    assert base.output.weight is base.embedding.weight
    for name, tensor in tuned.state_dict().items():
        assert torch.equal(base.state_dict()[name], tensor)
    assert base.embedding.weight.requires_grad
    handle.revert()
    assert all(torch.equal(base.state_dict()[name], before[name]) for name in before)


def test_merge_keeps_ties():
    base, tuned = tied_pair()
    merged = merge(Delta.from_models(base, tuned), base.state_dict())
    assert merged["output.weight"].data_ptr() == merged["embedding.weight"].data_ptr()
    assert all(torch.equal(merged[name], tensor) for name, tensor in tuned.state_dict().items())
    assert merged["norm.bias"].data_ptr() == base.norm.bias.data_ptr()


def test_one_storage_named_twice_in_the_delta():
    shared = torch.zeros(4)
    model = {"x": shared, "y": shared}
    values = sparse_values()
    prints = dict.fromkeys("xy", fingerprint(shared))
    delta = Delta(sparse={"x": values, "y": values}, fingerprints=prints)
    handle = apply_delta(model, delta)
    assert shared.tolist() == [0, 1, 0, 2]
    handle.revert()
    assert shared.tolist() == [0, 0, 0, 0]
    other = sparse_values(value=torch.tensor([5.0, 6.0]))
    conflict = Delta(sparse={"x": values, "y": other}, fingerprints=prints)
    with pytest.raises(DeltaError, match="'x' and 'y' are tied"):
        apply_delta(model, conflict)
    assert shared.tolist() == [0, 0, 0, 0]


def test_overlapping_tensors_that_disagree_are_rolled_back():
    memory = torch.zeros(6)
    model = {"x": memory[:4], "y": memory[2:]}
    delta = Delta(
        sparse={"x": sparse_values(), "y": sparse_values(value=torch.tensor([7.0, 8.0]))},
        fingerprints=dict.fromkeys("xy", fingerprint(torch.zeros(4))),
    )
    with pytest.raises(DeltaError, match="'x' shares memory"):
        apply_delta(model, delta)
    assert memory.tolist() == [0] * 6


def test_context_manager_reverts_also_after_an_error():
    base = with_head(example_base())
    before, delta = clone(base), example_delta(example_base())
    with apply_delta(base, delta) as handle:
        assert_identical(base, merge(delta, before))
        assert handle.skipped == ()
    assert_identical(base, before)
    with pytest.raises(KeyError), apply_delta(base, delta):
        raise KeyError
    assert_identical(base, before)
    with apply_delta(base, delta) as handle:
        handle.revert()  # Reverting inside is allowed.
    assert_identical(base, before)


def broken(base, delta, how):
    """The model and the delta with one thing wrong."""
    name = "b.weight"
    if how == "missing name":
        del base[name]
    elif how == "other shape":
        base[name] = base[name].view(5, 12)
    elif how == "other dtype":
        base[name] = base[name].half()
    elif how == "one bit":
        base[name].view(torch.int16).view(-1)[17] ^= 1
    elif how == "head of other size":
        base["head.weight"] = torch.zeros(3, 4)
    elif how == "no head":
        del base["head.weight"]
    elif how == "meta":
        base[name] = base[name].to("meta")
    elif how == "expanded":
        base[name] = torch.zeros(1, 1, 1).bfloat16().expand(5, 4, 3)
    elif how == "sparse":
        base[name] = base[name].to_sparse()
    elif how == "inference":
        with torch.inference_mode():
            base[name] = base[name].clone()
    elif how == "increment":
        delta = increment(delta, delta)
    return base, delta


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("missing name", "1 of the delta's 3 sparse parameters are not in the base.*'b.weight'"),
        ("other shape", r"'b.weight': the delta is for shape \(5, 4, 3\), the model has \(5, 12\)"),
        ("other dtype", "'b.weight': the delta is for torch.bfloat16, the model has torch.float16"),
        ("one bit", "not the base of this delta: 1 of 3 sparse parameters.*'b.weight'"),
        ("head of other size", r"'head.weight'.*\(2, 4\).*\(3, 4\).*number of labels"),
        ("no head", "'head.weight'"),
        ("meta", "'b.weight': expected a plain strided tensor"),
        ("sparse", "'b.weight': expected a plain strided tensor"),
        ("expanded", "'b.weight': an expanded tensor"),
        ("inference", "'b.weight': made in inference mode"),
        ("increment", "an increment over delta"),
    ],
)
def test_what_does_not_fit_leaves_the_model_untouched(how, message):
    base = example_base()
    model, delta = broken(with_head(base), example_delta(base), how)
    plain = {
        name: tensor
        for name, tensor in model.items()
        if tensor.device.type == "cpu" and tensor.layout is torch.strided
    }
    before = clone(plain)
    with pytest.raises(DeltaError, match=message):
        apply_delta(model, delta)
    assert_identical(plain, before)


@pytest.mark.parametrize("failing", [0, 1, 2, 3])
def test_a_failing_write_is_rolled_back(monkeypatch, failing):
    from sparse_optim.delta import _apply

    base = with_head(example_base())
    before, delta, calls = clone(base), example_delta(example_base()), []

    def scatter_(tensor, position, value):
        calls.append(None)
        if len(calls) == failing + 1:
            raise KeyboardInterrupt
        original(tensor, position, value)

    original = _apply.scatter_
    monkeypatch.setattr(_apply, "scatter_", scatter_)
    with pytest.raises(KeyboardInterrupt):
        apply_delta(base, delta)
    assert_identical(base, before)


def test_not_strict_skips_names_but_still_checks_the_base():
    base = example_base()
    delta = example_delta(base)
    handle = apply_delta(base, delta, strict=False)
    assert handle.skipped == ("head.weight",)
    handle.revert()
    assert_identical(base, example_base())
    base["c.bias"][0] = 100
    with pytest.raises(DeltaError, match="not the base"):
        apply_delta(base, delta, strict=False)


def test_reverting_twice_or_over_changes_is_refused():
    base = with_head(example_base())
    delta = example_delta(example_base())
    handle = apply_delta(base, delta)
    with pytest.raises(DeltaError, match="not the base of this delta"):
        apply_delta(base, delta)
    at = int(delta.sparse["a.weight"].position[0])
    kept = base["a.weight"].view(-1)[at].clone()
    base["a.weight"].view(-1)[at] = 55
    trained = clone(base)
    with pytest.raises(DeltaError, match=r"'a.weight' does not hold the delta's values"):
        handle.revert()
    assert_identical(base, trained)
    base["a.weight"].view(-1)[at] = kept
    handle.revert()
    with pytest.raises(DeltaError, match="reverted already"):
        handle.revert()
    assert_identical(base, with_head(example_base()))


def test_reverting_out_of_order_is_refused():
    model = {"head": torch.zeros(3)}
    first = apply_delta(model, Delta(sparse={}, dense={"head": torch.ones(3)}))
    second = apply_delta(model, Delta(sparse={}, dense={"head": torch.full((3,), 2.0)}))
    with pytest.raises(DeltaError, match="'head' does not hold"):
        first.revert()
    assert model["head"].tolist() == [2, 2, 2]
    second.revert()
    first.revert()
    assert model["head"].tolist() == [0, 0, 0]


def test_revert_from_stored_originals():
    base = with_head(example_base())
    delta = example_delta(example_base())
    apply_delta(base, delta)
    applied = clone(base)
    with pytest.raises(DeltaError, match=r"'head.weight': the delta stores no originals"):
        revert_delta(base, delta)
    assert_identical(base, applied)
    base["b.weight"].view(-1)[delta_free_position(delta)] += 1  # Not an entry of the delta.
    trained = clone(base)
    with pytest.raises(DeltaError, match=r"'b.weight': reverting would not give"):
        revert_delta(base, delta, strict=False)
    assert_identical(base, trained)
    applied_again = clone(applied)
    revert_delta(applied_again, delta, strict=False)
    assert_identical(applied_again, example_base() | {"head.weight": delta.dense["head.weight"]})
    with pytest.raises(DeltaError, match="does not hold the delta's values"):
        revert_delta(applied_again, delta, strict=False)


def delta_free_position(delta):
    taken = set(delta.sparse["b.weight"].position.tolist())
    return min(set(range(60)) - taken)


def test_merge_refuses_another_base():
    base = example_base()
    delta = example_delta(base)
    with pytest.raises(DeltaError, match="not the base"):
        merge(delta, base | {"c.bias": base["c.bias"] + 1})
    with pytest.raises(DeltaError, match=r"not in the base, the first is 'c.bias'"):
        merge(delta, {name: base[name] for name in ("a.weight", "b.weight")})


@pytest.mark.gpu
def test_apply_on_the_gpu_and_revert_after_moving():
    base, tuned = tied_pair()
    delta = Delta.from_models(base, tuned)
    before = clone(base.state_dict())
    handle = apply_delta(base.cuda(), delta)
    assert all(
        torch.equal(tensor.cpu(), tuned.state_dict()[name])
        for name, tensor in base.state_dict().items()
    )
    base.cpu()
    handle.revert()
    assert all(torch.equal(base.state_dict()[name], before[name]) for name in before)
    assert content_fingerprint(Delta.from_models(base.cuda(), tuned.cuda())) == content_fingerprint(
        delta
    )


@pytest.mark.parametrize("error", [ValueError("mine"), KeyboardInterrupt()])
def test_the_callers_exception_goes_on_where_reverting_fails_too(error):
    base, tuned = tied_pair()
    delta = Delta.from_models(base, tuned)

    def write_into_the_applied_model_and_fail():
        with apply_delta(base, delta), torch.no_grad():
            base.embedding.weight.add_(1.0)
            raise error

    with pytest.raises(type(error)) as raised:
        write_into_the_applied_model_and_fail()
    assert raised.value is error
    if sys.version_info >= (3, 11):
        assert "the delta could not be reverted" in raised.value.__notes__[0]


def test_a_failed_revert_is_an_error_where_the_caller_has_none():
    base, tuned = tied_pair()

    def write_into_the_applied_model():
        with apply_delta(base, Delta.from_models(base, tuned)), torch.no_grad():
            base.embedding.weight.add_(1.0)

    with pytest.raises(DeltaError):
        write_into_the_applied_model()


@pytest.mark.parametrize("others_apply", [False, True])
def test_many_threads_leave_the_base_intact(others_apply):
    """Each swap or apply is whole, or refused because another thread's delta is in the model."""
    base, names = example_base(), ("a", "b", "c", None)
    original = clone(base)
    deltas = {
        name: replace(example_delta(example_base(), seed=seed), dense={})
        for seed, name in enumerate(names[:3])
    }
    switcher = DeltaSwitcher(base, deltas)

    def work(seed):
        for turn in range(60):
            with suppress(DeltaError if others_apply else ()):
                if others_apply and (seed + turn) % 3 == 0:
                    apply_delta(base, deltas["abc"[turn % 3]]).revert()
                else:
                    switcher.use(names[(seed + turn) % 4])

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(8) as threads:
            list(threads.map(work, range(8)))
    finally:
        sys.setswitchinterval(interval)
    switcher.use(None)
    assert_identical(base, original)

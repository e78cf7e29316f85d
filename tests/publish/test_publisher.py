"""What is published: it equals the trainer's weights, in as few bytes as promised."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from publish_cases import STEPS, Net, Run, assert_same, states

from sparse_optim import D3, Increment, Random, Repeat, Snip, Static, Stochastic
from sparse_optim.publish import Patch, PatchError, WeightPublisher, WeightReceiver, _publisher

METHODS: dict[str, dict[str, Any]] = {
    "d3": {},
    "every third step": {"selection": Increment(60, STEPS, every=3)},
    "random mask": {"importance": Random(1), "selection": Static(60)},
    "repeat": {"importance": D3(), "selection": Repeat(20)},
    "stochastic": {"importance": Snip(), "selection": Stochastic(20, seed=2)},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", METHODS)
def test_receivers_hold_the_trainers_weights_at_every_version(method: str, dtype: torch.dtype):
    run = Run(dtype, **METHODS[method])
    follower, served = WeightReceiver(Net(dtype)), Net(dtype)
    sometimes = WeightReceiver(served)
    for step in range(STEPS):
        patch = run.next()
        assert (patch.version, patch.manifest is None) == (step + 1, step > 0)
        assert follower.receive(patch.to_bytes())
        assert follower.digest == patch.digest == run.publisher.whole().digest
        assert_same(follower._model, run.net)
        if step % 4 == 1:  # it catches up with one whole patch, whatever its age
            assert sometimes.receive(run.publisher.whole().to_bytes())
            assert sometimes.digest == patch.digest
            assert_same(served, run.net)
    follower.verify()
    follower.reset()
    assert_same(follower._model, Net(dtype))


def test_bytes_are_two_an_entry_and_four_more_for_a_new_one():
    """In bfloat16; the header is beside."""
    run = Run(torch.bfloat16)
    tensors, before = len(run.optimizer.engine.pool.params), 0
    for _ in range(STEPS):
        patch = run.next()
        active = int(run.optimizer.metrics()["active"])
        whole = sum(p.nbytes for n, p in run.net.state_dict().items() if "head" in n)
        whole += sum(b.nbytes for _, b in run.net.named_buffers())
        assert patch.dense.numel() == whole
        assert patch.nbytes - whole == 2 * active + 4 * (active - before) + 4 * tensors
        assert len(patch.to_bytes()) - patch.nbytes < (700 if before else 2500)
        before = active
    assert patch.position.numel() == 0


def test_values_are_rounded_to_the_receivers_dtype():
    run = Run(publisher={"dtype": torch.bfloat16})
    served = Net().bfloat16()
    receiver = WeightReceiver(served)
    for _ in range(3):
        receiver.receive(run.next().to_bytes())
        assert_same(served, copy.deepcopy(run.net).bfloat16())
    with pytest.raises(ValueError, match="no longer holds the base: give base="):
        WeightPublisher(run.optimizer, run.net, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="is not what training began with"):
        WeightPublisher(run.optimizer, run.net, dtype=torch.bfloat16, base=run.net)
    with pytest.raises(ValueError, match=r"it has no 'words.weight'"):
        WeightPublisher(run.optimizer, run.net, dtype=torch.bfloat16, base={})
    again = WeightPublisher(run.optimizer, run.net, dtype=torch.bfloat16, base=Net(), version=3)
    assert receiver.receive(again.patch())
    assert receiver.version == 4
    receiver.verify()


def test_a_rewound_run_publishes_a_whole_patch():
    run, net = Run(), Net()
    receiver = WeightReceiver(net)
    receiver.receive(run.next())
    saved, weights = copy.deepcopy(run.optimizer.state_dict()), states(run.net)
    for _ in range(4):
        receiver.receive(run.next())
    run.net.load_state_dict(weights)
    run.optimizer.load_state_dict(saved)
    patch = run.publisher.patch()
    assert patch.manifest is not None
    assert receiver.receive(patch)
    assert_same(net, run.net)
    # From here another way: other entries are new than those that the receiver had.
    run.taken = 100
    for _ in range(4):
        assert receiver.receive(run.next())
        assert_same(net, run.net)


def test_a_resumed_run_goes_on_for_the_same_receivers():
    run, net = Run(), Net()
    receiver = WeightReceiver(net)
    for _ in range(3):
        receiver.receive(run.next())
    resumed = Run(publisher={"version": run.publisher.version})
    resumed.net.load_state_dict(run.net.state_dict())
    resumed.optimizer.load_state_dict(run.optimizer.state_dict())
    resumed.taken = run.taken
    patch = resumed.next()
    assert (patch.version, patch.manifest is None) == (4, False)
    assert receiver.receive(patch.to_bytes())
    assert_same(net, resumed.net)
    assert resumed.next().manifest is None


def test_parameters_that_join_make_a_whole_patch():
    run, net = Run(), Net()
    extra = torch.nn.Parameter(torch.linspace(0, 1, 30))
    run.net.register_parameter("extra", extra)
    net.register_parameter("extra", torch.nn.Parameter(torch.linspace(0, 1, 30)))
    receiver = WeightReceiver(net)
    receiver.receive(run.next())
    run.optimizer.add_param_group({"params": [("extra", extra)]})
    for step in range(3):
        extra.grad = torch.ones(30) * 100
        run.step()
        patch = run.publisher.patch()
        assert (patch.manifest is None) == (step > 0)
        assert receiver.receive(patch.to_bytes())
        assert_same(net, run.net)
    assert not torch.equal(extra, torch.linspace(0, 1, 30))


def test_before_the_first_step_other_weights_may_be_loaded():
    run = Run()
    first = run.publisher.patch()
    assert first.position.numel() == 0
    with torch.no_grad():
        run.net.body.weight.add_(1)
    net = copy.deepcopy(run.net)
    receiver = WeightReceiver(net)
    with pytest.raises(PatchError, match=r"'body.weight' is not that of the publisher's base"):
        receiver.receive(first)
    patch = run.next()
    assert patch.manifest is not None
    assert receiver.receive(patch)
    assert_same(net, run.net)


def test_a_replaced_buffer_is_published():
    """Modules may put a new tensor in the place of a buffer."""
    run, net = Run(), Net()
    receiver = WeightReceiver(net)
    receiver.receive(run.next())
    run.net.norm.running_mean = torch.full((8,), 3.0)
    receiver.receive(run.publisher.patch())
    assert torch.equal(net.norm.running_mean, torch.full((8,), 3.0))


def test_a_buffer_of_another_dtype_is_published():
    run, net = Run(), Net()
    receiver = WeightReceiver(net)
    receiver.receive(run.next())
    run.net.norm.running_mean = run.net.norm.running_mean.half()
    patch = run.publisher.patch()
    assert patch.manifest is not None
    with pytest.raises(PatchError, match=r"dtype=torch.float32"):
        receiver.receive(patch)
    assert receiver.version == 1
    receiver.verify()
    run.net.norm.running_var = run.net.norm.running_var.double()
    run.net.head.half()
    patch = run.publisher.patch()
    head, mean, variance, batches = 2 * (27 + 3), 2 * 8, 8 * 8, 8
    assert patch.dense.numel() == head + mean + variance + batches
    run.net.norm.running_mean = torch.zeros(8, dtype=torch.complex128)
    with pytest.raises(
        ValueError, match=r"'norm.running_mean' is torch.complex128, which no patch"
    ):
        run.publisher.patch()


def test_tensors_that_nobody_trains_are_compared():
    """They are part of what the publisher says its weights are."""
    run, frozen = Run(), torch.linspace(0, 1, 7)
    for net in (run.net, other := Net(), same := Net(), without := Net()):
        if net is not without:
            net.register_parameter("extra", torch.nn.Parameter(frozen.clone()))
            net.register_buffer("table", torch.arange(5000))
    other.table[0] = 7
    patch = run.next()
    assert {spec.name for spec in patch.full_manifest.fixed} == {"extra", "table"}
    for net in (same, without):  # what a model does not have need not be right
        assert WeightReceiver(net).receive(patch)
        assert_same({n: t for n, t in states(run.net).items() if n in states(net)}, net)
    with pytest.raises(PatchError, match="'table' is not that of the publisher's base"):
        WeightReceiver(other).receive(patch)
    nameless = WeightPublisher(run.optimizer)
    assert nameless.patch().full_manifest.fixed == ()


def test_gathering_reads_no_more_than_the_entries(monkeypatch):
    """Nothing is hashed, and names are not looked up, once the run is under way."""
    run = Run()
    run.next()
    run.next()
    monkeypatch.setattr(_publisher, "fingerprint", lambda _: pytest.fail("hashed a tensor"))
    monkeypatch.setattr(run.optimizer, "layout", lambda _: pytest.fail("looked up names"))
    run.next()


def test_weights_that_other_code_wrote_are_not_published():
    run = Run()
    run.next()
    with torch.no_grad():
        run.net.body.weight.add_(1)
    before = run.publisher.whole()
    with pytest.raises(RuntimeError, match="other code has written the parameters"):
        run.publisher.patch()
    assert run.publisher.version == 1
    assert run.publisher.whole() is before


def test_tensors_that_nobody_trains_must_stay():
    """A patch does not carry them."""
    run = Run()
    run.net.register_parameter("extra", torch.nn.Parameter(torch.ones(7)))
    run.next()
    with torch.no_grad():
        run.net.extra.add_(1)
    with pytest.raises(RuntimeError, match="other code has changed 'extra', which the optimizer"):
        run.publisher.patch()
    assert run.publisher.version == 1
    with torch.no_grad():
        run.net.extra.sub_(1)
    assert run.publisher.patch().version == 2


def test_published_versions_do_not_change_with_the_run():
    run = Run()
    whole = run.next()
    data = whole.to_bytes()
    for _ in range(STEPS):
        run.step()
    assert run.publisher.whole() is whole
    assert whole.to_bytes() == data


def test_a_publisher_needs_our_optimizer():
    net = Net()
    with pytest.raises(TypeError, match=r"optimizer: expected MaskedAdamW .* got AdamW"):
        WeightPublisher(torch.optim.AdamW(net.parameters()), net)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"key": b""}, "key: expected 1 to 64 bytes, got 0 bytes"),
        ({"key": "secret"}, "key: expected 1 to 64 bytes, got str"),
        ({"dtype": torch.int8}, "dtype: expected a floating-point dtype"),
        ({"version": -1}, "version: expected 0 to 999"),
    ],
)
def test_what_is_refused(options: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        Run(publisher=options)


def test_nothing_is_there_before_the_first_patch():
    with pytest.raises(ValueError, match="nothing is published yet"):
        Run().publisher.whole()


def test_a_name_is_needed():
    run = Run()
    nameless = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match="parameters that are not the model's"):
        WeightPublisher(run.optimizer, nameless).patch()


def test_entries_are_those_that_changed():
    run, base = Run(torch.bfloat16), states(Net(torch.bfloat16))
    for _ in range(3):
        run.next()
    for name, indices, values, full_shape in run.publisher.whole().entries():
        assert base[name].shape == full_shape
        flat = base[name].view(-1)
        flat[indices.long()] = values
    for alias, name in run.publisher.whole().full_manifest.tied.items():
        base[alias] = base[name]
    assert_same(base, run.net)
    with pytest.raises(PatchError, match="take a whole patch"):
        list(run.next().entries())


def test_patches_say_what_they_are():
    run = Run()
    assert repr(run.next()).startswith("Patch(version 1, whole, ")
    assert isinstance(run.publisher.whole(), Patch)
    assert repr(run.next()).startswith("Patch(version 2, increment, ")

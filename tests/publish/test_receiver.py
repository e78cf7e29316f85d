"""What a receiver takes and what it refuses: it holds the base or one whole version, always."""

from __future__ import annotations

import copy
import threading
from typing import Any

import pytest
import torch
from interrupts import at_every_line, code_of
from publish_cases import Net, Run, assert_same, change, states, whole_patch
from torch import nn

from sparse_optim.publish import (
    MissingVersionError,
    Patch,
    PatchError,
    WeightReceiver,
    _held,
    _targets,
)
from sparse_optim.publish._held import Held
from sparse_optim.publish._targets import Located, Target


def test_patches_come_late_twice_and_in_any_order(published):
    patches, wholes, weights = published
    net = Net()
    receiver = WeightReceiver(net)
    with pytest.raises(MissingVersionError, match=r"version 2 builds on .* \(it has 0\)"):
        receiver.receive(patches[2])
    assert receiver.receive(patches[1])
    assert not receiver.receive(patches[1])
    with pytest.raises(MissingVersionError, match=r"version 3 builds on .* \(it has 1\)"):
        receiver.receive(patches[3])
    assert receiver.version == 1
    assert receiver.receive(patches[2])
    assert not receiver.receive(wholes[1])
    assert not receiver.receive(patches[1])
    assert_same(net, weights[2])
    assert receiver.receive(wholes[4])
    assert receiver.receive(patches[5])
    assert_same(net, weights[5])


def test_rollback_and_reset(published):
    patches, wholes, weights = published
    net = Net()
    receiver = WeightReceiver(net)
    with pytest.raises(ValueError, match="no earlier version is kept"):
        receiver.rollback()
    receiver.reset()
    receiver.receive(patches[1])
    with pytest.raises(ValueError, match="no earlier version is kept"):
        receiver.rollback()
    for version in (2, 3):
        receiver.receive(patches[version])
    receiver.rollback()
    assert receiver.version == 2
    receiver.verify()
    assert_same(net, weights[2])
    with pytest.raises(ValueError, match="no earlier version is kept"):
        receiver.rollback()
    assert receiver.receive(patches[3])
    assert receiver.receive(wholes[5])
    receiver.rollback()
    assert_same(net, weights[3])
    receiver.reset()
    assert (receiver.version, receiver.digest) == (0, "")
    assert_same(net, weights[0])
    with pytest.raises(ValueError, match="there is nothing to pass on"):
        receiver.whole()
    assert receiver.receive(wholes[2])
    assert_same(net, weights[2])


def test_rollback_and_reset_forget_what_was_staged(published):
    patches, wholes, weights = published
    net = Net()
    receiver = WeightReceiver(net)
    receiver.receive(patches[1])
    receiver.receive(patches[2])
    for undo in (receiver.rollback, receiver.reset):
        receiver.stage(wholes[4])
        undo()
        with pytest.raises(ValueError, match="nothing is staged"):
            receiver.commit()
    assert_same(net, weights[0])
    with pytest.raises(ValueError, match="no earlier version is kept"):
        receiver.rollback()


def test_another_run_with_lower_numbers_is_an_error(published):
    _, wholes, weights = published
    net = Net()
    receiver = WeightReceiver(net)
    receiver.receive(wholes[3])
    other = Run()
    for data in (other.next().to_bytes(), other.next().to_bytes()):
        with pytest.raises(PatchError, match=r"but the model holds 3 of run .*: reset\(\) first"):
            receiver.receive(data)
    assert_same(net, weights[3])
    later = Run(publisher={"version": 3})  # says that it goes on
    receiver.receive(later.next())
    assert_same(net, later.net)


def test_a_receiver_passes_its_version_on(published):
    patches, wholes, weights = published
    first, net = WeightReceiver(Net()), Net()
    for version in (1, 2, 3):
        first.receive(patches[version])
    assert first.whole().to_bytes() == wholes[3]
    second = WeightReceiver(net)
    second.receive(first.whole())
    assert_same(net, weights[3])


def test_stage_touches_nothing_and_commit_writes(published):
    patches, _, weights = published
    net = Net()
    receiver = WeightReceiver(net)
    with pytest.raises(ValueError, match="nothing is staged"):
        receiver.commit()
    assert receiver.stage(patches[1])
    assert_same(net, weights[0])
    receiver.commit()
    assert_same(net, weights[1])
    assert receiver.stage(patches[2])
    with pytest.raises(PatchError):
        receiver.stage(b"no patch")
    with pytest.raises(ValueError, match="nothing is staged"):
        receiver.commit()
    assert_same(net, weights[1])


def test_a_model_that_does_not_fit(published):
    patches, _, weights = published
    without = {name: t for name, t in weights[0].items() if name != "body.weight"}
    with pytest.raises(PatchError, match=r"'body.weight' is not in the model"):
        WeightReceiver(without).receive(patches[1])
    with pytest.raises(PatchError, match=r"publish with WeightPublisher\(dtype=torch.bfloat16\)"):
        WeightReceiver(Net().bfloat16()).receive(patches[1])
    with pytest.raises(PatchError, match=r"shape \(2, 9\) here and \(3, 9\) in the patch"):
        WeightReceiver(weights[0] | {"head.weight": torch.zeros(2, 9)}).receive(patches[1])
    with pytest.raises(PatchError, match="not that of the publisher's base"):
        WeightReceiver(weights[2]).receive(patches[1])
    with pytest.raises(PatchError, match="device meta"):
        WeightReceiver(weights[0] | {"body.bias": torch.zeros(8, device="meta")}).receive(
            patches[1]
        )
    expanded = weights[0] | {"head.bias": torch.zeros(1).expand(3)}
    with pytest.raises(PatchError, match="is expanded"):
        WeightReceiver(expanded).receive(patches[1])


def test_outside_writes_are_noticed(published):
    patches, wholes, weights = published
    net = Net()
    receiver = WeightReceiver(net)
    receiver.receive(patches[1])
    active = {name: index for name, index, *_ in Patch.from_bytes(wholes[1]).entries()}
    inside = int(active["body.weight"][0])
    outside = next(at for at in range(64) if at not in active["body.weight"])
    for name, place in (("body.weight", inside), ("body.weight", outside), ("head.bias", 0)):
        before = states(net)
        with torch.no_grad():
            dict(net.named_parameters())[name].view(-1)[place] += 1
        changed = states(net)
        for act in (receiver.verify, lambda: receiver.receive(patches[2]), receiver.reset):
            with pytest.raises(PatchError, match=f"other code has changed '{name}'"):
                act()
        assert_same(net, changed)
        net.load_state_dict(before)
    assert receiver.version == 1
    assert receiver.receive(patches[2])  # undone: it goes on
    assert_same(net, weights[2])


@pytest.mark.parametrize("counted", [True, False])
def test_writes_to_tensors_that_nobody_trains_are_noticed(counted):
    run, net = Run(), Net()
    for each in (run.net, net):
        each.register_parameter("extra", nn.Parameter(torch.ones(7)))
    receiver = WeightReceiver(net)
    receiver.receive(run.next())
    written = net.extra.detach() if counted else net.extra.data
    written[3] += 1
    with pytest.raises(PatchError, match="other code has changed 'extra'"):
        receiver.verify()
    patch = run.next()
    if counted:
        with pytest.raises(PatchError, match="other code has changed 'extra'"):
            receiver.receive(patch)
        assert receiver.version == 1
    written[3] -= 1
    assert receiver.receive(patch)
    receiver.verify()
    receiver.reset()


def test_writes_that_torch_does_not_count_are_found_by_verify(published):
    patches, wholes, _ = published
    net = Net()
    receiver = WeightReceiver(net)
    receiver.receive(patches[1])
    index = Patch.from_bytes(wholes[1]).entries().__next__().indices
    for name, place in (("body.weight", int(index[0])), ("body.bias", 0), ("head.bias", 1)):
        tensor = net.get_parameter(name).data.view(-1)
        kept = float(tensor[place])
        tensor[place] += 1
        with pytest.raises(PatchError, match=f"other code has changed '{name}'"):
            receiver.verify()
        tensor[place] = kept
    receiver.verify()


def test_a_patch_costs_its_entries(published, monkeypatch):
    """After the first one, no tensor is hashed."""
    patches, _, weights = published
    net = Net()
    receiver = WeightReceiver(net)
    receiver.receive(patches[1])
    monkeypatch.setattr(_held, "fingerprint", lambda _: pytest.fail("hashed a tensor"))
    receiver.receive(patches[2])
    receiver.rollback()
    receiver.receive(patches[2])
    assert_same(net, weights[2])


def test_memory_an_entry(published):
    """Versions that are gone leave nothing behind: one tensor after another gets its entries."""
    tensors = {f"layer{number}": torch.zeros(400) for number in range(20)}
    receiver = WeightReceiver(tensors)
    changes: dict[str, Any] = {}
    base = {name: tensor.clone() for name, tensor in tensors.items()}
    for version, name in enumerate(tensors, start=1):
        changes[name] = change(list(range(0, 400, 2)))
        receiver.receive(whole_patch(version, base, changes))
    storages = {
        held.position.untyped_storage().data_ptr(): held.position.untyped_storage().nbytes()
        for held in receiver._sparse
    }
    assert sum(storages.values()) == 4 * 20 * 200


def test_two_tensors_in_one_place(published):
    """A model that ties what the run trains apart, and views that overlap."""
    memory = torch.zeros(9)
    base = {"a": torch.zeros(3), "b": torch.zeros(3)}
    patch = whole_patch(1, base, {"a": change([1]), "b": change([2], 5.0)})
    for views in (
        {"a": memory[:3], "b": memory[:3]},
        {"a": memory[:3], "b": memory[2:5]},
        {"a": memory[:5:2], "b": memory[4:9:2]},
    ):
        with pytest.raises(PatchError, match="shares memory with another tensor of the run"):
            WeightReceiver(views).receive(patch)
        assert not memory.any()
    square = whole_patch(1, {"a": torch.zeros(3, 3)}, {"a": change([1])})
    with pytest.raises(PatchError, match="'a' shares memory with another tensor of the run, or"):
        WeightReceiver({"a": memory.as_strided((3, 3), (1, 1))}).receive(square)
    assert WeightReceiver({"a": memory[:5:2], "b": memory[1:6:2]}).receive(patch)  # by turns
    assert memory.tolist() == [0, 0, 7, 0, 0, 5, 0, 0, 0]


def test_views_are_made_anew_for_a_model_that_moves(published):
    patches, _, weights = published
    net = Net()
    receiver = WeightReceiver(lambda: {n: t.detach() for n, t in net.state_dict().items()})
    receiver.receive(patches[1])
    for param in net.parameters():
        param.data = param.data.clone()
    receiver.receive(patches[2])
    assert_same(net, weights[2])
    for wrong in ("patch.safetensors", None):
        with pytest.raises(TypeError, match="patch: expected a Patch or its bytes, got"):
            WeightReceiver(Net()).receive(wrong)
    with pytest.raises(TypeError, match="model: expected a module, a mapping of tensors, or"):
        WeightReceiver("a folder")


def test_a_model_may_move_and_be_rebuilt(published):
    """Other memory with the same values, as `to` and `load_state_dict(assign=True)` make."""
    patches, _, weights = published
    net = Net()
    receiver = WeightReceiver(net)
    receiver.receive(patches[1])
    for param in net.parameters():
        param.data = param.data.clone()
    receiver.receive(patches[2])
    assert_same(net, weights[2])
    net.load_state_dict(states(net), assign=True)
    receiver.receive(patches[3])
    assert_same(net, weights[3])


def test_tied_names_that_the_model_holds_twice(published):
    patches, _, weights = published
    net = Net()
    net.out.weight = nn.Parameter(net.out.weight.detach().clone())
    receiver = WeightReceiver(net)
    for version in (1, 2, 3):
        receiver.receive(patches[version])
    assert_same(net, weights[3])
    receiver.reset()
    assert_same(net, weights[0])


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_write_that_fails_is_undone(published, error: type[BaseException], monkeypatch):
    patches, wholes, weights = published
    net = Net()
    receiver = WeightReceiver(net)
    receiver.receive(patches[1])
    receiver.receive(patches[2])
    write, whole = _targets.Target.write, _targets.Target.write_whole
    counts = {"left": 0}

    def fails(kind: Any) -> Any:
        def writes(*arguments: Any) -> None:
            counts["left"] -= 1
            if counts["left"] == 0:
                raise error("planted")
            kind(*arguments)

        return writes

    monkeypatch.setattr(_targets.Target, "write", fails(write))
    monkeypatch.setattr(_targets.Target, "write_whole", fails(whole))
    for attempt in (
        lambda: receiver.receive(patches[3]),
        lambda: receiver.receive(wholes[5]),
        receiver.rollback,
        receiver.reset,
    ):
        for number in range(1, 8):
            counts["left"] = number
            with pytest.raises(error, match="planted"):
                attempt()
            counts["left"] = 0
            assert receiver.version == 2
            assert_same(net, weights[2])
            receiver.verify()
    assert receiver.receive(patches[3])
    assert_same(net, weights[3])


@pytest.mark.parametrize("number", range(1, 12))
def test_a_write_that_fails_after_other_tensors_came_is_undone(published, number, monkeypatch):
    patches, _, weights = published
    net = Net()
    receiver = WeightReceiver(net)
    receiver.receive(patches[1])
    receiver.receive(patches[2])
    few = {"body.bias": weights[0]["body.bias"], "words.weight": weights[0]["words.weight"]}
    other = whole_patch(9, few, {"body.bias": change([1]), "words.weight": change([3])})
    write, left = _targets.Target.write, [number]

    def fails(*arguments: Any) -> None:
        left[0] -= 1
        if left[0] == 0:
            raise RuntimeError("planted")
        write(*arguments)

    monkeypatch.setattr(_targets.Target, "write", fails)
    try:
        receiver.receive(other)
    except RuntimeError:
        assert receiver.version == 2
        assert_same(net, weights[2])
        receiver.verify()
        receiver.rollback()
        assert_same(net, weights[1])
    else:
        assert left[0] > 0  # there were fewer writes
        assert receiver.version == 9


def test_interrupts_at_every_line(published):
    """The model holds a whole version, and the receiver knows which."""
    patches, _, weights = published
    receiver = WeightReceiver(Net())

    def prepare():
        nonlocal receiver
        receiver = WeightReceiver(Net())
        receiver.receive(patches[1])

        def call():
            receiver.receive(patches[2])
            receiver.reset()

        return call

    lines = 0
    for ended in at_every_line(code_of(WeightReceiver, Held, Located, Target), prepare):
        lines += 1
        assert_same(receiver._model, weights[receiver.version])
        receiver.verify()
        assert receiver.version == 0 or not ended
    assert lines > 50


def test_other_tensors_come_or_the_old_ones_stay(published):
    """A whole patch with another manifest goes over the base, or nothing changes."""
    patches, _, weights = published
    net = Net()
    receiver = WeightReceiver(net)
    receiver.receive(patches[1])
    receiver.receive(patches[2])
    few = {"body.bias": weights[0]["body.bias"]}
    wrong = {"body.bias": weights[0]["body.bias"] + 1}
    with pytest.raises(PatchError, match="not that of the publisher's base"):
        receiver.receive(whole_patch(9, wrong, {"body.bias": change([1])}))
    assert receiver.version == 2
    assert_same(net, weights[2])
    receiver.rollback()
    assert_same(net, weights[1])
    assert receiver.receive(whole_patch(9, few, {"body.bias": change([1])}))
    expected = states(weights[0])
    expected["body.bias"][1] = 7.0
    assert_same(net, expected)
    with pytest.raises(PatchError, match="version 9 of run 'by hand', but the model holds 9"):
        receiver.receive(whole_patch(9, few, {"body.bias": change([2])}))
    receiver.reset()
    assert_same(net, weights[0])


def test_threads_see_whole_versions(published):
    """One receives, back and forth; others read under the lock."""
    patches, wholes, weights = published
    net = Net()
    receiver, faults, ended = WeightReceiver(net), [], threading.Event()
    receiver.receive(patches[1])
    sums = {version: weights[version]["words.weight"].double().sum() for version in range(6)}

    def read() -> None:
        while not ended.is_set():
            with receiver.lock:
                if net.words.weight.detach().double().sum() != sums[receiver.version]:
                    faults.append(receiver.version)

    readers = [threading.Thread(target=read) for _ in range(2)]
    for reader in readers:
        reader.start()
    for _ in range(30):
        receiver.receive(patches[2])
        receiver.receive(patches[3])
        receiver.rollback()
        receiver.receive(wholes[4])
        receiver.reset()
        receiver.receive(patches[1])
    ended.set()
    for reader in readers:
        reader.join()
    assert not faults


def test_in_and_out_of_inference_mode(published):
    patches, _, weights = published
    net = Net()
    receiver = WeightReceiver(net)
    with torch.inference_mode():
        receiver.receive(patches[1])
    receiver.receive(patches[2])
    with torch.inference_mode():
        receiver.receive(patches[3])
    assert_same(net, weights[3])
    receiver.verify()


def test_inference_tensors(published):
    patches, _, weights = published
    with torch.inference_mode():
        net = {name: tensor.clone() for name, tensor in weights[0].items()}
        receiver = WeightReceiver(net)
        receiver.receive(patches[1])
        assert_same(net, weights[1])
    with pytest.raises(PatchError, match="receive in inference mode"):
        WeightReceiver(copy.copy(net)).receive(patches[1])

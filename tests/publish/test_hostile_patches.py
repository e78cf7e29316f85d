"""Patches that are cut, damaged or forged: refused, and the model stays as it was."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from publish_cases import BASE, Net, Run, assert_same, change, signed, states, whole_patch

from sparse_optim.publish import (
    Patch,
    PatchError,
    WeightReceiver,
)


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_bytes_of_any_kind(published, kind):
    net = Net()
    assert WeightReceiver(net).receive(kind(published[0][1]))
    assert_same(net, published[2][1])


@pytest.mark.parametrize("kind", ["increment", "whole"])
def test_every_cut_is_refused(published, kind: str):
    patches, wholes, weights = published
    data = patches[2] if kind == "increment" else wholes[2]
    net = Net()
    receiver = WeightReceiver(net)
    receiver.receive(patches[1])
    for end in [*range(0, 16), *range(16, len(data), 97), *range(len(data) - 9, len(data))]:
        with pytest.raises(PatchError):
            receiver.receive(data[:end])
    assert receiver.version == 1
    assert_same(net, weights[1])
    assert receiver.receive(data)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_no_damage_goes_unnoticed(published, data):
    """Bits and bytes changed, cut out, doubled: refused, or it said the same in other words."""
    patches, wholes, weights = published
    clean = data.draw(st.sampled_from([patches[2], wholes[2]]))
    net = Net()
    receiver = WeightReceiver(net)
    receiver.receive(patches[1])
    at = data.draw(st.integers(0, len(clean) - 1))
    length = data.draw(st.integers(0, 9))
    damaged = clean[:at] + data.draw(st.binary(max_size=9)) + clean[at + length :]
    try:
        receiver.receive(damaged)
    except PatchError:
        assert receiver.version == 1
    assert receiver.version in (1, 2)
    assert_same(net, weights[receiver.version])
    receiver.verify()


def test_forged_patches_need_the_key(published):
    _, wholes, weights = published
    run = Run(publisher={"key": b"secret"})
    ours, theirs = run.next(), Patch.from_bytes(wholes[1])
    net = Net()
    receiver = WeightReceiver(net, key=b"secret")
    for forged in (
        theirs,
        replace(ours, value=theirs.value + 1),
        signed(replace(ours, value=ours.value + 1)),
        signed(replace(ours, value=ours.value + 1), b"another"),
        replace(ours, version=7),
    ):
        with pytest.raises(PatchError, match="damaged or forged, or was made with another key"):
            receiver.receive(forged)
    assert_same(net, weights[0])
    assert receiver.receive(ours)
    with pytest.raises(PatchError, match="made with another key"):
        WeightReceiver(Net()).receive(ours)


@pytest.mark.parametrize(
    "positions", [[12], [-1], [2, 2], [3, 1], [2**31 - 1], [-(2**31)]], ids=str
)
def test_no_position_leads_out_of_a_tensor(positions: list[int]):
    """Digests are right here: someone with the key, or a fault of the publisher."""
    base = {name: tensor.clone() for name, tensor in BASE.items()}
    receiver = WeightReceiver(base)
    with pytest.raises(PatchError, match="positions that come twice, in another order, or beyond"):
        receiver.receive(whole_patch(1, BASE, {"a": change(positions)}))
    receiver.receive(whole_patch(1, BASE, {"a": change([2]), "b": change([0, 4])}))
    following = signed(whole_patch(2, BASE, {"a": change([2, *positions])}))
    fresh = torch.tensor(positions, dtype=torch.int32)
    step = replace(
        following,
        parent=receiver.digest, manifest=None, position=fresh,
        new=torch.tensor([len(positions), 0], dtype=torch.int32),
    )  # fmt: skip
    with pytest.raises(PatchError):
        receiver.receive(step)
    assert receiver.version == 1
    receiver.verify()
    receiver.reset()
    assert_same(base, BASE)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"value": torch.zeros(3, dtype=torch.uint8)}, "bytes of values of entries, got 3"),
        ({"dense": torch.zeros(3, dtype=torch.uint8)}, "bytes of whole tensors, got 3"),
        ({"new": torch.zeros(3, dtype=torch.int32)}, "expected 2 sparse tensors, got 3"),
        ({"parent": "0" * 32}, "does not build on its own base"),
    ],
)
def test_numbers_that_do_not_fit(change: dict[str, Any], message: str):
    patch = signed(replace(whole_patch(1, BASE, {}), **change))
    with pytest.raises(PatchError, match=message):
        WeightReceiver(states(BASE)).receive(patch)


def test_an_increment_of_other_tensors():
    receiver = WeightReceiver(states(BASE))
    first = whole_patch(1, BASE, {"a": change([1])})
    receiver.receive(first)
    new = torch.zeros(3, dtype=torch.int32)
    with pytest.raises(PatchError, match="expected 2 sparse tensors, got 3"):
        receiver.receive(replace(first, version=2, parent=first.digest, new=new, manifest=None))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": "2"}, "a patch of format '2', this sparse_optim reads '1'"),
        ({"format": "sparse_optim.delta"}, "a safetensors file, but no patch"),
        ({"version": "-1"}, "its version is '-1', expected a number"),
        ({"version": "9" * 19}, "expected a number"),
        ({"version": ""}, "expected a number"),
        ({"run": ""}, "its run is '', expected a name"),
        ({"digest": "x"}, "its digest is 'x', expected 32 hex digits"),
        ({"parent": "0" * 31}, "expected 32 hex digits"),
        ({"manifest": "{}"}, "its list of tensors is damaged"),
        ({"manifest": "[" * 100_000}, "its list of tensors is damaged"),
        ({"manifest": '[[],[],[],{"a":"b"}]'}, "ties a name to one that is not there"),
        ({"manifest": '[[["a",[2],"F32","x"],["a",[2],"F32","x"]],[],[],{}]'}, "names one twice"),
        ({"manifest": '[[["a",[2],"F32",""]],[],[],{}]'}, "has fingerprint ''"),
        ({"manifest": '[[["a",[2147483649],"F32","x"]],[],[],{}]'}, "2147483649 entries"),
        ({"manifest": '[[["a",[2.5],"F32","x"]],[],[],{}]'}, "has shape"),
        ({"manifest": '[[["a",[2],"F31","x"]],[],[],{}]'}, "dtype 'F31' is unknown"),
        ({"manifest": "[[" + ",".join("0" * 100_001) + "],[],[],{}]"}, "more than 100000 tensors"),
    ],
    ids=str,
)
def test_headers_that_are_no_patch(published, change: dict[str, str], message: str):
    data = published[1][1]
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    header["__metadata__"] |= change
    text = json.dumps(header).encode()
    with pytest.raises(PatchError, match=message):
        Patch.from_bytes(len(text).to_bytes(8, "little") + text + data[8 + size :])


def test_negative_numbers_of_new_entries(published):
    patch = whole_patch(1, BASE, {"a": change([1])})
    new = torch.tensor([2, -1], dtype=torch.int32)
    with pytest.raises(PatchError, match="numbers of new entries do not fit"):
        Patch.from_bytes(replace(patch, new=new).to_bytes())

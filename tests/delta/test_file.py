"""The delta file: round trips, damage, hostile input."""

import json
import os
import pickle
import struct
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch
from delta_cases import assert_identical, clone, example_base, example_delta, models
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_optim.delta import (
    Delta,
    DeltaError,
    SparseValues,
    apply_delta,
    content_fingerprint,
    increment,
    load_delta,
    merge,
    save_delta,
)

FAST = settings(max_examples=60, deadline=None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("deltas")


def good_file(path, packed):
    """The bytes of a good file with every kind of column, and its fingerprint."""
    base = example_base()
    parent, delta = example_delta(base, seed=3), example_delta(base, entries=4)
    delta = increment(delta, parent)
    assert delta.removed
    save_delta(delta, path, packed=packed)
    return path.read_bytes(), content_fingerprint(delta)


@pytest.fixture(scope="module")
def saved(folder):
    return good_file(folder / "good", packed=False)


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "packed"])
def either(folder, request):
    return good_file(folder / "either", packed=request.param)


def load_bytes(folder, data):
    path = folder / "candidate"
    path.write_bytes(data)
    return load_delta(path)


def parts(data):
    (size,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def joined(header, data):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


@FAST
@given(pair=models(), store_original=st.booleans(), packed=st.booleans())
def test_round_trip(folder, pair, store_original, packed):
    base, tuned = pair
    delta = Delta.from_models(base, tuned, store_original, method={"name": "x", "lr": 1e-3})
    save_delta(delta, folder / "round", packed=packed)
    loaded = load_delta(folder / "round")
    assert content_fingerprint(loaded) == content_fingerprint(delta)
    assert (loaded.method, loaded.fingerprints) == (delta.method, delta.fingerprints)
    assert_identical(merge(loaded, base), tuned)
    for name, values in delta.sparse.items():
        assert loaded.sparse[name].shape == values.shape
        assert loaded.sparse[name].dtype == values.dtype
        assert torch.equal(loaded.sparse[name].position, values.position)
    first = (folder / "round").read_bytes()
    save_delta(loaded, folder / "round", packed=packed)
    assert (folder / "round").read_bytes() == first


def test_every_column_survives(folder, either):
    delta = load_bytes(folder, either[0])
    expected = example_delta(example_base(), entries=4)
    assert content_fingerprint(delta) == either[1]
    assert delta.method == {"name": "id3", "budget": 12, "betas": [0.9, 0.999]}
    for name, values in delta.sparse.items():
        keep = torch.isin(expected.sparse[name].position, values.position)
        for column in ("position", "value", "unmask_step", "original"):
            wanted = getattr(expected.sparse[name], column)[keep]
            assert torch.equal(getattr(values, column), wanted)


def test_layout_is_plain_safetensors_of_six_bytes_an_entry(folder):
    base = example_base()
    tuned = clone(base)
    tuned["b.weight"].view(-1)[[3, 59]] += 1
    save_delta(Delta.from_models(base, tuned), folder / "plain", packed=False)
    tensors = safetensors.torch.load_file(folder / "plain")
    assert set(tensors) == {"position/b.weight", "value/b.weight"}
    assert tensors["position/b.weight"].dtype == torch.uint32
    assert tensors["position/b.weight"].tolist() == [3, 59]
    assert torch.equal(tensors["value/b.weight"], tuned["b.weight"].view(-1)[[3, 59]])
    assert sum(tensor.nbytes for tensor in tensors.values()) == 2 * 6


@pytest.mark.parametrize(
    ("numel", "dtype"), [(2**32, torch.uint32), (2**32 + 1, torch.int64), (2**40, torch.int64)]
)
def test_positions_of_huge_parameters(folder, numel, dtype):
    values = SparseValues(
        shape=(numel,),
        dtype=torch.float16,
        position=torch.tensor([0, 2**31, numel - 1]),
        value=torch.tensor([1.0, 2.0, 3.0]).half(),
    )
    delta = Delta(sparse={"x": values}, fingerprints={"x": "0" * 32})
    save_delta(delta, folder / "huge", packed=False)
    stored = safetensors.torch.load_file(folder / "huge")["position/x"]
    assert stored.dtype == dtype
    assert load_delta(folder / "huge").sparse["x"].position.tolist() == [0, 2**31, numel - 1]
    save_delta(delta, folder / "huge")
    assert load_delta(folder / "huge").sparse["x"].position.tolist() == [0, 2**31, numel - 1]


@pytest.mark.parametrize("length", [0x280, 0x380, 0x480, 0x580])
def test_a_header_length_like_a_pickle_start_still_loads(folder, length):
    save_delta(Delta(sparse={}, method={"pad": ""}), folder / "padded")
    (bare,) = struct.unpack("<Q", (folder / "padded").read_bytes()[:8])
    delta = Delta(sparse={}, method={"pad": "x" * (length - bare)})
    save_delta(delta, folder / "padded")
    assert (folder / "padded").read_bytes()[:8] == struct.pack("<Q", length)
    assert load_delta(folder / "padded").method == delta.method


def test_order_of_parameters_is_kept(folder):
    base = {f"p{index}": torch.zeros(50) for index in (3, 1, 2, 10)}
    tuned = {name: tensor.clone() for name, tensor in base.items()}
    for tensor in tuned.values():
        tensor[4] = 1
    save_delta(Delta.from_models(base, tuned), folder / "order")
    assert list(load_delta(folder / "order").sparse) == list(base)


def test_names_need_no_ascii(folder):
    delta = Delta(sparse={}, dense={"größe/頭.weight": torch.ones(1)}, method={"name": "é"})
    save_delta(delta, folder / "names")
    assert content_fingerprint(load_delta(folder / "names")) == content_fingerprint(delta)


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5, "zip", "legacy"])
def test_pickles_are_refused_and_not_run(folder, protocol):
    path, touched = folder / "pickle", folder / "touched"
    if protocol == "zip":
        torch.save({"x": Bomb(touched)}, path)
    elif protocol == "legacy":
        torch.save({"x": Bomb(touched)}, path, _use_new_zipfile_serialization=False)
    else:
        path.write_bytes(pickle.dumps(Bomb(touched), protocol))
    with pytest.raises(DeltaError, match="a pickle or zip archive"):
        load_delta(path)
    assert not touched.exists()


def test_missing_folder_and_other_files(folder):
    with pytest.raises(DeltaError, match="absent: no such file"):
        load_delta(folder / "absent")
    with pytest.raises(DeltaError, match="got a folder"):
        load_delta(folder)
    safetensors.torch.save_file({"x": torch.ones(2)}, folder / "model")
    with pytest.raises(DeltaError, match="a safetensors file, but no delta"):
        load_delta(folder / "model")
    for text, message in [(b"", "0 bytes are too few"), (b"GGUF" * 9, "header claims")]:
        with pytest.raises(DeltaError, match=message):
            load_bytes(folder, text)


def test_a_pipe_is_refused_instead_of_waited_for(folder):
    os.mkfifo(folder / "pipe")
    with pytest.raises(DeltaError, match="pipe: expected a regular file"):
        load_delta(folder / "pipe")


@pytest.mark.parametrize("length", [2**63, 2**64 - 1, 100_000_001, 2**24 + 1])
def test_hostile_header_lengths(folder, saved, length):
    data = struct.pack("<Q", length) + saved[0][8:]
    with pytest.raises(DeltaError, match=f"its header claims {length} bytes"):
        load_bytes(folder, data)


def edit(header, key, **changes):
    header[key] |= changes


def edit_sparse(header, **changes):
    table = json.loads(header["__metadata__"]["sparse"])
    table[0] |= changes
    header["__metadata__"]["sparse"] = json.dumps(table)


NAME = "a.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda h: edit(h, f"value/{NAME}", data_offsets=[0, 2**40]), "cut or damaged"),
        (lambda h: edit(h, f"value/{NAME}", data_offsets=[8, 4]), "cut or damaged"),
        (lambda h: edit(h, f"value/{NAME}", shape=[2**62, 2**62]), "cut or damaged"),
        (lambda h: edit(h, f"value/{NAME}", dtype="F99"), "cut or damaged"),
        (lambda h: edit(h, "dense/head.weight", data_offsets=[8, 40]), "cut or damaged"),
        (lambda h: h.pop(f"value/{NAME}"), "cut or damaged"),
        (lambda h: h.update({"extra": h.pop(f"value/{NAME}")}), r"'value/a.weight' is missing"),
        (lambda h: h.update({"x": {**EMPTY}}), "'x' is not accounted for"),
        (lambda h: h.update({"x": EMPTY | {"shape": [0, 2**63]}}), "shape: expected at most"),
        (lambda h: h.update({"x": EMPTY | {"dtype": "F8_E8M0"}}), "dtype F8_E8M0 is unknown"),
        (lambda h: h.pop("__metadata__"), "'format' is None"),
        (lambda h: edit(h, "__metadata__", format="other"), "'format' is 'other'"),
        (lambda h: edit(h, "__metadata__", format_version="5"), "version '5'.*upgrade"),
        (lambda h: h["__metadata__"].pop("format_version"), "version None"),
        (lambda h: h["__metadata__"].pop("method"), "metadata 'method' is missing"),
        (lambda h: h["__metadata__"].pop("sparse"), "metadata 'sparse' is missing"),
        (lambda h: h["__metadata__"].pop("content"), "do not match their hash"),
        (lambda h: edit(h, "__metadata__", method="[]"), "'method': expected a JSON dict"),
        (lambda h: edit(h, "__metadata__", method='{"a": 1}'), "do not match their hash"),
        (lambda h: edit(h, "__metadata__", method="["), "'method' is not JSON"),
        (lambda h: edit(h, "__metadata__", sparse="[" * 9**5), "is not JSON|nested"),
        (lambda h: edit(h, "__metadata__", sparse="9" * 5000), "'sparse' is not JSON"),
        (lambda h: edit(h, "__metadata__", sparse="[1]"), "expected name, shape, dtype"),
        (lambda h: edit(h, "__metadata__", dense="[1]"), "'1' is no name"),
        (lambda h: edit(h, "__metadata__", dense="[]"), "not accounted for"),
        (lambda h: edit(h, "__metadata__", parent="12"), "parent: expected 32"),
        (lambda h: h["__metadata__"].pop("parent"), "only an increment"),
        (lambda h: edit_sparse(h, name="b.weight"), "b.weight"),
        (lambda h: edit_sparse(h, name=None), "'None' is no name"),
        (lambda h: edit_sparse(h, shape="48"), "shape: expected a list"),
        (lambda h: edit_sparse(h, shape=[4.0]), "shape: expected a list"),
        (lambda h: edit_sparse(h, shape=[-48]), "shape: expected integers >= 0"),
        (lambda h: edit_sparse(h, shape=[10**30]), "shape: expected at most"),
        (lambda h: edit_sparse(h, shape=[2]), "expected 0 <= position < 2"),
        (lambda h: edit_sparse(h, shape=[2**33]), "expected torch.int64 for this shape"),
        (lambda h: edit_sparse(h, dtype="BF17"), "dtype: 'BF17' is unknown"),
        (lambda h: edit_sparse(h, dtype=[]), "dtype"),
        (lambda h: edit_sparse(h, dtype="F16"), "value: expected torch.float16"),
        (lambda h: edit_sparse(h, fingerprint="zz"), "hex digits"),
        (lambda h: edit_sparse(h, fingerprint="0" * 32), "do not match their hash"),
    ],
)
def test_malformed_headers(folder, saved, change, message):
    header, data = parts(saved[0])
    change(header)
    with pytest.raises(DeltaError, match=message) as error:
        load_bytes(folder, joined(header, data))
    assert str(folder / "candidate") in str(error.value)


EMPTY = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}


def rewritten(saved, key, values):
    """The file with other contents of one column, of the same length."""
    header, data = parts(saved[0])
    start, end = header[key]["data_offsets"]
    assert end - start == len(values)
    return joined(header, data[:start] + values + data[end:])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: [p[0], p[0], *p[2:]], "strictly ascending"),
        (lambda p: p[::-1], "strictly ascending"),
        (lambda p: [*p[:-1], 48], "0 <= position < 48, got 48"),
        (lambda p: [*p[:-1], 2**32 - 1], "got 4294967295"),
    ],
)
def test_bad_positions_in_a_file(folder, saved, change, message):
    header, data = parts(saved[0])
    start, end = header[f"position/{NAME}"]["data_offsets"]
    count = (end - start) // 4
    position = change(list(struct.unpack(f"<{count}I", data[start:end])))
    damaged = rewritten(saved, f"position/{NAME}", struct.pack(f"<{count}I", *position))
    with pytest.raises(DeltaError, match=message):
        load_bytes(folder, damaged)


def test_lengths_of_positions_and_values_must_agree(folder):
    delta = example_delta({"a.weight": example_base()["a.weight"]})
    save_delta(delta, folder / "lengths", packed=False)
    header, data = parts((folder / "lengths").read_bytes())
    start, end = header["value/a.weight"]["data_offsets"]
    header["value/a.weight"] |= {"shape": [5], "data_offsets": [start, end - 2]}
    header["junk"] = {"dtype": "BF16", "shape": [1], "data_offsets": [end - 2, end]}
    with pytest.raises(DeltaError, match=r"value: expected torch.bfloat16 of shape \(6,\)"):
        load_bytes(folder, joined(header, data))


def packed_delta():
    """4 of 48 entries of `a.weight`: 3 low bits of each; 4 marks among 4 + 6 high bits."""
    base = {"a.weight": example_base()["a.weight"]}
    delta = example_delta(base, entries=4)
    values = replace(delta.sparse["a.weight"], position=torch.tensor([1, 13, 14, 47]))
    return replace(delta, sparse={"a.weight": values}, dense={})


def test_packed_positions_are_those_of_the_documents(folder):
    save_delta(packed_delta(), folder / "packed")
    stored = safetensors.torch.load_file(folder / "packed")
    low, high = (stored[f"{part}/0"].tolist() for part in ("low", "high"))
    # 1 = 0|001, 13 = 1|101, 14 = 1|110, 47 = 5|111; marks at 0 + 0, 1 + 1, 1 + 2, 5 + 3.
    assert low == [0b10_101_001, 0b0000_1111]
    assert high == [0b0000_1101, 0b1]


@pytest.mark.parametrize(
    ("part", "values", "message"),
    [
        ("high", [0b0000_1111, 0b1], "expected 4 positions, got 5"),
        ("high", [0b0000_0101, 0b1], "expected 4 positions, got 3"),
        ("high", [0b0000_1101, 0b1000], "0 <= position < 48"),
        ("low", [0b10_110_001, 0b0000_1111], "strictly ascending"),
    ],
)
def test_bad_packed_positions_in_a_file(folder, part, values, message):
    save_delta(packed_delta(), folder / "packed")
    saved = (folder / "packed").read_bytes(), ""
    with pytest.raises(DeltaError, match=message):
        load_bytes(folder, rewritten(saved, f"{part}/0", bytes(values)))


@pytest.mark.parametrize("part", ["low", "high"])
def test_packed_positions_of_another_length_are_refused(folder, part):
    save_delta(packed_delta(), folder / "packed")
    header, data = parts((folder / "packed").read_bytes())
    begin, end = header[f"{part}/0"]["data_offsets"]
    header[f"{part}/0"] |= {"shape": [1], "data_offsets": [begin, begin + 1]}
    header["junk"] = {"dtype": "U8", "shape": [1], "data_offsets": [begin + 1, end]}
    with pytest.raises(DeltaError, match=f"{part} bits of 4 positions: expected 2 bytes"):
        load_bytes(folder, joined(header, data))


def test_numbers_of_parameters_are_not_their_names(folder):
    """Which may be numbers, too."""
    base = {name: torch.zeros(8) for name in ("1", "0", "value/2")}
    tuned = {name: tensor + at for at, (name, tensor) in enumerate(base.items(), 1)}
    tuned["0"][3:] = 0
    delta = Delta.from_models(base, tuned, store_original=True)
    step = increment(delta, replace(delta, sparse={"0": delta.sparse["0"]}))
    for each in (delta, step):
        save_delta(each, folder / "numbers")
        assert content_fingerprint(load_delta(folder / "numbers")) == content_fingerprint(each)


def test_packed_files_with_names_load(folder):
    """Format version 3."""
    base = example_base()
    delta = increment(example_delta(base, entries=4), example_delta(base, seed=3))
    assert delta.removed
    assert delta.dense
    save_delta(delta, folder / "numbered")
    header, data = parts((folder / "numbered").read_bytes())
    named = {"__metadata__": header.pop("__metadata__")}
    for key, place in header.items():
        kind, _, number = key.partition("/")
        is_dense = kind.startswith("dense")
        named[key if is_dense else f"{kind}/{list(delta.sparse)[int(number)]}"] = place
    edit(named, "__metadata__", format_version="3")
    assert content_fingerprint(load_bytes(folder, joined(named, data))) == (
        content_fingerprint(delta)
    )


@pytest.mark.parametrize(("share", "most", "whole"), [(0.01, 3.2, 3.3), (0.001, 3.6, 4.2)])
def test_bytes_of_an_entry(folder, share, most, whole):
    """In bfloat16, without unmask steps; the goal is 4.2, plain positions take 6."""
    numel = 1 << 19
    generator, sparse = torch.Generator().manual_seed(0), {}
    for at in range(50):
        position = (torch.rand(numel, generator=generator) < share).nonzero().view(-1)
        value = torch.zeros(len(position), dtype=torch.bfloat16)
        name = f"model.layers.{at}.self_attn.q_proj.weight"
        sparse[name] = SparseValues((1024, 512), torch.bfloat16, position, value)
    delta = Delta(sparse=sparse, fingerprints=dict.fromkeys(sparse, "0" * 32))
    save_delta(delta, folder / "sized")
    size = (folder / "sized").stat().st_size
    _, data = parts((folder / "sized").read_bytes())
    assert len(data) == delta.nbytes <= most * delta.num_entries
    assert size <= whole * delta.num_entries


def test_steps_may_be_left_out(folder):
    delta = example_delta(example_base())
    save_delta(delta, folder / "bare", unmask_steps=False)
    loaded = load_delta(folder / "bare")
    assert all(values.unmask_step is None for values in loaded.sparse.values())
    assert all(values.unmask_step is not None for values in delta.sparse.values())


def load_or_refuse(folder, data, fingerprint):
    """Damage is found, or harmless: never another delta, never another exception."""
    try:
        loaded = load_bytes(folder, data)
    except DeltaError:
        return
    assert content_fingerprint(loaded) == fingerprint


@settings(max_examples=400, deadline=None)
@given(
    flips=st.lists(st.tuples(st.integers(0, 10**6), st.integers(1, 255)), min_size=1, max_size=4)
)
def test_fuzz_flipped_bytes(folder, either, flips):
    data = bytearray(either[0])
    for at, flip in flips:
        data[at % len(data)] ^= flip
    load_or_refuse(folder, bytes(data), either[1])


@settings(max_examples=150, deadline=None)
@given(cut=st.integers(0, 10**6), tail=st.binary(max_size=9))
def test_fuzz_cut_and_appended(folder, either, cut, tail):
    data = either[0][: cut % len(either[0])] + tail
    if data != either[0]:
        with pytest.raises(DeltaError):
            load_bytes(folder, data)
    with pytest.raises(DeltaError):
        load_bytes(folder, either[0] + b"\0" + tail)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=8,
)


@settings(max_examples=200, deadline=None)
@given(header=JSON | st.binary(max_size=40), data=st.binary(max_size=20))
def test_fuzz_random_headers(folder, header, data):
    with pytest.raises(DeltaError):
        load_bytes(folder, joined(header, data))


@settings(max_examples=400, deadline=None)
@given(draw=st.data())
def test_fuzz_edited_headers(folder, either, draw):
    header, data = parts(either[0])
    for key in ("sparse", "dense", "method"):
        header["__metadata__"][key] = json.loads(header["__metadata__"][key])
    at = header
    while True:  # Walk to a random place in the header and put something else there.
        keys = sorted(at) if isinstance(at, dict) else range(len(at))
        key = draw.draw(st.sampled_from(keys))
        if not isinstance(at[key], dict | list) or not at[key] or draw.draw(st.booleans()):
            break
        at = at[key]
    at[key] = draw.draw(JSON | st.sampled_from([0, 2**31, 2**63, 2**64, -1, "F32", "a.weight"]))
    for part in ("sparse", "dense", "method"):
        if isinstance(header.get("__metadata__"), dict) and part in header["__metadata__"]:
            header["__metadata__"][part] = json.dumps(header["__metadata__"][part])
    load_or_refuse(folder, joined(header, data), either[1])


def test_a_damaged_file_never_reaches_the_model(folder):
    base = example_base() | {"head.weight": torch.zeros(2, 4)}
    before = clone(base)
    save_delta(example_delta(example_base()), folder / "whole")
    data = (folder / "whole").read_bytes()
    for at in range(0, len(data), 7):
        damaged = data[:at] + bytes([data[at] ^ 0x10]) + data[at + 1 :]
        try:
            delta = load_bytes(folder, damaged)
        except DeltaError:
            assert_identical(base, before)
        else:
            apply_delta(base, delta).revert()
            assert_identical(base, before)


def test_a_header_that_would_not_be_read_is_not_written(folder, monkeypatch):
    monkeypatch.setattr("sparse_optim.delta._format.MAX_HEADER_BYTES", 100)
    with pytest.raises(DeltaError, match="at most 100 are read"):
        save_delta(example_delta(example_base()), folder / "delta.safetensors")
    assert not (folder / "delta.safetensors").exists()

"""The hash of a loaded delta is taken once, as long as nobody changes it."""

from __future__ import annotations

import pytest
import torch

from sparse_optim.delta import (
    Delta,
    SparseValues,
    _content,
    content_fingerprint,
    increment,
    load_delta,
    merge_deltas,
    save_delta,
)
from sparse_optim.delta._content import known_fingerprint


def make_delta(value=1.0):
    position = torch.tensor([1, 4, 5])
    sparse = SparseValues(
        (3, 3), torch.float32, position, torch.full((3,), value), torch.zeros(3, dtype=torch.int32),
        torch.zeros(3),
    )  # fmt: skip
    return Delta(
        {"weight": sparse}, {"head": torch.ones(2)}, {"weight": "0" * 32}, {"name": ["id3", 2]}
    )


@pytest.fixture
def loaded(tmp_path):
    save_delta(make_delta(), tmp_path / "delta")
    return load_delta(tmp_path / "delta")


@pytest.fixture
def hashed(monkeypatch):
    """The deltas that are hashed."""
    deltas, real = [], content_fingerprint
    monkeypatch.setattr(_content, "content_fingerprint", lambda d: (deltas.append(d), real(d))[1])
    return deltas


def test_what_was_loaded_is_not_hashed_again(loaded, hashed):
    assert known_fingerprint(loaded) == content_fingerprint(loaded)
    merged = merge_deltas([loaded])
    assert merged.method["inputs"][0]["fingerprint"] == content_fingerprint(loaded)
    assert increment(make_delta(2.0), loaded).parent == content_fingerprint(loaded)
    assert hashed == []
    assert known_fingerprint(merged) == content_fingerprint(merged)
    assert hashed == [merged]


def write_value(delta):
    delta.sparse["weight"].value[0] = 7.0


def write_head(delta):
    delta.dense["head"].zero_()


def replace_head(delta):
    delta.dense["head"] = torch.ones(2) * 2


def replace_entries(delta):
    delta.sparse["weight"] = make_delta(3.0).sparse["weight"]


def rename(delta):
    delta.sparse["other"] = delta.sparse.pop("weight")
    delta.fingerprints["other"] = delta.fingerprints.pop("weight")


def drop_head(delta):
    del delta.dense["head"]


def change_method(delta):
    delta.method["name"].append("more")


CHANGES = (
    write_value, write_head, replace_head, replace_entries, rename, drop_head, change_method
)  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_what_was_changed_since_is_hashed(loaded, change):
    before = known_fingerprint(loaded)
    change(loaded)
    assert known_fingerprint(loaded) == content_fingerprint(loaded) != before


def test_a_changed_delta_is_saved_as_it_is(loaded, tmp_path):
    loaded.sparse["weight"].value.numpy()[0] = 7.0  # no counter moves
    save_delta(loaded, tmp_path / "again")
    assert load_delta(tmp_path / "again").sparse["weight"].value.tolist() == [7.0, 1.0, 1.0]

"""The benchmark of increments: its deltas, and what it times."""

from __future__ import annotations

import pytest

from bench.increments import GONE, LIMIT, MOVED, measure, two_deltas
from sparse_optim.delta import content_fingerprint, increment

pytestmark = pytest.mark.usefixtures("one_thread")


def test_two_deltas_of_one_run():
    pytest.importorskip("transformers", reason="transformers is not installed")
    parent, delta = two_deltas("MiniLM")
    step = increment(delta, parent)
    gone = sum(position.numel() for position in step.removed.values())
    assert gone == pytest.approx(GONE * parent.num_entries, rel=0.05)
    new = GONE + (1 - GONE) * MOVED
    assert step.num_entries == pytest.approx(new * delta.num_entries, rel=0.05)
    again, _ = two_deltas("MiniLM")
    assert content_fingerprint(again) == content_fingerprint(parent)


def test_every_subject_is_timed():
    pytest.importorskip("transformers", reason="transformers is not installed")
    result = measure("tiny", rounds=1)
    assert next(iter(result["ms"])) == LIMIT
    assert len(result["ms"]) == 6
    assert all(len(record["us"]) == 1 for record in result["records"])

"""A short run of bench.fuzz; `make soak` runs it for minutes."""

from __future__ import annotations

from bench.fuzz import BATCH, KINDS, fuzz, wrongs


def test_damaged_files_crash_nothing_and_half_change_nothing():
    found = fuzz(seconds=0, seed=7)
    assert found["faults"] == []
    assert wrongs(found) == 0
    assert found["kinds"].keys() == KINDS.keys()
    for kind, counts in found["kinds"].items():
        assert counts.keys() <= {"inputs", "refused", "loaded"}, kind
        assert counts["inputs"] == BATCH
        assert counts["refused"] > BATCH // 2
    found["kinds"]["patch"] |= {"half changed": 2, "crash": 1}
    assert wrongs(found) == 3

"""The merges that the benchmark compares do the same arithmetic."""

from __future__ import annotations

import pytest
import torch

from bench.merge import SETTINGS, dense_merge, make, measure, report
from sparse_optim.delta import merge, merge_deltas

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("method", ["sum", "ties"])
def test_checkpoints_and_deltas_merge_alike(method):
    base, deltas = make("tiny", 0.01, 3)
    dense = dense_merge(base, [merge(delta, base) for delta in deltas], method)
    ours = merge(merge_deltas(deltas, base, method=method, **SETTINGS[method]), base)
    moved = sum(int((ours[name] != base[name]).sum()) for name in base)
    assert moved > 1000
    for name, tensor in ours.items():  # the checkpoints' sums round in float32, at each step
        torch.testing.assert_close(dense[name], tensor, rtol=1e-6, atol=1e-9)


def test_the_report_has_every_subject():
    result = measure("tiny", 0.01, 2, rounds=1)
    assert len(result["ms"]) == 6 * len(SETTINGS)
    assert result["times_faster"]["dare, files: checkpoints"] == 1.0
    assert "| ties, files: deltas with originals |" in report(result)

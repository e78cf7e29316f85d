"""fuse_backward=True by the Triton kernels, interpreted: the same steps as the ordinary mode.

Run by test_interpreter.py. The candidates are those that the backend keeps (collect.py).
"""

from __future__ import annotations

import importlib
import os

import pytest
import torch
from backward_nets import SmallNet, train_both

from sparse_optim import D3, Random, Snip
from sparse_optim.backends import registry
from sparse_optim.engine import fused_backward
from sparse_optim.engine.collected import Collected
from sparse_optim.optim.masked_adamw import MaskedAdamW

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("run by test_interpreter.py", allow_module_level=True)
importlib.import_module("triton_interpreter").install()
kernels = importlib.import_module("sparse_optim.triton_kernels")


@pytest.fixture(autouse=True)
def _interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU, with small tiles and few programs, and many batches in one step."""
    monkeypatch.setitem(registry.BACKENDS, "triton", ("sparse_optim.triton_kernels", "cpu"))
    monkeypatch.setattr(fused_backward, "BATCH_BYTES", 1 << 9)
    monkeypatch.setattr(kernels, "TILE", 512)
    for name in ("candidate_tiles", "collect", "cut"):
        module = importlib.import_module(f"sparse_optim.triton_kernels.{name}")
        monkeypatch.setattr(module, "NUM_PROGRAMS", 1)
    listing = importlib.import_module("sparse_optim.triton_kernels.candidate_list")
    monkeypatch.setattr(listing, "ROOM", 4)  # four times the quota then


def assert_kept_by_the_backend(optimizer: MaskedAdamW) -> None:
    assert type(optimizer._fused_backward._candidates) is Collected


@pytest.mark.parametrize(
    ("dtype", "exp", "steps"),
    [
        (torch.float32, 0.0, 9),
        (torch.bfloat16, 2.0, 9),
        (torch.float32, 2.0, 4),
        (torch.bfloat16, 0.0, 4),
    ],
)
def test_same_run(dtype: torch.dtype, exp: float, steps: int) -> None:
    """With clipping, loss scaling and an overflow; the longer ones beyond the last unmasking."""
    fused, ordinary = train_both(
        dtype, steps, overflows=(2,), kind=SmallNet,
        backend="triton", importance=D3(exp=exp, eps=1e-2), total_steps=6, budget=200,
    )  # fmt: skip
    assert_kept_by_the_backend(fused)
    metrics = fused.metrics()
    unmasked = 200 * min(steps - 1, 6) // 6
    assert (metrics["step"], metrics["active"]) == (steps - 1, unmasked)
    assert metrics["skipped_steps"] == 1
    assert ordinary.grad_norm > 0.5  # clipped


@pytest.mark.parametrize("importance", [Random(3), Snip()])
def test_same_run_by_scores(importance: Random | Snip) -> None:
    fused, _ = train_both(
        torch.float32, 3, kind=SmallNet,
        backend="triton", importance=importance, total_steps=15, budget=200,
    )  # fmt: skip
    assert_kept_by_the_backend(fused)

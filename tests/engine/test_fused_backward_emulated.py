"""fuse_backward=True by the CUDA kernels, in the emulator: the same steps as the ordinary mode.

Counts are read as on a GPU.
"""

from __future__ import annotations

import emulated_cuda
import pytest
import torch
from backward_nets import Net, SmallNet, train_both

from sparse_optim import D3, Increment, MaskedAdamW, Random, Snip
from sparse_optim.backends import registry
from sparse_optim.engine import fused_backward

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def _emulated(cuda_emulator, monkeypatch):
    """As a backend, with many batches in one step."""
    emulated_cuda.configure(multiprocessors=2, seed=3)
    monkeypatch.setitem(registry.BACKENDS, "emulated", ("emulated_cuda", "cpu"))
    monkeypatch.setattr(fused_backward, "BATCH_BYTES", 1 << 9)


FEW, MANY = 90, 400  # budgets: 6 and 27 entries a step, where 20 is the most for one block


# Budgets of 6 and 27 entries a step: few enough for one block of `collect`, and not (csrc/cuda).
FEW, MANY = 90, 400


def train(dtype, steps, kind=SmallNet, **options):
    options = {"total_steps": 15, "budget": 200, **options}
    return train_both(dtype, steps, kind=kind, on_device=True, backend="emulated", **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("exp", [0.0, 2.0])
@pytest.mark.parametrize("budget", [FEW, MANY])
def test_same_run(dtype, exp, budget):
    """With clipping, loss scaling and overflows, beyond the last unmasking."""
    importance = D3(exp=exp, eps=1e-2)
    fused, ordinary = train(dtype, 20, overflows=(4, 12), importance=importance, budget=budget)
    metrics = fused.metrics()
    assert (metrics["step"], metrics["active"], metrics["skipped_steps"]) == (18, budget, 2)
    assert ordinary.grad_norm > 0.5  # clipped


@pytest.mark.parametrize("exp", [-1.0, -0.5, 0.5, 1.0])
@pytest.mark.parametrize("budget", [FEW, MANY])
def test_same_run_with_other_exponents(exp, budget):
    train(torch.float32, 4, importance=D3(exp=exp, eps=1e-2), budget=budget)


@pytest.mark.parametrize("importance", [Random(3), Snip()])
@pytest.mark.parametrize("budget", [FEW, MANY])
def test_same_run_by_scores(importance, budget):
    train(torch.float32, 4, importance=importance, budget=budget)


@pytest.mark.parametrize("importance", [D3(exp=2.0, eps=1e-2), Random(3)])
def test_same_run_of_a_backend_that_does_not_collect(importance, monkeypatch):
    monkeypatch.setattr(fused_backward, "can_collect", lambda engine: False)
    train(torch.bfloat16, 4, importance=importance)


def test_same_run_with_a_dense_head():
    """With clipping; two tensors in the pool are missing in two of three steps."""
    fused, _ = train(torch.float16, 3, kind=Net, max_grad_norm=0.01)
    assert fused.grad_norm > 0.01


@pytest.mark.parametrize(
    ("importance", "budget", "each", "end"),
    [
        (D3(), 90, 4, 10),
        (D3(exp=2.0), 90, 5, 10),
        (Random(3), 90, 6, 10),
        (D3(), 900, 7, 32),
        (D3(exp=2.0), 900, 7, 32),
        (Random(3), 900, 9, 32),
    ],
)
def test_launches_of_a_backward_pass(importance, budget, each, end):
    """Of a large tensor: the scan, and three or four to rank it, six if quotas are large; two more
    for scores, not counting those that compute them. The end takes more digits here than on a GPU.
    """
    params = [torch.nn.Parameter(torch.randn(40, 40)) for _ in range(6)]
    optimizer = MaskedAdamW(
        params, importance=importance, selection=Increment(budget, total_steps=9),
        backend="emulated", fuse_backward=True, max_grad_norm=1.0,
    )  # fmt: skip
    sum((param.sin() * index).sum() for index, param in enumerate(params)).backward()
    optimizer.step()
    loss = sum((param.sin() * index).sum() for index, param in enumerate(params))
    before = emulated_cuda.launches()
    loss.backward()
    assert emulated_cuda.launches() - before == 6 * each + 1  # and one that begins
    optimizer.step()
    assert emulated_cuda.launches() - before <= 6 * each + 1 + end
    assert optimizer.metrics()["active"] == 2 * budget // 9

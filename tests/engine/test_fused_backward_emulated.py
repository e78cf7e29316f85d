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


def train(dtype, steps, kind=SmallNet, **options):
    options = {"total_steps": 15, "budget": 200, **options}
    return train_both(dtype, steps, kind=kind, on_device=True, backend="emulated", **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("exp", [0.0, 2.0])
def test_same_run(dtype, exp):
    """With clipping, loss scaling and overflows, beyond the last unmasking."""
    fused, ordinary = train(dtype, 20, overflows=(4, 12), importance=D3(exp=exp, eps=1e-2))
    metrics = fused.metrics()
    assert (metrics["step"], metrics["active"], metrics["skipped_steps"]) == (18, 200, 2)
    assert ordinary.grad_norm > 0.5  # clipped


@pytest.mark.parametrize("exp", [-1.0, -0.5, 0.5, 1.0])
def test_same_run_with_other_exponents(exp):
    train(torch.float32, 4, importance=D3(exp=exp, eps=1e-2))


@pytest.mark.parametrize("importance", [Random(3), Snip()])
def test_same_run_by_scores(importance):
    train(torch.float32, 4, importance=importance)


def test_same_run_with_a_dense_head():
    """With clipping; two tensors in the pool are missing in two of three steps."""
    fused, _ = train(torch.float16, 3, kind=Net, max_grad_norm=0.01)
    assert fused.grad_norm > 0.01


@pytest.mark.parametrize(("importance", "each"), [(D3(), 4), (D3(exp=2.0), 5), (Random(3), 6)])
def test_launches_of_a_backward_pass(importance, each):
    """Of a large tensor: the scan, and three or four to rank it; two more for scores, not counting
    those that compute them."""
    params = [torch.nn.Parameter(torch.randn(40, 40)) for _ in range(6)]
    optimizer = MaskedAdamW(
        params, importance=importance, selection=Increment(90, total_steps=9), backend="emulated",
        fuse_backward=True, max_grad_norm=1.0,
    )  # fmt: skip
    sum((param.sin() * index).sum() for index, param in enumerate(params)).backward()
    optimizer.step()
    loss = sum((param.sin() * index).sum() for index, param in enumerate(params))
    before = emulated_cuda.launches()
    loss.backward()
    assert emulated_cuda.launches() - before == 6 * each + 1  # and one that begins
    optimizer.step()
    assert emulated_cuda.launches() - before <= 6 * each + 1 + 10
    assert optimizer.metrics()["active"] == 20

"""Time each operation alone, on MiniLM shapes: python -m pytest bench/test_kernels.py

This is not part of the test suite. Each call starts from the same half-filled active set. The
summary shows unavoidable bytes over the median time, and the share of a plain read in the same
session.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from bench.clocks import FLUSH_BYTES
from bench.shapes import DTYPES, MODELS, grads_of, make_params
from bench.subjects import midway, reads, snapshot
from sparse_optim.backends import cpp

ROUNDS, WARMUP = 30, 3
BUDGET = 320_000
QUOTAS = (32, 3200)
EXPS = (0.0, 2.0)


@pytest.fixture(scope="module", params=list(DTYPES))
def params(request: pytest.FixtureRequest) -> list[Tensor]:
    """Draw parameters of MiniLM, with gradients."""
    return make_params(MODELS["MiniLM"], DTYPES[request.param])


@pytest.fixture(scope="module")
def flush() -> Tensor:
    """Allocate the bytes that are written before each call to evict the caches."""
    return torch.zeros(FLUSH_BYTES // 4)


@pytest.fixture(autouse=True)
def _no_grad() -> Any:
    with torch.no_grad():
        yield


def cool(flush: Tensor) -> None:
    """Evict the caches."""
    flush.add_(1.0)


class Step:
    """An optimizer with half of its budget active, which runs a step operation by operation."""

    operations = ("scan", "cut", "append", "clip", "update")

    def __init__(self, params: list[Tensor], quota: int, exp: float, flush: Tensor) -> None:
        self.optimizer = midway(params, BUDGET, quota, exp)
        self.engine = self.optimizer.engine
        self.grads = self.engine.bind([])
        self.flush = flush
        self.restore = snapshot(self.optimizer)
        self.active = int(self.engine.active.progress[1])
        self.grad_bytes = sum(grad.nbytes for grad in self.grads.pool)
        self.tiles = self.engine.work.tiles.max.numel()

    def call(self, name: str) -> None:
        """Run one operation."""
        argument = self.optimizer.max_grad_norm if name == "clip" else self.grads
        getattr(self.engine, name)(argument)

    def before(self, name: str) -> Callable[[], None]:
        """Return a function that runs the operations before `name`, from the start of the step."""

        def run() -> None:
            self.restore()
            self.engine.begin(self.optimizer.param_groups)
            for earlier in self.operations[: self.operations.index(name)]:
                self.call(earlier)
            cool(self.flush)

        return run

    def time(self, benchmark: Any, name: str, moved_bytes: int) -> None:
        """Benchmark one operation."""
        benchmark.extra_info["moved_bytes"] = moved_bytes
        benchmark.pedantic(
            self.call, (name,), setup=self.before(name), rounds=ROUNDS, warmup_rounds=WARMUP
        )


@pytest.mark.parametrize("by", range(3), ids=["norm", "max", "numpy"])
def test_read(benchmark: Any, params: list[Tensor], flush: Tensor, by: int) -> None:
    """Read the gradients by a reduction, to measure the bandwidth of the memory."""
    subject = reads(grads_of(params))[by]
    benchmark.extra_info["moved_bytes"] = subject.moved_bytes
    benchmark.pedantic(subject.run, setup=lambda: cool(flush), rounds=ROUNDS, warmup_rounds=WARMUP)


def test_scan(benchmark: Any, params: list[Tensor], flush: Tensor) -> None:
    """Count gradients, positions and gradients of active entries, and a maximum per tile."""
    step = Step(params, QUOTAS[0], EXPS[0], flush)
    step.time(benchmark, "scan", step.grad_bytes + 8 * step.active + 4 * step.tiles)


@pytest.mark.parametrize("exp", EXPS)
@pytest.mark.parametrize("quota", QUOTAS)
def test_cut(benchmark: Any, params: list[Tensor], flush: Tensor, quota: int, exp: float) -> None:
    """Count tile maxima, without the tiles that the cut opens."""
    step = Step(params, quota, exp, flush)
    step.time(benchmark, "cut", 4 * step.tiles)
    assert int(step.engine.work.new.count) == quota


@pytest.mark.parametrize("quota", QUOTAS)
def test_append(benchmark: Any, params: list[Tensor], flush: Tensor, quota: int) -> None:
    """Count position, moments, age and gradient, of half of the entries on average."""
    step = Step(params, quota, EXPS[0], flush)
    arrays = 5 if params[0].dtype == torch.float32 else 6
    step.time(benchmark, "append", arrays * 4 * step.active)
    assert int(step.engine.active.progress[1]) == step.active + quota


@pytest.mark.parametrize("what", ["sampled", "dense"])
@pytest.mark.parametrize(("outputs", "inputs"), [(768, 768), (3072, 768), (768, 3072)])
@pytest.mark.parametrize("dtype", list(DTYPES))
def test_sampled_grad(
    benchmark: Any, flush: Tensor, dtype: str, outputs: int, inputs: int, what: str
) -> None:
    """Count both matrices, 1,024 tokens of them, and 8 bytes for each of 0.37% active entries."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1024, inputs, generator=generator).to(DTYPES[dtype])
    grad = torch.randn(1024, outputs, generator=generator).to(DTYPES[dtype])
    size = inputs * outputs
    position = torch.randperm(size, generator=generator)[: int(0.0037 * size)].sort().values.int()
    out = torch.zeros(position.numel())
    benchmark.extra_info["moved_bytes"] = x.nbytes + grad.nbytes + 8 * out.numel()

    def sampled() -> None:
        cpp.sampled_grad(x, grad, position, False, out)

    def dense() -> Tensor:
        return grad.t() @ x

    benchmark.pedantic(
        sampled if what == "sampled" else dense, setup=lambda: cool(flush), rounds=ROUNDS,
        warmup_rounds=WARMUP,
    )  # fmt: skip


def test_update(benchmark: Any, params: list[Tensor], flush: Tensor) -> None:
    """Count 28 bytes of state per active entry, and its value or master read and written."""
    step = Step(params, QUOTAS[0], EXPS[0], flush)
    value = 8 if params[0].dtype == torch.float32 else 10
    step.time(benchmark, "update", (28 + value) * step.active)

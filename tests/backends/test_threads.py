"""Threads: any number of them gives the same bits, and optimizers in several do not meet."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch
from op_cases import DTYPES, assert_same_bits, make_case
from training import give_grads, new_params

from sparse_optim import D3, IncrementalMaskedAdamW

cpp = pytest.importorskip(
    "sparse_optim.backends.cpp", reason="the C++ extension has not been built"
)

SHAPES = ((200, 400), (70_001,), (1,), (0,), (513,))


@pytest.fixture(autouse=True)
def _thread_count_as_it_was() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def train(dtype: torch.dtype, seed: int, exp: float = 0.0, steps: int = 3) -> list[torch.Tensor]:
    """All results of a run: parameters, state, norms."""
    params = new_params(*SHAPES, dtype=dtype, seed=seed)
    optimizer = IncrementalMaskedAdamW(
        params, lr=0.01, budget=30_000, total_steps=6, importance=D3(exp, 0.1), max_grad_norm=1.0,
        backend="cpp", unmask_steps=1.0,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    results = []
    for step in range(steps):
        give_grads(params, ["normal", "ties", "rows"][step % 3], generator)
        optimizer.step()
        results.append(optimizer.grad_norm.clone())
    active = optimizer.engine.active
    names = ("position", "exp_avg", "exp_avg_sq", "unmask_step", "master", "offsets", "progress")
    return results + [getattr(active, name) for name in names] + [p.detach() for p in params]


def assert_same_run(got: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    assert len(got) == len(expected)
    for a, b in zip(got, expected, strict=True):
        assert_same_bits(a, b)


@pytest.mark.parametrize("exp", [0.0, -1.0])
@pytest.mark.parametrize("dtype", DTYPES)
def test_thread_counts_give_the_same_bits(dtype, exp):
    """The norm too: partial sums are fixed, whoever adds them."""
    runs = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        runs.append(train(dtype, seed=3, exp=exp))
    for run in runs[1:]:
        assert_same_run(run, runs[0])


def test_thread_counts_give_the_same_cut_where_candidates_overflow_the_buffer():
    results = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        case = make_case([400_000, 300_000], quota=50_000, kind="ties", num_active=1000)
        case.step(cpp, until="cut")
        results.append([case.work.new.tensor, case.work.new.position, case.work.new.threshold])
    for result in results[1:]:
        assert_same_run(result, results[0])


@pytest.mark.parametrize("exp", [0.0, 2.0])
@pytest.mark.parametrize("quota", [3000, 70_000])
def test_thread_counts_give_the_same_cut_where_rows_differ_in_scale(quota, exp):
    generator = torch.Generator().manual_seed(1)
    rows = torch.rand(1500, 1, generator=generator) ** 4
    grad = (torch.randn(1500, 600, generator=generator) * rows).view(-1)
    results = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        case = make_case([900_000, 100], quota=quota, exp=exp, num_active=1000)
        case.grads[0] = grad
        case.step(cpp, until="cut")
        results.append([case.work.new.tensor, case.work.new.position, case.work.new.threshold])
    for result in results[1:]:
        assert_same_run(result, results[0])


def test_two_threads_stepping_two_optimizers():
    """Each as if it were alone; operators let go of the interpreter while they run."""
    alone = [train(torch.bfloat16, seed) for seed in (1, 2)]
    together: dict[int, list[torch.Tensor]] = {}
    start = threading.Barrier(2)

    def work(seed: int) -> None:
        start.wait()
        together[seed] = train(torch.bfloat16, seed)

    for _ in range(3):
        threads = [threading.Thread(target=work, args=(seed,)) for seed in (1, 2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for seed, expected in zip((1, 2), alone, strict=True):
            assert_same_run(together.pop(seed), expected)

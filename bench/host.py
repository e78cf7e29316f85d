"""Time what the host does in a step over 291 tensors (Llama-7B), all but the operations' own work.

The operations other than `bind_rows` do nothing. Gradients come from a backward pass. Both ways of
looking at tensors are timed in turn, in one process: all in one call, and one by one.

On a GPU, launches come on top; `host_us` of `bench.gpu_report` has both.
"""

from __future__ import annotations

import gc
import statistics
import sys
import time
from collections.abc import Callable
from types import ModuleType
from typing import cast
from unittest import mock

import torch

from bench.console import parser
from sparse_optim import D3, Increment, MaskedAdamW
from sparse_optim.backends import cpp, registry
from sparse_optim.backends.held import Held
from sparse_optim.backends.registry import BackendName

TENSORS = 291
NAME = "bench_idle"


def idle_backend() -> ModuleType:
    """The CPU backend without the work on entries."""
    module = ModuleType(NAME)
    for name, value in vars(cpp).items():
        if not name.startswith("__"):
            setattr(module, name, value)
    for name in ("scan", "clip", "rank", "cut", "append", "update"):
        setattr(module, name, lambda *args: None)
    return module


def timed(rounds: int, exp: float = 0.0) -> dict[str, list[float]]:
    """Microseconds of each step, by how tensors are looked at."""
    params = [torch.nn.Parameter(torch.randn(8, 8).bfloat16()) for _ in range(TENSORS)]
    ones = [torch.ones_like(param) for param in params]
    with (
        mock.patch.dict(sys.modules, {NAME: idle_backend()}),
        mock.patch.dict(registry.BACKENDS, {NAME: (NAME, "cpu")}),
    ):
        optimizer = MaskedAdamW(
            params, lr=1e-3, importance=D3(exp=exp), selection=Increment(1000, total_steps=10**6),
            max_grad_norm=1.0, backend=cast(BackendName, NAME),
        )  # fmt: skip

        def step() -> float:
            optimizer.zero_grad()
            torch.autograd.backward(params, ones)
            begin = time.perf_counter_ns()
            optimizer.step()
            return (time.perf_counter_ns() - begin) / 1e3

        def one_by_one() -> float:
            with mock.patch.object(Held, "read", return_value=None):
                return step()

        ways: dict[str, Callable[[], float]] = {"in one call": step, "one by one": one_by_one}
        spent: dict[str, list[float]] = {way: [] for way in ways}
        gc.disable()
        try:
            for _ in range(rounds):
                for way, run in ways.items():
                    spent[way].append(run())
        finally:
            gc.enable()
    return spent


def main() -> None:
    options = parser("host", __doc__)
    options.add_argument("--rounds", type=int, default=1000)
    rounds = options.parse_args().rounds
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {TENSORS} tensors")
    for exp in (0.0, -1.0):
        for way, spent in timed(rounds, exp).items():
            print(f"exp {exp:4}: {statistics.median(spent):6.1f} us, min {min(spent):6.1f}  {way}")


if __name__ == "__main__":
    main()

"""The running top-k against a full sort, and on a device whose counts the host does not read.

A fault planted by hand: the floor raised by a batch with fewer entries than the quota
(test_a_part_smaller_than_the_quota_sets_no_floor saw it).
"""

from __future__ import annotations

import pytest
import torch
from op_cases import EXPS, assert_same_bits, random_values
from oracle import score
from torch import Tensor

from sparse_optim.backends.scoring import tile_abs_max
from sparse_optim.engine.candidates import Candidates
from sparse_optim.engine.engine import Engine, Method
from sparse_optim.engine.pool import Pool
from sparse_optim.policy.importance import D3
from sparse_optim.policy.selection import Static

SIZES = (700, 0, 33, 2000, 5, 1500, 1024, 40, 3000)


def expected(params: list[Tensor], grads: list[Tensor], exp: float, eps: float, quota: int):
    """(tensor, position) of the best entries by a stable full sort, in global order."""
    values = [score(grad, param, exp, eps) for grad, param in zip(grads, params, strict=True)]
    flat = torch.cat([torch.from_numpy(value) for value in values])
    best = flat.sort(descending=True, stable=True).indices[:quota]
    best = best[flat[best] > 0].sort().values
    where = [(t, p) for t, size in enumerate(SIZES) for p in range(size)]
    return [where[index] for index in best.tolist()], flat


class Step:
    """Gradients of a pool, handed over in parts."""

    def __init__(self, backend: str, kind: str, exp: float, quota: int, on_host: bool = True):
        generator = torch.Generator().manual_seed(3)
        self.params = [torch.randn(size, generator=generator) for size in SIZES]
        self.grads = [random_values(size, torch.float32, kind, generator) for size in SIZES]
        names = tuple(map(str, range(len(SIZES))))
        pool = Pool(tuple(self.params), names, (0,) * len(SIZES), 1, 0, torch.device("cpu"))
        method = Method(D3(exp=exp, eps=0.1), Static(quota))
        self.engine = Engine(pool, method, torch.tensor([0, quota]), backend)
        self.engine.refresh()  # as the first step does
        self.new, self.candidates = self.engine.work.new, Candidates(self.engine)
        if not on_host:
            self.candidates._on_host = False
            self.candidates._slots = torch.arange(quota)
        self.no_inf = torch.zeros(())

    def add(self, first: int, last: int) -> None:
        """Tensors first..last - 1."""
        engine, grads = self.engine, self.grads[first:last]
        numbers = slice(engine.first_tiles[first], engine.first_tiles[last])
        tiles = engine.work.tiles.of_tensors(first, last, numbers)
        maxima = [tile_abs_max(grad, tiles.size).view(torch.int32) for grad in grads]
        tiles.max.copy_(torch.cat(maxima))
        active = engine.active.of_tensors(first, last)
        self.candidates.take(first, grads, None, tiles, active, self.no_inf)

    def found(self) -> tuple[list[tuple[int, int]], Tensor]:
        """The winners and their gradients."""
        grad = self.candidates.winners(self.no_inf)
        count = int(self.new.count)
        tensor, position = self.new.tensor[:count], self.new.position[:count]
        return list(zip(tensor.tolist(), position.tolist(), strict=True)), grad[:count]


@pytest.mark.parametrize("kind", ["normal", "ties", "equal", "rows", "zeros"])
@pytest.mark.parametrize("quota", [1, 20, 600, 9000])
@pytest.mark.parametrize(
    ("exp", "on_host"), [*((exp, True) for exp in EXPS), (0.0, False), (-1.0, False)]
)
def test_equals_a_full_sort(backend, kind, quota, exp, on_host):
    """In an order that no pool has, parts of one and of several tensors."""
    step = Step(backend, kind, exp, quota, on_host)
    for first, last in ((8, 9), (3, 4), (4, 8), (0, 3)):
        step.add(first, last)
    where, values = expected(step.params, step.grads, exp, 0.1, quota)
    found, grad = step.found()
    assert found == where
    assert_same_bits(grad, torch.tensor([step.grads[t][p] for t, p in where]))
    if where:
        starts = torch.tensor([0, *SIZES]).cumsum(0)
        least = min(float(values[starts[t] + p]) for t, p in where)
        assert float(step.new.threshold) == least


def test_candidates_stay_few(backend):
    """However many parts there are, about four quotas are kept."""
    step = Step(backend, "equal", 0.0, 100)
    for _ in range(3):
        for tensor in (8, 3, 5, 6, 0):
            step.add(tensor, tensor + 1)
            held = sum(part.numel() for part in step.candidates._index)
            assert held <= 4 * 100


def test_a_part_smaller_than_the_quota_sets_no_floor(backend):
    """All of a tensor of great gradients, and the best of a tensor of small ones."""
    step = Step(backend, "normal", 0.0, 3500)
    step.grads[3].mul_(1e-9)
    step.add(8, 9)
    step.add(3, 4)
    found, _ = step.found()
    assert [tensor for tensor, _ in found].count(8) == 3000
    assert [tensor for tensor, _ in found].count(3) == 500


def test_parts_below_the_floor_are_not_cut(backend, monkeypatch):
    step = Step(backend, "normal", 2.0, 50)
    step.add(8, 9)
    step.grads[3].mul_(1e-4)
    monkeypatch.setattr(step.candidates, "_cut", None)
    step.add(3, 4)
    assert step.candidates._index[-1].numel() == 50


def test_a_non_finite_step_has_no_winners(backend):
    step = Step(backend, "normal", 0.0, 50)
    step.add(8, 9)
    step.no_inf.fill_(1.0)
    step.add(3, 4)
    assert step.found()[0] == []
    assert float(step.new.threshold) == 0

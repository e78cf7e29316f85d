"""Norms by integer sums: against exact fractions, and the same bits however a tensor is cut."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from op_cases import assert_same_bits
from torch import nn

from sparse_optim import IncrementalMaskedAdamW, param_groups
from sparse_optim.engine import exact_norms as module
from sparse_optim.engine.exact_norms import exact_norms


class Together:
    """Processes of one thread: each takes what the others have given before."""

    def __init__(self, shards):
        self._peaks = torch.stack([module._peak(shard) for shard in shards]).max().view(1)
        self._sums = torch.zeros(1, 2, dtype=torch.int64)

    def greatest(self, numbers):
        numbers.copy_(self._peaks)

    def add(self, numbers):
        self._sums += numbers
        numbers.copy_(self._sums)


def norm_of_shards(shards):
    together, counted = Together(shards), torch.tensor([True])
    for shard in shards:
        norm = exact_norms([shard], together, counted)
    return float(norm)


FLOATS = st.floats(width=32, allow_nan=False, allow_infinity=False)


@given(st.lists(FLOATS, max_size=40))
def test_norms_are_the_rounded_roots_of_exact_sums(values):
    got = float(exact_norms([torch.tensor(values, dtype=torch.float32)])[0])
    exact = sum(Fraction(value) ** 2 for value in values)
    if exact:
        assert abs(Fraction(got) ** 2 / exact - 1) < Fraction(1, 2**50)
    else:
        assert got == 0


@given(st.lists(FLOATS, min_size=1, max_size=40), st.data())
def test_any_cut_gives_the_same_bits(values, data):
    whole = torch.tensor(values, dtype=torch.float32)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(values)), max_size=4)))
    shards = [whole[first:last] for first, last in zip([0, *cuts], [*cuts, None], strict=True)]
    assert norm_of_shards(shards) == float(exact_norms([whole])[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_long_tensors_are_read_piece_by_piece(dtype, monkeypatch):
    torch.manual_seed(0)
    whole = (torch.randn(301, 41) * torch.logspace(-3, 3, 41)).to(dtype)
    norm = float(exact_norms([whole])[0])
    assert norm == pytest.approx(math.sqrt(math.fsum(whole.double().square().flatten())), rel=1e-15)
    monkeypatch.setattr(module, "CHUNK", 7)
    assert float(exact_norms([whole])[0]) == norm
    assert norm_of_shards(list(whole.split(100))) == norm
    assert norm_of_shards(list(whole.split(13, dim=1))) == norm


def test_only_counted_shards_count_and_the_rest_is_as_a_scan_has_it():
    together = Together([torch.tensor([3.0, 4.0])])
    for counted in (True, False):
        norm = exact_norms([torch.tensor([3.0, 4.0])], together, torch.tensor([counted]))
    assert norm.tolist() == [5.0]
    odd = [
        torch.zeros(3),
        torch.zeros(0),
        torch.tensor([1.0, torch.nan]),
        torch.tensor([-torch.inf]),
    ]
    assert exact_norms(odd).tolist() == [0.0, 0.0, torch.inf, torch.inf]
    assert exact_norms([]).tolist() == []


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.classifier = nn.Linear(7, 10), nn.Linear(10, 3)

    def forward(self, data):
        return self.classifier(self.first(data).tanh())


def trained(**options):
    """Weights, and norms of five steps; in one more a gradient is infinite."""
    net, norms = Net(), []
    optimizer = IncrementalMaskedAdamW(
        param_groups(net, dense="classifier"), lr=0.05, budget=40, total_steps=6, unmask_steps=1.0,
        max_grad_norm=0.05, **options,
    )  # fmt: skip
    for step in range(6):
        data = torch.randn(4, 7, generator=torch.Generator().manual_seed(step))
        (net(data).square().mean() * (torch.inf if step == 2 else 1.0)).backward()
        optimizer.step()
        if step != 2:
            norms.append(float(optimizer.grad_norm))
        optimizer.zero_grad()
    assert optimizer.metrics()["skipped_steps"] == 1
    return [param.detach() for param in net.parameters()], norms


@pytest.mark.parametrize("norm", ["all", "active"])
@pytest.mark.usefixtures("one_thread")
def test_shard_invariant_runs_are_alike_in_backward_and_in_every_backend(norm):
    """Their first norm has the same bits in backends that else add up in other orders."""
    weights, norms = trained(norm=norm, backend="cpp", shard_invariant=True)
    assert norms[0] == trained(norm=norm, backend="reference", shard_invariant=True)[1][0]
    fused = trained(norm=norm, backend="cpp", shard_invariant=True, fuse_backward=True)
    assert norms == fused[1]
    for got, want in zip(fused[0], weights, strict=True):
        assert_same_bits(got, want)


@pytest.mark.usefixtures("one_thread")
def test_a_shard_invariant_run_is_an_ordinary_one_up_to_rounding():
    weights, norms = trained()
    exact, exact_norms = trained(shard_invariant=True)
    for got, want in zip(exact, weights, strict=True):
        torch.testing.assert_close(got, want)
    assert exact_norms == pytest.approx(norms, rel=1e-6)

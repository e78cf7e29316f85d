"""Theorem 1 of the ID3 paper: E[H] <= sqrt(Fisher), for each entry, for eps >= 1 and exp >= 0.

    H = |g| / (|theta| + eps)^exp,    Fisher = E[g^2],    g = d log p(y|x) / d theta

with expectations over the inputs and y ~ p(y|x), summed over all classes of a small softmax model.
The paper states it for eps >= 1 alone; its last step also needs exp >= 0, so that the divisor is at
least 1. Without either condition there are counterexamples.

Reference: Agarwal et al. 2025, Step-by-Step Unmasking, TACL 13:1767-1788, section 3.1.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from sparse_optim.policy.importance import D3

ROUNDING, SMALLEST = 1 + 1e-5, 1e-44  # scores are float32, and may be denormal


def expectations(model: nn.Module, inputs: Tensor, score: D3) -> list[tuple[Tensor, Tensor]]:
    """E[H] and E[g^2] of each parameter, exactly, the inputs being equally likely."""
    params = list(model.parameters())
    sums = [(torch.zeros_like(param), torch.zeros_like(param)) for param in params]
    for x in inputs:
        logs = model(x).log_softmax(-1)
        for log in logs:
            share = float(log.detach().exp()) / len(inputs)
            grads = torch.autograd.grad(log, params, retain_graph=True)
            for (importance, fisher), param, grad in zip(sums, params, grads, strict=True):
                importance += share * score("", param.detach(), grad)
                fisher += share * grad**2
    return sums


def new_model(seed: int, scale: float) -> nn.Module:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    for param in model.parameters():
        nn.init.normal_(param, std=scale)
    return model


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 1000),
    scale=st.floats(0.1, 3),
    eps=st.floats(1, 10),
    exp=st.floats(0, 4),
)
def test_the_importance_is_at_most_the_root_of_the_fisher_information(seed, scale, eps, exp):
    model = new_model(seed, scale)
    inputs = torch.randn(3, 3, generator=torch.Generator().manual_seed(seed)).double()
    for importance, fisher in expectations(model, inputs, D3(exp, eps)):
        assert bool((importance <= ROUNDING * fisher.sqrt() + SMALLEST).all())


@pytest.mark.parametrize(("exp", "eps"), [(-1.0, 1.0), (-0.5, 2.0), (1.0, 0.5), (2.0, 1e-3)])
def test_it_fails_for_a_negative_exp_and_for_a_small_eps(exp, eps):
    """Two classes of probability 1/2: |g| is the same for both, so that E|g| = sqrt(E[g^2])."""
    model = nn.Linear(1, 2, bias=False).double()
    nn.init.constant_(model.weight, 0.25)

    def ratio(score: D3) -> float:
        ((importance, fisher),) = expectations(model, torch.ones(1, 1).double(), score)
        return float((importance / fisher.sqrt()).max())

    assert ratio(D3(0.0, eps)) == pytest.approx(1, rel=1e-6)  # the bound is tight
    assert ratio(D3(exp, eps)) == pytest.approx((0.25 + eps) ** -exp, rel=1e-6)
    assert ratio(D3(exp, eps)) > 1.1

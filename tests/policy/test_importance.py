"""D3: what it accepts. What it computes is tested with the reference."""

import math

import pytest

from sparse_optim import D3


@pytest.mark.parametrize("exp", [-2.5, -1, 0, 0.5, 3])
@pytest.mark.parametrize("eps", [1e-30, 1e-3, 1, 100.0])
def test_any_finite_exponent_and_positive_eps(exp, eps):
    assert D3(exp, eps) == D3(exp=exp, eps=eps)
    assert hash(D3(exp, eps)) == hash(D3(exp, eps))


def test_default_is_the_gradients_magnitude():
    assert D3() == D3(exp=0.0, eps=1.0)


@pytest.mark.parametrize("exp", [math.nan, math.inf, -math.inf])
def test_exponents_that_are_not_finite_are_refused(exp):
    with pytest.raises(ValueError, match="exp must be a finite number"):
        D3(exp=exp)


@pytest.mark.parametrize("eps", [0.0, -1e-3, math.nan, math.inf])
def test_eps_must_be_positive(eps):
    with pytest.raises(ValueError, match="eps must be a finite number above 0"):
        D3(eps=eps)

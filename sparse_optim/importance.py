"""Importances: what ranks the frozen entries."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class D3:
    """Rank entries by gradient magnitude, weighed by the parameter's own magnitude.

        importance = |grad| / (|param| + eps)^exp

    exp = 0 ranks by the gradient alone, exp > 0 prefers small parameters, exp < 0 large ones.

    Args:
        exp: any real number.
        eps: > 0, in units of the parameter. For eps >= 1 and exp >= 0 the expected importance is
            at most the square root of the Fisher information (Theorem 1).

    Raises:
        ValueError: if eps is not positive or a number is not finite.

    Reference: Agarwal et al. 2025, equation 1.
    """

    exp: float = 0.0
    eps: float = 1.0

    def __post_init__(self) -> None:
        if not math.isfinite(self.exp):
            raise ValueError(f"D3: exp must be a finite number, got {self.exp}")
        if not (math.isfinite(self.eps) and self.eps > 0):
            raise ValueError(f"D3: eps must be a finite number above 0, got {self.eps}")

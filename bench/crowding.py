"""Test whether quality suffers because the largest gradients crowd into few input columns.

    python -m bench.crowding --data-folder GLUE_FOLDER --tasks trec50,conll2003 \
        --methods spread-d3,crowded-random --budgets 0.5% --output bench/results/crowding

Runs `sparse-optim experiment quality` with two more methods. Each changes one thing in static D3 or
in a random mask:

    spread-d3        score |grad| / root mean square of |grad| in its input column: greedy, spread
    crowded-random   select random entries of the sixteenth of each weight's input columns that has
                     the largest gradients: crowded, not greedy

If crowding were the cause, the first would beat static D3 and the second would be worse than a
random mask. The first treats the entries of a bias, norm or embedding as one column, the second
omits them.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor

from sparse_optim.cli.main import app
from sparse_optim.methods import METHODS, Method, MethodRequest
from sparse_optim.methods._request import masked_adamw
from sparse_optim.optim.masked_adamw import MaskedAdamW
from sparse_optim.policy.selection import Static

CROWDED_SHARE = 1 / 16
ABOUT = "tests the effect of crowding"


def has_columns(name: str, param: Tensor) -> bool:
    """Return whether the columns of a parameter are inputs of a Linear module."""
    return param.ndim == 2 and "embeddings" not in name


def spread(name: str, param: Tensor, grad: Tensor) -> Tensor:
    """Return |grad| relative to its input column, in the parameter's shape."""
    size = grad.detach().float().abs()
    mean = size.square().mean(0, keepdim=True) if has_columns(name, param) else size.square().mean()
    return size / mean.sqrt().clamp_min(1e-30)


class Crowded:
    """Score entries of the input columns with the largest gradients at random, others with zero."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, name: str, param: Tensor, grad: Tensor) -> Tensor:
        """Return scores in the parameter's shape."""
        if not has_columns(name, param):
            return torch.zeros_like(grad, dtype=torch.float32)
        size = grad.detach().float().square().sum(0)
        count = max(1, round(CROWDED_SHARE * size.numel()))
        keep = torch.zeros_like(size).scatter_(0, size.topk(count).indices, 1.0)
        return torch.rand(grad.shape, generator=self.generator) * keep


def spread_d3(request: MethodRequest) -> MaskedAdamW:
    """Build static D3 with scores relative to the column."""
    return masked_adamw(request, spread, Static(request.given_budget))


def crowded_random(request: MethodRequest) -> MaskedAdamW:
    """Build a random mask in few columns."""
    return masked_adamw(request, Crowded(request.seed), Static(request.given_budget))


if __name__ == "__main__":
    METHODS["spread-d3"] = Method(spread_d3, 5e-4, ABOUT)
    METHODS["crowded-random"] = Method(crowded_random, 5e-4, ABOUT)
    app(["experiment", "quality", *sys.argv[1:]])

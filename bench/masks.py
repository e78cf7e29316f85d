"""Run the quality experiment with masks that are not methods (yet): what could beat a random one?

    python -m bench.masks --data-folder GLUE_FOLDER --tasks trec50,conll2003,stsb \
        --methods tilt-0.5,consistent --budgets 112827,22565,11282 --output bench/results/masks

All choose once, among the weights of Linear modules, with O(budget) state afterwards:

    tilt-A       a sample in proportion to |grad|^A, without replacement: A = 0 is a random mask,
                 A = infinity static D3 (the Gumbel top-k of `Stochastic`, once)
    consistent   largest |sum grad| / sqrt(sum grad^2) over 16 batches: the sign agrees in all
    shares       random in each matrix, a matrix's part of the budget by its sum |grad|
    upper        random in the upper half of the layers: the backward pass can end there
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import islice

import torch
from torch import Tensor

from sparse_optim.cli.main import app
from sparse_optim.methods import METHODS, Method, MethodRequest
from sparse_optim.methods._calibrated import calibration_of
from sparse_optim.methods._matrices import _static, matrices_of
from sparse_optim.methods._request import masked_adamw
from sparse_optim.optim.masked_adamw import MaskedAdamW
from sparse_optim.policy.importance import Scores
from sparse_optim.policy.selection import Static

TILTS = (0.25, 0.5, 1.0)
BATCHES = 16
LAYER = re.compile(r"\.(\d+)\.")


def sums(request: MethodRequest) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Sums of gradients and of their squares over batches, of each matrix."""
    params = matrices_of(request)
    total = {name: torch.zeros_like(param) for name, param in params.items()}
    squares = {name: torch.zeros_like(param) for name, param in params.items()}
    request.model.eval()
    for batch in islice(calibration_of(request), BATCHES):
        loss = request.model(**batch).loss
        for name, grad in zip(
            params, torch.autograd.grad(loss, list(params.values())), strict=True
        ):
            total[name] += grad
            squares[name] += grad.square()
    request.model.train()
    return total, squares


def noise(request: MethodRequest, scores: dict[str, Tensor]) -> dict[str, Tensor]:
    """Standard exponentials, by name."""
    generator = torch.Generator().manual_seed(request.seed)
    return {
        name: torch.empty(score.shape).exponential_(generator=generator)
        for name, score in scores.items()
    }


def static(request: MethodRequest, scores: dict[str, Tensor]) -> MaskedAdamW:
    """The top of the scores over all matrices."""
    return masked_adamw(request, Scores(scores), Static(request.given_budget))


def tilt(request: MethodRequest, power: float) -> MaskedAdamW:
    """A sample in proportion to |grad|^power: the top of |grad|^power / exponential noise."""
    request = replace(request, rank="linear")
    total, _ = sums(request)
    drawn = noise(request, total)
    logs = {
        name: power * grad.abs().clamp_min(1e-30).log() - drawn[name].log()
        for name, grad in total.items()
    }
    least = min(float(log.min()) for log in logs.values())
    return static(request, {name: log - least + 1 for name, log in logs.items()})


def consistent(request: MethodRequest) -> MaskedAdamW:
    """Entries whose gradient has the same sign in all batches."""
    request = replace(request, rank="linear")
    total, squares = sums(request)
    return static(
        request, {n: g.abs() / squares[n].sqrt().clamp_min(1e-30) for n, g in total.items()}
    )


def shares(request: MethodRequest) -> MaskedAdamW:
    """Random entries, more of them in matrices with larger gradients."""
    request = replace(request, rank="linear")
    total, _ = sums(request)
    drawn = noise(request, total)
    weights = {name: float(grad.abs().sum()) for name, grad in total.items()}
    return _static(request, {name: 1 / drawn[name] for name in total}, weights)


def upper(request: MethodRequest) -> MaskedAdamW:
    """Random entries in the upper half of the layers."""
    request = replace(request, rank="linear")
    found = {name: LAYER.search(name) for name, _ in request.ranked}
    layers = {name: int(match[1]) for name, match in found.items() if match}
    half = (max(layers.values()) + 1) // 2
    chosen = {name for name, layer in layers.items() if layer >= half}
    request = replace(request, rank=lambda name, param: name in chosen)
    scores = {name: torch.ones_like(param) for name, param in request.ranked}
    drawn = noise(request, scores)
    return static(request, {name: 1 / drawn[name] for name in scores})


CANDIDATES: dict[str, Callable[[MethodRequest], MaskedAdamW]] = {
    **{f"tilt-{power:g}": partial(tilt, power=power) for power in TILTS},
    "consistent": consistent,
    "shares": shares,
    "upper": upper,
}


if __name__ == "__main__":
    METHODS.update({name: Method(build, 8e-3, name) for name, build in CANDIDATES.items()})
    app(["experiment", "quality", *sys.argv[1:]])

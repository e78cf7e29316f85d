"""Run the quality experiment with masks that are not methods: what could beat a random one?

    python -m bench.masks --data-folder GLUE_FOLDER --tasks trec50,conll2003,stsb \
        --methods tilt-0.5,consistent --budgets 112827,22565,11282 --output bench/results/masks

All choose once, among the weights of Linear modules, with O(budget) state afterwards; gradients are
those of 16 batches:

    tilt-A       a sample in proportion to |grad|^A, without replacement: A = 0 is a random mask,
                 A = infinity static D3 (the Gumbel top-k of `Stochastic`, once)
    even-A       as tilt-A, after scaling the rows and columns of |grad| to equal means
    regular      random, with equal numbers of entries in all rows, and in all columns, of a matrix
    consistent   largest |sum grad| / sqrt(sum grad^2): the sign agrees in all batches
    shares       random in each matrix, a matrix's part of the budget by its sum |grad|
    upper        random in the upper half of the layers: the backward pass can end there
    own-rates    random, with a rate for each matrix: all first steps have the same spectral norm
                 relative to the matrix
    d3-own-rates the largest |grad|, at such rates

bench/results/masks/README.md has the results.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import partial
from itertools import islice
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn

from sparse_optim.analysis.relative_step import spectral_norm
from sparse_optim.cli.main import app
from sparse_optim.methods import METHODS, Method, MethodRequest
from sparse_optim.methods._calibrated import calibration_of
from sparse_optim.methods._matrices import _static, matrices_of, spread
from sparse_optim.methods._request import masked_adamw
from sparse_optim.optim.masked_adamw import MaskedAdamW
from sparse_optim.policy.importance import Scores
from sparse_optim.policy.selection import Static, resolve_budget

BALANCINGS = 10  # columns then have equal means, rows nearly
POWERS = (0.5, 1.0, 2.0)
BATCHES = 16
LAYER = re.compile(r"\.(\d+)\.")
TINY = 1e-30  # below all gradients


def batches_of(request: MethodRequest) -> Iterable[Any]:
    """The batches that masks are chosen by."""
    return islice(calibration_of(request), BATCHES)


def sums(request: MethodRequest) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Sums of gradients and of their squares over batches, of each matrix."""
    params = matrices_of(request)
    total = {name: torch.zeros_like(param) for name, param in params.items()}
    squares = {name: torch.zeros_like(param) for name, param in params.items()}
    request.model.eval()
    for batch in batches_of(request):
        loss = request.model(**batch).loss
        for name, grad in zip(
            params, torch.autograd.grad(loss, list(params.values())), strict=True
        ):
            total[name] += grad
            squares[name] += grad.square()
    request.model.train()
    return total, squares


def noise(request: MethodRequest, scores: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Standard exponentials, by name."""
    generator = torch.Generator().manual_seed(request.seed)
    return {
        name: torch.empty(score.shape).exponential_(generator=generator)
        for name, score in scores.items()
    }


def static(request: MethodRequest, scores: Mapping[str, Tensor]) -> MaskedAdamW:
    """The top of the scores over all matrices."""
    return masked_adamw(request, Scores(dict(scores)), Static(request.given_budget))


def sample(request: MethodRequest, sizes: Mapping[str, Tensor], power: float) -> MaskedAdamW:
    """A sample in proportion to sizes^power: the top of sizes^power / exponential noise."""
    drawn = noise(request, sizes)
    logs = {
        name: power * size.clamp_min(TINY).log() - drawn[name].log() for name, size in sizes.items()
    }
    least = min(float(log.min()) for log in logs.values())
    return static(request, {name: log - least + 1 for name, log in logs.items()})


def tilt(request: MethodRequest, power: float) -> MaskedAdamW:
    """A sample in proportion to |grad|^power."""
    request = replace(request, rank="linear")
    total, _ = sums(request)
    return sample(request, {name: grad.abs() for name, grad in total.items()}, power)


def even(request: MethodRequest, power: float) -> MaskedAdamW:
    """A sample in proportion to |grad|^power that does not crowd into rows and columns."""
    request = replace(request, rank="linear")
    total, _ = sums(request)
    return sample(request, {name: balanced(grad.abs()) for name, grad in total.items()}, power)


def balanced(sizes: Tensor) -> Tensor:
    """Scale rows and columns of sizes >= 0, (rows, columns), until their means are 1.

    Entries of rows and columns that are 0 throughout become 1.
    """
    scaled = torch.ones_like(sizes)
    rows, columns = sizes.any(1).nonzero(), sizes.any(0).nonzero().flatten()
    inner = sizes[rows, columns]
    for _ in range(BALANCINGS):
        inner = inner / inner.mean(1, keepdim=True)
        inner = inner / inner.mean(0, keepdim=True)
    scaled[rows, columns] = inner
    return scaled


def regular(request: MethodRequest) -> MaskedAdamW:
    """Random entries, about as many in each row and in each column of a matrix."""
    request = replace(request, rank="linear")
    params = matrices_of(request)
    sizes = {name: param.numel() for name, param in params.items()}
    budget = resolve_budget(request.given_budget, sum(sizes.values()))
    counts = spread(budget, sizes, sizes)
    generator = torch.Generator().manual_seed(request.seed)
    return static(
        request,
        {name: regular_mask(p.shape, counts[name], generator) for name, p in params.items()},
    )


def regular_mask(shape: torch.Size, count: int, generator: torch.Generator) -> Tensor:
    """Ones, by permutations: a round puts one into each line of the longer side."""
    mask = torch.zeros(shape)
    longer, shorter = max(shape), min(shape)
    while (left := count - int(mask.sum())) > 0:
        one = torch.randperm(longer, generator=generator)[:left]
        several = [torch.randperm(shorter, generator=generator) for _ in range(0, longer, shorter)]
        other = torch.cat(several)[: len(one)]
        mask[(one, other) if shape[0] >= shape[1] else (other, one)] = 1.0
    return mask


def consistent(request: MethodRequest) -> MaskedAdamW:
    """Entries whose gradient has the same sign in all batches."""
    request = replace(request, rank="linear")
    total, squares = sums(request)
    return static(
        request, {n: g.abs() / squares[n].sqrt().clamp_min(TINY) for n, g in total.items()}
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
    drawn = noise(request, dict(request.ranked))
    return static(request, {name: 1 / drawn[name] for name in drawn})


@dataclass(frozen=True)
class OwnRates(MethodRequest):
    """A request with a factor on the learning rate of each matrix."""

    factors: Mapping[str, float] = field(default_factory=dict)

    def param_groups(self, named: Iterable[tuple[str, nn.Parameter]]) -> list[dict[str, Any]]:
        """A group for each parameter."""
        return [
            group | {"params": [(name, param)], "lr": group["lr"] * self.factors.get(name, 1.0)}
            for group in super().param_groups(named)
            for name, param in group["params"]
        ]


def own_rates(request: MethodRequest, by_gradient: bool) -> MaskedAdamW:
    """Rates of matrices in proportion to |W| / |S|, S the signs of the gradient on the mask.

    The mean over matrices of rate x |S| / |W| is the same as with a single rate.
    """
    request = replace(request, rank="linear")
    total, _ = sums(request)
    drawn = noise(request, total)
    scores = {n: g.abs() if by_gradient else 1 / drawn[n] for n, g in total.items()}
    every = torch.cat([score.reshape(-1) for score in scores.values()])
    budget = resolve_budget(request.given_budget, every.numel())
    least = every.topk(budget).values[-1]
    sizes = {}
    for name, param in matrices_of(request).items():
        step = spectral_norm(total[name].sign() * (scores[name] >= least))
        if step:
            sizes[name] = step / spectral_norm(param)
    factors = {name: fmean(sizes.values()) / size for name, size in sizes.items()}
    given = {each.name: getattr(request, each.name) for each in fields(request)}
    return static(OwnRates(**given, factors=factors), scores)


CANDIDATES: dict[str, Callable[[MethodRequest], MaskedAdamW]] = {
    **{f"tilt-{power:g}": partial(tilt, power=power) for power in POWERS},
    **{f"even-{power:g}": partial(even, power=power) for power in POWERS[1:]},
    "regular": regular,
    "consistent": consistent,
    "shares": shares,
    "upper": upper,
    "own-rates": partial(own_rates, by_gradient=False),
    "d3-own-rates": partial(own_rates, by_gradient=True),
}


if __name__ == "__main__":
    METHODS.update({name: Method(build, 8e-3, name) for name, build in CANDIDATES.items()})
    app(["experiment", "quality", *sys.argv[1:]])

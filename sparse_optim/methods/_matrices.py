"""Methods that choose a static mask in each weight matrix by itself: LIFT, GEM, SHiRA, Super.

The budget is spread over the matrices first; within each, the entries with the largest score are
taken. Matrices are the ranked parameters that `linear_weights` finds; all others stay frozen. Each
docstring says what its source leaves open and what we chose.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from sparse_optim.calibration import gradient, snip, wanda
from sparse_optim.methods._calibrated import calibration_of
from sparse_optim.methods._request import MethodRequest, masked_adamw
from sparse_optim.optim.masked_adamw import MaskedAdamW
from sparse_optim.optim.param_groups import linear_weights
from sparse_optim.policy.importance import Scores
from sparse_optim.policy.selection import Static, resolve_budget

FILTER_RANK = 64  # LIFT's r for its 7B model; 32 for 1B, 128 for 8B
CALIBRATION_BATCHES = 16


def lift(request: MethodRequest) -> MaskedAdamW:
    """Principal weights: the largest entries of a low-rank approximation (LIFT).

        score = |U_r S_r V_r^T|,  r = 64, or a quarter of the smaller dimension if that is less

    A matrix gets a part of the budget in proportion to rows + columns, as a LoRA of one rank would.
    The authors choose anew every few hundred steps; here the set is chosen once. They do not treat
    small matrices: hence the quarter.

    Reference: Liu et al. 2025, LIFT the Veil for the Truth, ICML (arXiv:2506.00772), and its code.
    """
    matrices = matrices_of(request)
    scores = {name: low_rank(param).abs() for name, param in matrices.items()}
    return _static(request, scores, {name: sum(param.shape) for name, param in matrices.items()})


def gem(request: MethodRequest) -> MaskedAdamW:
    """The largest |grad| / |param|, more of them in matrices of evenly spread sizes (GEM).

        score = |grad| / (|param| + 1e-8)
        part of a matrix ~ -sum p ln p,  p = |param| / sum |param|

    The paper says that a layer's number follows the entropy of its parameters' values; this form
    of it, and the gradient (the mean over 16 batches), are our choice.

    Reference: Kang et al. 2026, GEM, AAAI (arXiv:2508.16191).
    """
    matrices = matrices_of(request)
    grads = gradient(request.model, _some_batches(request), params=list(matrices))
    scores, entropies = {}, {}
    for name, param in matrices.items():
        size = param.detach().float().abs()
        scores[name] = grads[name] / (size + 1e-8)
        entropies[name] = float(torch.special.entr(size / size.sum()).sum())
    return _static(request, scores, entropies)


def shira(request: MethodRequest) -> MaskedAdamW:
    """The largest |param|, the same share of every matrix (SHiRA-WM).

    The paper's shares are 1 to 2%.

    Reference: Bhardwaj et al. 2024, Sparse High Rank Adapters, NeurIPS (arXiv:2406.13175).
    """
    scores = {name: param.detach().float().abs() for name, param in matrices_of(request).items()}
    return _same_share(request, scores)


def shira_grad(request: MethodRequest) -> MaskedAdamW:
    """The largest |grad|, the same share of every matrix (SHiRA-Grad): mean over 16 batches."""
    params = list(matrices_of(request))
    return _same_share(request, gradient(request.model, _some_batches(request), params=params))


def shira_snip(request: MethodRequest) -> MaskedAdamW:
    """The largest |grad param|, the same share of every matrix (SHiRA-SNIP): mean of 16 batches."""
    params = list(matrices_of(request))
    return _same_share(request, snip(request.model, _some_batches(request), params=params))


def super_tuning(request: MethodRequest) -> MaskedAdamW:
    """The largest |param| x norm of its input (Super): Wanda's outliers, the same share of each.

    The norms are those of 16 batches of the training data.

    Reference: Supra-Tuning, 2025 (submission 25479 to ICLR 2026); score: Sun et al. 2023, Wanda.
    """
    params = list(matrices_of(request))
    return _same_share(request, wanda(request.model, _some_batches(request), params=params))


def matrices_of(request: MethodRequest) -> dict[str, torch.nn.Parameter]:
    """The ranked weights of Linear modules, by name.

    Raises:
        ValueError: there are none.
    """
    weights = linear_weights(request.model)
    found = {name: param for name, param in request.ranked if id(param) in weights}
    if not found:
        raise ValueError("this method chooses in weights of Linear modules, and none is ranked")
    return found


def low_rank(param: Tensor, rank: int = FILTER_RANK) -> Tensor:
    """The closest matrix of a rank, float32 (Eckart and Young)."""
    rank = min(rank, max(1, min(param.shape) // 4))
    left, values, right = torch.linalg.svd(param.detach().float(), full_matrices=False)
    product: Tensor = left[:, :rank] * values[:rank] @ right[:rank]
    return product


def spread(budget: int, parts: Mapping[str, float], sizes: Mapping[str, int]) -> dict[str, int]:
    """Whole numbers that sum to the budget, in proportion to `parts`, none above its size.

    What a full matrix cannot take goes to the others; largest remainders first.

    Raises:
        ValueError: the budget is more than all sizes together.
    """
    if budget > sum(sizes.values()):
        raise ValueError(
            f"the budget is {budget} entries, and all matrices have {sum(sizes.values())}"
        )
    counts: dict[str, int] = {}
    left, rest = budget, dict(parts)
    while rest:
        total = sum(rest.values())
        exact = {name: left * part / total for name, part in rest.items()}
        full = [name for name, value in exact.items() if value >= sizes[name]]
        if not full:
            counts |= {name: int(value) for name, value in exact.items()}
            by_remainder = sorted(exact, key=lambda name: int(exact[name]) - exact[name])
            for name in by_remainder[: budget - sum(counts.values())]:
                counts[name] += 1
            break
        for name in full:
            counts[name] = sizes[name]
            left -= sizes[name]
            del rest[name]
    return counts


def _same_share(request: MethodRequest, scores: Mapping[str, Tensor]) -> MaskedAdamW:
    return _static(request, scores, {name: score.numel() for name, score in scores.items()})


def _static(
    request: MethodRequest, scores: Mapping[str, Tensor], parts: Mapping[str, float]
) -> MaskedAdamW:
    """The optimizer with the top of each matrix, fixed."""
    sizes = {name: score.numel() for name, score in scores.items()}
    budget = resolve_budget(request.given_budget, sum(sizes.values()))
    masks = {}
    for name, count in spread(budget, parts, sizes).items():
        mask = torch.zeros(sizes[name], device=scores[name].device)
        mask[scores[name].reshape(-1).topk(count).indices] = 1.0
        masks[name] = mask.view_as(scores[name])
    request = replace(request, rank=lambda name, param: name in masks)
    return masked_adamw(request, Scores(masks), Static(budget))


def _some_batches(request: MethodRequest) -> Iterable[Any]:
    return islice(calibration_of(request), CALIBRATION_BATCHES)

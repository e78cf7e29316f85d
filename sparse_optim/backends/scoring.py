"""Scores of entries, and the integer keys that rank them: part of the specification.

Only correctly rounded float32 operations, so that every backend gets the same bits.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sparse_optim.backends.noise import noise as exponential_noise
from sparse_optim.backends.noise import noise_at
from sparse_optim.backends.targets import target_at


def importance(grad: Tensor, param: Tensor, exp: float, eps: float) -> Tensor:
    """Score entries by D3:  |grad| / (|param| + eps)^exp  in float32.

    For exp in {-1, -0.5, 0, 0.5, 1, 2} only correctly rounded operations (+, *, /, sqrt) occur, so
    that every backend gets the same bits; other exponents go through `pow` and promise less.

    Args:
        grad: any shape and float dtype.
        param: same shape.
        exp: any real number; 0 ranks by gradient magnitude alone.
        eps: added to |param|, > 0.

    Returns:
        float32 of the same shape, >= 0 or NaN.

    Reference: Agarwal et al. 2025, equation 1.
    """
    magnitude = grad.float().abs()
    if exp == 0:
        return magnitude
    base = param.float().abs() + eps
    match exp:
        case 1.0:
            return magnitude / base
        case 2.0:
            return magnitude / (base * base)
        case 0.5:
            return magnitude / _sqrt(base)
        case -1.0:
            return magnitude * base
        case -0.5:
            return magnitude * _sqrt(base)
    # In float64, and rounded: the float32 `pow` of torch depends on where in a vector a number is.
    return magnitude / base.double().pow(exp).float()


def step_quota(targets: Tensor, progress: Tensor, max_quota: int) -> Tensor:
    """Entries to unmask in the next step: min(target(min(step + 1, T)) - active, max_quota).

    Args:
        targets: cumulative targets; see `targets`.
        progress: (3,), int64: applied steps, active entries, skipped steps.
        max_quota: most entries that one step may unmask.

    Returns:
        (), int64, on their device, >= 0.
    """
    target = target_at(targets, progress[:1] + 1)
    return (target - progress[1]).clamp(0, max_quota).squeeze(0)


def perturbed(score: Tensor, noise: Tensor, tensor: int, start: int = 0) -> Tensor:
    """score / sqrt(E), E the noise of each entry; score itself where `noise` is empty.

    Args:
        score: (numel,), float32, >= 0, of the entries of a pool tensor from `start` on.
        noise: (2,), int64: seed and step; or (0,).
        tensor: its index in the pool.
        start: a multiple of 4.
    """
    if noise.numel() == 0:
        return score
    seed, step = noise.tolist()
    return score / _sqrt(exponential_noise(seed, step, tensor, score.numel(), score.device, start))


def perturbed_at(score: Tensor, noise: Tensor, tensor: int, position: Tensor) -> Tensor:
    """`perturbed` of the entries at any positions of a pool tensor, (numel,) int64."""
    seed, step = noise.tolist()
    return score / _sqrt(noise_at(seed, step, tensor, position))


def importance_key(score: Tensor) -> Tensor:
    """Map scores to int32 keys of the same order; 0 (never unmasked) for scores of 0 and NaN.

    The bits of non-negative floats are ordered as the floats are.
    """
    return torch.where(score > 0, score.view(torch.int32), 0)


def tile_abs_max(param: Tensor, tile: int) -> Tensor:
    """Largest |param| of each tile, float32; what bounds the importance where exp < 0.

    NaN counts as 0: such entries are never unmasked, and must not hide the others of their tile.
    """
    magnitude = param.detach().reshape(-1).float().abs().nan_to_num(nan=0.0, posinf=math.inf)
    return tiles_of(magnitude, tile).amax(dim=1)


def tiles_of(flat: Tensor, tile: int) -> Tensor:
    """(numel,) -> (tiles, tile), padded with zeros."""
    padding = -flat.numel() % tile
    return torch.nn.functional.pad(flat, (0, padding)).view(-1, tile)


def _sqrt(value: Tensor) -> Tensor:
    """Correctly rounded square root, float32: torch's own may be off by one unit on the CPU."""
    return value.double().sqrt().float()

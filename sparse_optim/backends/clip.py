"""The norm of all gradients from those of the tensors, and the clip factor (the specification).

As torch.nn.utils.clip_grad_norm_ takes it, so that tensors may be scanned one by one, in any order,
and give the same bits.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sparse_optim.backends.scoring import tiles_of


def tensor_norm(flat: Tensor, tile: int) -> float:
    """Norm of a float32 vector; squares are summed in float32 in a tile, in float64 above."""
    return math.sqrt(float(tiles_of(flat.square(), tile).sum(dim=1).double().sum()))


def clip(
    norms: Tensor,
    grad_scale: Tensor,
    max_grad_norm: float,
    grad_norm: Tensor,
    grad_factor: Tensor,
) -> None:
    """The norm of all gradients, and the factor that clips and unscales them.

        grad_norm   <- sqrt(sum of norms^2) / grad_scale
        grad_factor <- min(1, max_grad_norm / (grad_norm + 1e-6)) / grad_scale

    Args:
        norms: (n,), float64, of each gradient, as `reference.scan` left them.
        grad_scale: (), float32, the loss scale that the gradients carry; 1 without loss scaling.
        max_grad_norm: clip to this norm; inf does not clip.
        grad_norm: (), float64. Mutated.
        grad_factor: (), float32. Mutated. What `reference.update` multiplies gradients by.
    """
    squares = 0.0
    for norm in norms.tolist():
        squares += norm * norm  # in order, as the C++ operator
    scale = grad_scale.double()
    # Tensors over tensors: torch takes a number over a tensor as a product with its reciprocal.
    grad_norm.copy_(torch.full_like(scale, math.sqrt(squares)) / scale)
    ratio = torch.full_like(scale, max_grad_norm) / (grad_norm + 1e-6)
    grad_factor.copy_(torch.fmin(torch.ones_like(scale), ratio) / scale)

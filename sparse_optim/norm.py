"""The norm of all gradients from those of the tensors, and the clip factor (the specification).

As torch.nn.utils.clip_grad_norm_ takes it, so that tensors may be read one by one, in any order.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sparse_optim.scoring import tiles_of


def tensor_norm(flat: Tensor, tile: int) -> float:
    """Norm of a float32 vector; squares are summed in float32 in a tile, in float64 above."""
    return math.sqrt(float(tiles_of(flat.square(), tile).sum(dim=1).double().sum()))


def clip_factor(
    tensor_norms: Tensor,
    grad_scale: Tensor,
    max_grad_norm: float,
    grad_norm: Tensor,
    grad_factor: Tensor,
) -> None:
    """The global norm from the norms of the tensors, and what it clips by.

        grad_norm   <- sqrt(sum of tensor_norms^2) / grad_scale
        grad_factor <- min(1, max_grad_norm / (grad_norm + 1e-6)) / grad_scale

    Args:
        tensor_norms: (n,), float64, n >= 1, before unscaling: of each gradient, pool tensors first;
            0 where there is none. On the CPU squares are added in this order.
        grad_scale: (), float32, the loss scale that the gradients carry.
        max_grad_norm: inf does not clip.
        grad_norm: (), float64. Mutated.
        grad_factor: (), float32. Mutated.
    """
    scale, squares = grad_scale.double(), tensor_norms.square()
    if squares.device.type == "cpu":
        # In order, as the C++ kernel; torch's own root may be off by one unit there.
        norm = torch.full_like(scale, math.sqrt(float(squares.cumsum(0)[-1])))
    else:
        norm = squares.sum().sqrt()  # torch's cumsum is not deterministic on CUDA
    grad_norm.copy_(norm / scale)
    clip = torch.ones_like(scale)
    if not math.isinf(max_grad_norm):
        clip = torch.fmin(clip, max_grad_norm / (grad_norm + 1e-6))
    grad_factor.copy_(clip / scale)

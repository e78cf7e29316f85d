"""clip: the norm of all gradients from that of each, and the factor that clips and unscales them.

    grad_norm   <- sqrt(sum of norms^2) / grad_scale
    grad_factor <- min(1, max_grad_norm / (grad_norm + 1e-6)) / grad_scale

Bytes: 8 a gradient, by one program; 2 KB of 291. Predicted: bytes / bandwidth = a nanosecond or two
on A100, A6000, H100 and H200, so that its launch is all it takes. Rounded otherwise than in the
reference: the sum in another order, max_grad_norm to float32, as Triton passes numbers.
Not run on a GPU yet: compiled ahead of time and interpreted.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# Norms that are squared at once; a model has some hundreds of tensors.
CLIP_BLOCK = 512


@triton.jit(do_not_specialize=["num_norms"])
def clip_kernel(
    norms_ptr,
    grad_scale_ptr,
    grad_norm_ptr,
    grad_factor_ptr,
    num_norms,
    max_grad_norm,
    BLOCK: tl.constexpr,
):
    scale = tl.load(grad_scale_ptr).to(tl.float64)
    total = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, num_norms, BLOCK):
        offs = start + tl.arange(0, BLOCK)
        norms = tl.load(norms_ptr + offs, mask=offs < num_norms, other=0.0)
        total += norms * norms
    grad_norm = tl.sqrt(tl.sum(total, axis=0)) / scale
    ratio = max_grad_norm / (grad_norm + 1e-6)
    factor = tl.where(ratio < 1.0, ratio, 1.0) / scale  # 1 for NaN, as by fmin
    tl.store(grad_norm_ptr, grad_norm)
    tl.store(grad_factor_ptr, factor.to(tl.float32))


def clip(
    norms: Tensor,
    grad_scale: Tensor,
    max_grad_norm: float,
    grad_norm: Tensor,
    grad_factor: Tensor,
) -> None:
    """See `reference.clip`."""
    with torch.cuda.device_of(norms):
        clip_kernel[(1,)](
            norms, grad_scale, grad_norm, grad_factor, norms.numel(), max_grad_norm,
            BLOCK=CLIP_BLOCK, num_warps=4,
        )  # fmt: skip

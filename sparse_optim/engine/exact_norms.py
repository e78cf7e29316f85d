"""Norms that do not depend on the number of processes: squares are summed as integers.

    unit   <- 2^(e - 30), with e the least that makes max(grad^2) < 2^e      of whole tensors
    upper  <- sum of round(grad^2 / unit)
    lower  <- sum of round((grad^2 - round(grad^2 / unit) unit) 2^30 / unit)
    norm   <- sqrt(upper unit + lower 2^-30 unit)

Integers add up to the same sum in any order, so that shards of a tensor give the norm of the whole,
bit for bit. A square is off by 2^-61 of the largest at most. About ten passes over the gradients in
float64: for `shard_invariant=True` alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sparse_optim.engine.shards import Shards

DIGIT = 2.0**30
# Entries at a time: 2^20 digits of up to 2^30 add up exactly in float64.
CHUNK = 1 << 20


def exact_norms(
    tensors: Sequence[Tensor], shards: Shards | None = None, counted: Tensor | None = None
) -> Tensor:
    """The norm of each tensor: (n,), float64; 0 of an empty one, infinite where an entry is not
    finite.

    Args:
        tensors: n of at most 2^33 entries, floating.
        shards: of whose processes all call this, with the shards that they hold of n tensors.
        counted: (n,), bool: which of them this process counts.
    """
    if not tensors:
        return torch.zeros(0, dtype=torch.float64)
    peaks = torch.stack([_peak(each) for each in tensors])
    if shards is not None:
        shards.greatest(peaks)
    finite = torch.isfinite(peaks)
    exponents = torch.frexp(torch.where(finite, peaks.square(), 0.0)).exponent
    units = torch.ldexp(torch.ones_like(peaks), exponents) / DIGIT
    pairs = zip(tensors, units, strict=True)
    sums = torch.stack([_digits(each.reshape(-1), unit) for each, unit in pairs])
    if shards is not None and counted is not None:
        sums *= counted[:, None]
        shards.add(sums)
    squares = sums[:, 0].double() * units + sums[:, 1].double() * (units / DIGIT)
    return torch.where(finite, squares.sqrt(), peaks)


def _peak(tensor: Tensor) -> Tensor:
    """The largest magnitude: (), float64; infinite if an entry is not finite."""
    if not tensor.numel():
        return tensor.new_zeros((), dtype=torch.float64)
    least, most = torch.aminmax(tensor)
    return torch.maximum(-least, most).double().nan_to_num(nan=torch.inf, posinf=torch.inf)


def _digits(flat: Tensor, unit: Tensor) -> Tensor:
    """The upper and the lower sum of a vector's squares: (2,), int64."""
    sums = torch.zeros(2, dtype=torch.int64, device=flat.device)
    for piece in flat.split(CHUNK):
        square = piece.double().square()
        upper = (square / unit).round()
        lower = ((square - upper * unit) / (unit / DIGIT)).round()
        sums += torch.stack([upper.sum(), lower.sum()]).long()
    return sums

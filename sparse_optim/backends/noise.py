"""Noise for sampling entries, the same on every backend: part of the specification.

    u ~ uniform on 0..2^32 - 1, a function of (seed, step, tensor, position) alone
    E = -log(1 - v),  v = (u + f) / 2^32        exponentially distributed, float32
    f = 0.5, or where u < 2^16 the fraction (u' + 0.5) / 2^32 of a second draw u'

The k entries of largest score / sqrt(E) are a sample of k without replacement with probabilities
proportional to score^2: the order is that of log(score^2) + Gumbel noise, as Gumbel = -log(E).
The second draw keeps small E, which win, fine-grained in pools of billions of entries.

u is a word of Philox-4x32-10 with the counter (position // 4, tensor, step, draw) and the key
(seed mod 2^32, seed // 2^32); draw is 0 for u and 1 for u'. The logarithm uses correctly rounded
float32 +, *, / alone, in the order written here, so that every backend gets the same bits.

References: Salmon et al. 2011, Parallel Random Numbers: As Easy as 1, 2, 3; Efraimidis and
Spirakis 2006, Weighted Random Sampling with a Reservoir; Kool et al. 2019, arXiv 1903.06059.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
KEY_INCREMENTS = (0x9E3779B9, 0xBB67AE85)
ROUNDS = 10
WORD = 0xFFFFFFFF
REFINED_BELOW = 2**16
LN2 = 0.693147182464599609375  # the float32 next to log(2)
# 2 atanh(s) = 2 s (1 + s^2 / 3 + s^4 / 5 + ...): relative error below 2^-25 up to s = 1/3.
ATANH_TERMS = (1 / 3, 1 / 5, 1 / 7, 1 / 9, 1 / 11, 1 / 13, 1 / 15)


def philox(counter: Sequence[Tensor], seed: int) -> Tensor:
    """Philox-4x32-10: four random words for each counter.

    Args:
        counter: four int64 tensors of one shape (n,), or broadcastable to it, 0 to 2^32 - 1.
        seed: 64 bits; negative ones count modulo 2^64.

    Returns:
        (n, 4), int64, 0 to 2^32 - 1.
    """
    c0, c1, c2, c3 = torch.broadcast_tensors(*counter)
    k0, k1 = seed & WORD, (seed >> 32) & WORD
    for _ in range(ROUNDS):
        high0, low0 = _multiply(MULTIPLIERS[0], c0)
        high1, low1 = _multiply(MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + KEY_INCREMENTS[0]) & WORD, (k1 + KEY_INCREMENTS[1]) & WORD
    return torch.stack([c0, c1, c2, c3], dim=-1)


def exponential(word: Tensor, second: Tensor) -> Tensor:
    """E = -log(1 - v) of two words (int64, any shape), float32."""
    small = word < 2**31
    refined = word < REFINED_BELOW
    fraction = torch.where(refined, (second.float() + 0.5) * 2.0**-32, 0.5)
    # 1 - v for v above a half, from the complement of the word: no cancellation.
    nearest = torch.where(small, word, WORD - word)
    value = (nearest.float() + fraction) * 2.0**-32
    bits = value.view(torch.int32)
    halvings = torch.where(small, 0, 126 - (bits >> 23))  # value = m / 2^halvings, m in [1/2, 1)
    mantissa = ((bits & 0x7FFFFF) | (126 << 23)).view(torch.float32)
    distance = torch.where(small, value, 1.0 - mantissa)
    s = distance / (2.0 - distance)
    square = s * s
    series = torch.full_like(s, ATANH_TERMS[-1])
    for term in reversed(ATANH_TERMS[:-1]):
        series = series * square + term
    tail = s * (series * square)
    return halvings.float() * LN2 + 2.0 * (s + tail)


def noise(
    seed: int, step: int, tensor: int, numel: int, device: torch.device, start: int = 0
) -> Tensor:
    """E of the entries of a pool tensor from `start` (a multiple of 4) on: (numel,), float32."""
    group = torch.arange(start // 4, -(-(start + numel) // 4), device=device)
    constants = [torch.tensor(value, device=device) for value in (tensor, step)]
    draws = [
        philox((group, *constants, torch.tensor(draw, device=device)), seed).view(-1)[:numel]
        for draw in (0, 1)
    ]
    return exponential(*draws)


def noise_at(seed: int, step: int, tensor: int, position: Tensor) -> Tensor:
    """E of the entries at these positions of a pool tensor, (n,) int64: (n,), float32."""
    constants = [torch.tensor(value, device=position.device) for value in (tensor, step)]
    which = (position % 4).unsqueeze(1)
    draws = [
        philox((position // 4, *constants, torch.tensor(draw, device=position.device)), seed)
        .gather(1, which)
        .squeeze(1)
        for draw in (0, 1)
    ]
    return exponential(*draws)


def _multiply(constant: int, word: Tensor) -> tuple[Tensor, Tensor]:
    """Upper and lower word of a product of two words, without overflow of int64."""
    upper, lower = constant >> 16, constant & 0xFFFF
    low = lower * word
    middle = upper * word + (low >> 16)
    return middle >> 16, ((middle << 16) | (low & 0xFFFF)) & WORD

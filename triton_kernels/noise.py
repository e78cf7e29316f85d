"""Noise that samples entries (specified by sparse_optim/backends/noise.py), for the kernels.

    E = -log(1 - v),  v = (u + f) / 2^32,  u = Philox-4x32-10 word of (seed, step, tensor, position)

`tl.philox` on 32-bit counters is that generator. The logarithm takes correctly rounded operations
alone, launched with `enable_fp_fusion=False`: bitwise equal to the reference.
Not run on a GPU yet: compiled ahead of time and interpreted.
"""

import triton
import triton.language as tl
from torch import Tensor

REFINED_BELOW = tl.constexpr(2**16)
LN2 = tl.constexpr(0.693147182464599609375)


def samples(noise: Tensor, exp: float) -> bool:
    """Whether entries are sampled.

    Raises:
        ValueError: noise that is not seed and step, or with an exponent other than 0.
    """
    if noise.numel() not in (0, 2):
        raise ValueError(f"noise must hold seed and step, or nothing, got {noise.numel()} elements")
    if noise.numel() and exp != 0:
        raise ValueError(f"exp must be 0 with noise, got {exp}")
    return noise.numel() > 0


@triton.jit
def words_of(noise_ptr, tensor, first, draw, BLOCK: tl.constexpr):
    """Random words of the entries first:first + BLOCK; `first` and BLOCK are multiples of 4."""
    tl.static_assert(BLOCK % 4 == 0)
    group = (first // 4).to(tl.int32) + tl.arange(0, BLOCK // 4)
    step = tl.load(noise_ptr + 1).to(tl.int32)
    word0, word1, word2, word3 = tl.philox(
        tl.load(noise_ptr), group, tensor.to(tl.int32), step, tl.full((), draw, tl.int32)
    )
    return tl.interleave(tl.interleave(word0, word2), tl.interleave(word1, word3))


@triton.jit
def exponential(word, fraction):
    """E of a word and what refines it."""
    small = word < 2**31
    nearest = tl.where(small, word, 0xFFFFFFFF - word)
    value = (nearest.to(tl.float32) + fraction) * 2.0**-32
    bits = value.to(tl.int32, bitcast=True)
    halvings = tl.where(small, 0, 126 - (bits >> 23))  # value = m / 2^halvings, m in [1/2, 1)
    mantissa = ((bits & 0x7FFFFF) | (126 << 23)).to(tl.float32, bitcast=True)
    distance = tl.where(small, value, 1.0 - mantissa)
    s = tl.div_rn(distance, 2.0 - distance)
    square = s * s
    series = tl.full(s.shape, 1 / 15, tl.float32)
    for power in tl.static_range(13, 1, -2):
        series = series * square + 1 / power
    tail = s * (series * square)
    return halvings.to(tl.float32) * LN2 + 2.0 * (s + tail)


@triton.jit
def perturbed(score, noise_ptr, tensor, first, BLOCK: tl.constexpr):
    """score / sqrt(E) of the entries first:first + BLOCK of a tensor."""
    word = words_of(noise_ptr, tensor, first, 0, BLOCK)
    fraction = tl.full((BLOCK,), 0.5, tl.float32)
    refined = word < REFINED_BELOW
    if tl.max(refined.to(tl.int32), axis=0) > 0:  # one tile of 4096 in sixteen
        second = words_of(noise_ptr, tensor, first, 1, BLOCK)
        fraction = tl.where(refined, (second.to(tl.float32) + 0.5) * 2.0**-32, fraction)
    return tl.div_rn(score, tl.sqrt_rn(exponential(word, fraction)))

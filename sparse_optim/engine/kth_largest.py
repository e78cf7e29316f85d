"""The k-th largest of the words of all processes: what decides which winners of shards stay.

Few words are gathered, 8 bytes each, in one collective. Where they would be many, their digits are
counted, from the first on: six sums of 16 KB, whatever the number of words and processes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_optim.engine.shards import Shards

DIGIT_BITS = 11
SHIFTS = (55, 44, 33, 22, 11, 0)
DIGITS = 1 << DIGIT_BITS
SIGN = 1 << (63 - SHIFTS[0])  # words are signed: their first digit counts from -SIGN
LEAST = torch.iinfo(torch.int64).min
# Up to here one collective of more bytes takes less time than six: see docs/scale.md.
GATHERED_BYTES = 1 << 20


def kth_largest(
    words: Tensor, alive: Tensor, k: Tensor, most: int, shards: Shards
) -> tuple[Tensor, Tensor]:
    """The k-th largest of the words of all processes.

    Args:
        words: (n,), int64, all different, above LEAST; n at most `most`.
        alive: (n,), bool: which of them count.
        k: (), int64, at most `most`; the same in all processes, as `most` is.

    Returns:
        (count (), int64: k, or how many there are if these are fewer; the count-th largest word,
        (), int64). The same in all processes. Where count is 0, no word reaches it.
    """
    gather = most * words.element_size() * shards.size <= GATHERED_BYTES
    count, word = (by_gathering if gather else by_counting)(words, alive, k, most, shards)
    return count, torch.where(count > 0, word, torch.iinfo(torch.int64).max)


def by_gathering(
    words: Tensor, alive: Tensor, k: Tensor, most: int, shards: Shards
) -> tuple[Tensor, Tensor]:
    """`kth_largest` of all words in one place: one collective."""
    mine = words.new_full((most,), LEAST)
    mine[: words.numel()] = torch.where(alive, words, LEAST)
    everyone = shards.gather(mine).view(-1)
    count = torch.minimum(k, (everyone != LEAST).sum())
    best = everyone.topk(most).values
    return count, best.gather(0, (count - 1).clamp(min=0).view(1)).squeeze(0)


def by_counting(
    words: Tensor, alive: Tensor, k: Tensor, most: int, shards: Shards
) -> tuple[Tensor, Tensor]:
    """`kth_largest` by its digits, from the first on (radix select)."""
    left, count, found = k, k, torch.zeros_like(k)
    for number, shift in enumerate(SHIFTS):
        digit = (words >> shift) + SIGN if number == 0 else words >> shift & (DIGITS - 1)
        counts = torch.zeros(DIGITS, dtype=torch.int64, device=words.device)
        counts.index_add_(0, digit.clamp(0, DIGITS - 1), alive.long())
        shards.add(counts)
        if number == 0:
            left = count = torch.minimum(k, counts.sum())
        reached = counts.flip(0).cumsum(0)  # words of this digit or a larger one, from the largest
        above = (reached < left).sum().clamp(max=DIGITS - 1)
        chosen = DIGITS - 1 - above
        before = reached.gather(0, (above - 1).clamp(min=0).view(1)).squeeze(0)
        left = left - torch.where(above > 0, before, 0)
        alive = alive & (digit == chosen)
        found = found + ((chosen - SIGN if number == 0 else chosen) << shift)
    return count, found

"""The bits of values as int32, as `gather` and `exchange` of the backends hold them.

Those of a float32 fill a word; those of 16 bits are in its lower half, below zeros.
"""

from __future__ import annotations

import torch
from torch import Tensor


def words_of(value: Tensor) -> Tensor:
    """The words of values in float32, bfloat16 or float16."""
    if value.dtype.itemsize == 4:
        return value.detach().view(torch.int32)
    return value.detach().view(torch.int16).int() & 0xFFFF


def of_words(words: Tensor, dtype: torch.dtype) -> Tensor:
    """The values in `dtype` of words."""
    return words.view(dtype) if dtype.itemsize == 4 else words.to(torch.int16).view(dtype)

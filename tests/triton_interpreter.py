"""Make Triton's interpreter usable here; import before any kernel, with TRITON_INTERPRET=1 set.

Triton 3.6 (1) fails on NumPy >= 2.4, which refuses int(array of one element) where loop bounds are
read, and (2) truncates float32 -> bfloat16 where a GPU rounds to nearest even.
"""

from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

_patch_tensor = interpreter._patch_lang_tensor
_convert_float = interpreter._convert_float


def _patch_tensor_index(tensor: Any, scope: Any) -> None:
    _patch_tensor(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))


def _convert_rounding(values: Any, source: Any, target: Any, rounding: Any) -> Any:
    if source != tl.float32 or target != tl.bfloat16:
        return _convert_float(values, source, target, rounding)
    bits = values.view(np.uint32).astype(np.uint64)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)


def install() -> None:
    """Patch the interpreter of this process."""
    interpreter._patch_lang_tensor = _patch_tensor_index
    interpreter._convert_float = _convert_rounding

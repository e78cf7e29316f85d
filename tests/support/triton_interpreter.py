"""Make Triton's interpreter usable; install before any kernel runs, with TRITON_INTERPRET=1 set.

Triton 3.6 (1) fails on NumPy >= 2.4, which refuses int(array of one element) where loop bounds are
read, (2) truncates float32 -> bfloat16 where a GPU rounds to nearest even, and (3) replaces the
language's functions by its own again in every call of a device function, which takes most of the
time of a small kernel: here they are replaced once, for good.
"""

from types import SimpleNamespace
from typing import Any

import numpy as np


def install() -> None:
    """Patch the interpreter of this process."""
    import triton.language as tl
    from triton.runtime import interpreter

    patch_tensor, convert_float = interpreter._patch_lang_tensor, interpreter._convert_float

    def patch_tensor_index(tensor: Any, scope: Any) -> None:
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    def convert_rounding(values: Any, source: Any, target: Any, rounding: Any) -> Any:
        if source != tl.float32 or target != tl.bfloat16:
            return convert_float(values, source, target, rounding)
        bits = values.view(np.uint32).astype(np.uint64)
        rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
        return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)

    def patch_nothing(fn: Any) -> Any:
        return interpreter._LangPatchScope()

    interpreter._patch_lang_tensor = patch_tensor_index
    interpreter._convert_float = convert_rounding
    interpreter._patch_lang(SimpleNamespace(__globals__={"tl": tl, "core": tl.core}))
    interpreter._patch_lang = patch_nothing

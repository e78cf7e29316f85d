"""Warnings that name the user's line."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import torch

# Frames of these are not the user's. Triton kernels are installed inside the package, but lie
# beside it in a checkout.
_PACKAGE = Path(__file__).parent
_OURS = tuple(
    f"{folder}/" for folder in (_PACKAGE, _PACKAGE.parent / "triton_kernels", *torch.__path__)
)


def warn_user(message: str, category: type[Warning] = UserWarning) -> None:
    """Warn at the innermost line that is neither in this package nor in torch.

    A constant `stacklevel` would blame whichever file of torch stands between (profiler hooks,
    `no_grad`), and Python shows one warning a line: a second optimizer's would be swallowed.

    Args:
        message: what is wrong and what to do.
        category: of the warning.
    """
    level, frame = 2, sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_OURS):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, category, stacklevel=level)

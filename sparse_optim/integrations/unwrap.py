"""Find our optimizer inside the wrappers of other packages."""

from __future__ import annotations

from typing import Any

from sparse_optim.optim.masked_adamw import MaskedAdamW


def unwrap(optimizer: Any) -> MaskedAdamW | None:
    """The optimizer without accelerate's or Lightning's wrapper, if it is one that unmasks."""
    inner = getattr(optimizer, "optimizer", optimizer)
    return inner if isinstance(inner, MaskedAdamW) else None

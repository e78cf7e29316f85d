"""The error that a fine-tuning job raises for wrong input."""

from __future__ import annotations

from sparse_optim.errors import SparseOptimError


class FinetuneError(SparseOptimError):
    """Wrong input to a fine-tuning job: one line that says what is wrong and what to do."""

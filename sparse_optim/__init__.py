"""Selective fine-tuning at the cost of what it changes."""

from sparse_optim.delta import Delta, apply_delta, load_delta, save_delta
from sparse_optim.optim.id3 import IncrementalMaskedAdamW
from sparse_optim.optim.masked_adamw import MaskedAdamW
from sparse_optim.policy.importance import (
    D3,
    ActivationWeightGradient,
    Magnitude,
    Random,
    Scores,
    Snip,
)
from sparse_optim.policy.schedule import Linear, Uniform, Warmup
from sparse_optim.policy.selection import Increment, Repeat, Static, Stochastic
from sparse_optim.version import __version__

__all__ = [
    "D3",
    "ActivationWeightGradient",
    "Delta",
    "Increment",
    "IncrementalMaskedAdamW",
    "Linear",
    "Magnitude",
    "MaskedAdamW",
    "Random",
    "Repeat",
    "Scores",
    "Snip",
    "Static",
    "Stochastic",
    "Uniform",
    "Warmup",
    "__version__",
    "apply_delta",
    "load_delta",
    "save_delta",
]

"""Selective fine-tuning at the cost of what it changes.

Names are imported when they are first used: `import sparse_optim` does not import torch.
"""

from typing import TYPE_CHECKING

from sparse_optim._lazy import on_access
from sparse_optim.version import __version__

if TYPE_CHECKING:
    from sparse_optim.delta import Delta, apply_delta, load_delta, save_delta
    from sparse_optim.finetune.reuse import load_model as load_model
    from sparse_optim.optim.id3 import IncrementalMaskedAdamW
    from sparse_optim.optim.masked_adamw import MaskedAdamW
    from sparse_optim.optim.param_groups import param_groups
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
    "param_groups",
    "save_delta",
]

# Home -> the names that it gives; a package is its own home.
_NAMES = {
    "sparse_optim.amp": ("amp",),
    "sparse_optim.analysis": ("analysis",),
    "sparse_optim.calibration": ("calibration",),
    "sparse_optim.finetune.reuse": ("load_model",),
    "sparse_optim.integrations": ("integrations",),
    "sparse_optim.methods": ("methods",),
    "sparse_optim.delta": ("Delta", "apply_delta", "load_delta", "save_delta", "delta"),
    "sparse_optim.optim": ("optim",),
    "sparse_optim.optim.id3": ("IncrementalMaskedAdamW",),
    "sparse_optim.optim.masked_adamw": ("MaskedAdamW",),
    "sparse_optim.optim.param_groups": ("param_groups",),
    "sparse_optim.policy": ("policy",),
    "sparse_optim.policy.importance": (
        *("D3", "ActivationWeightGradient", "Magnitude", "Random", "Scores", "Snip"),
    ),
    "sparse_optim.policy.schedule": ("Linear", "Uniform", "Warmup"),
    "sparse_optim.policy.selection": ("Increment", "Repeat", "Static", "Stochastic"),
}
if not TYPE_CHECKING:  # type checkers read the imports above
    _homes = {name: home for home, names in _NAMES.items() for name in names}
    __getattr__ = on_access(__name__, _homes)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

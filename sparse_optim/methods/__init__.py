"""The methods of the two papers by name: each builds an optimizer for a model.

    optimizer = methods.build("pafi", model, lr=5e-4, budget=0.005, total_steps=1000)

A method is an importance and a selection, or a structural mask (whole tensors, trained densely);
DPS, which alternates dense and sparse windows of steps, is an additional baseline.
"""

from typing import TYPE_CHECKING

from sparse_optim._lazy import on_access
from sparse_optim.methods._registry import METHODS, Method, build

if TYPE_CHECKING:
    from sparse_optim.methods._calibrated import SPARSE_SCORES
    from sparse_optim.methods._request import MethodRequest

__all__ = ["METHODS", "SPARSE_SCORES", "Method", "MethodRequest", "build"]

# These import torch; the names of the methods, for help texts, must not.
if not TYPE_CHECKING:
    __getattr__ = on_access(
        __name__,
        {
            "MethodRequest": "sparse_optim.methods._request",
            "SPARSE_SCORES": "sparse_optim.methods._calibrated",
        },
    )

"""Importance scores from a calibration pass over data, before any training.

Each function returns float32 scores >= 0 by parameter name, shaped as the parameter and on its
device: entries with higher scores are unmasked first. The model is left unchanged.
"""

from sparse_optim.calibration._scores import (
    child_tuning_d,
    fisher,
    gradient,
    grasp,
    snip,
    synflow,
)
from sparse_optim.calibration._wanda import wanda

__all__ = ["child_tuning_d", "fisher", "gradient", "grasp", "snip", "synflow", "wanda"]

"""Importance scores from a calibration pass over data, before any training.

Each function returns float32 scores >= 0 by parameter name, shaped as the parameter and on its
device: the higher, the sooner an entry is to be unmasked. The model is left as it was found.
"""

from sparse_optim.calibration._scores import child_tuning_d, fisher, grasp, snip, synflow

__all__ = ["child_tuning_d", "fisher", "grasp", "snip", "synflow"]

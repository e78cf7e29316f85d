"""Earlier place of `sparse_optim.calibration.InputMeans`."""

from sparse_optim.calibration.input_means import InputMeans

__all__ = ["InputMeans"]

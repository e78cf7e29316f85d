"""`GradScaler`, where torch.amp has its own."""

from sparse_optim.optim.grad_scaler import GradScaler

__all__ = ["GradScaler"]

"""Read active entries, state and delta from the optimizer of any method."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sparse_optim.delta import Delta
from sparse_optim.optim.masked_adamw import MaskedAdamW


@dataclass(frozen=True)
class Usage:
    """What an optimizer trains, and what it computes with.

    Attributes:
        budget: entries that may be unmasked; 0 for an optimizer without a budget.
        ranked: entries that compete for it.
        dense: entries that are trained from the start: a fresh head, or all of a dense method.
        backend: kernels of the step; "torch" for an optimizer of torch.
        gradients: "sampled", "fused" (read and freed inside the backward pass) or "ordinary".
        every: steps from one that unmasks entries to the next; None without a budget.
    """

    budget: int
    ranked: int
    dense: int
    backend: str
    gradients: str
    every: int | None = None


def usage_of(optimizer: torch.optim.Optimizer) -> Usage:
    """Read what an optimizer of any method uses."""
    if not isinstance(optimizer, MaskedAdamW):
        return Usage(0, 0, active_entries(optimizer), "torch", "ordinary")
    kind = "fused" if optimizer.fuse_backward else "ordinary"
    return Usage(
        budget=optimizer.engine.budget,
        ranked=sum(param.numel() for param in optimizer.engine.pool.params),
        every=optimizer.selection.every,
        dense=_dense_entries(optimizer),
        backend=optimizer.engine.backend,
        gradients="sampled" if optimizer.sampled_backward else kind,
    )


def _dense_entries(optimizer: MaskedAdamW) -> int:
    groups = (group for group in optimizer.param_groups if group["unmask"] == "all")
    return sum(param.numel() for group in groups for param in group["params"])


def active_entries(optimizer: torch.optim.Optimizer) -> int:
    """Number of entries that training may have changed so far, including the fresh head."""
    if isinstance(optimizer, MaskedAdamW):
        return int(optimizer.metrics()["active"]) + _dense_entries(optimizer)
    return sum(param.numel() for group in optimizer.param_groups for param in group["params"])


def budget_progress(optimizer: torch.optim.Optimizer) -> tuple[int, int]:
    """Entries that a MaskedAdamW has unmasked so far, and its budget.

    Raises:
        TypeError: another optimizer, which has no budget.
    """
    if not isinstance(optimizer, MaskedAdamW):
        raise TypeError(f"expected a MaskedAdamW, got {type(optimizer).__name__}")
    return int(optimizer.engine.progress[1]), optimizer.engine.budget


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of the optimizer's state; MaskedAdamW also counts its scratch memory."""
    if isinstance(optimizer, MaskedAdamW):
        return int(optimizer.metrics()["state_bytes"])
    tensors = (
        value
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, Tensor)
    )
    return sum(tensor.nbytes for tensor in tensors)


def make_delta(
    optimizer: torch.optim.Optimizer, model: nn.Module, *, finished: bool = True
) -> Delta:
    """What training changed: active entries, or for a dense optimizer whole tensors.

    Args:
        finished: whether all steps of the run were taken.
    """
    if isinstance(optimizer, MaskedAdamW):
        return optimizer.delta(model, finished=finished)
    trained = {id(param) for group in optimizer.param_groups for param in group["params"]}
    dense = {
        name: param.detach() for name, param in model.named_parameters() if id(param) in trained
    }
    return Delta(sparse={}, dense=dense)

"""Read active entries, state and delta from the optimizer of any method."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sparse_optim import MaskedAdamW
from sparse_optim.delta import Delta


def active_entries(optimizer: torch.optim.Optimizer) -> int:
    """Number of entries that training may have changed so far, including the fresh head."""
    if isinstance(optimizer, MaskedAdamW):
        dense: int = sum(
            param.numel()
            for group in optimizer.param_groups
            if group["unmask"] == "all"
            for param in group["params"]
        )
        return int(optimizer.metrics()["active"]) + dense
    return sum(param.numel() for group in optimizer.param_groups for param in group["params"])


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


def make_delta(optimizer: torch.optim.Optimizer, model: nn.Module) -> Delta:
    """What training changed: active entries, or for a dense optimizer whole tensors."""
    if isinstance(optimizer, MaskedAdamW):
        return optimizer.delta(model)
    trained = {id(param) for group in optimizer.param_groups for param in group["params"]}
    dense = {
        name: param.detach() for name, param in model.named_parameters() if id(param) in trained
    }
    return Delta(sparse={}, dense=dense)

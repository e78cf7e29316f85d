"""What an optimizer tells of itself: its delta, with names, and its metrics."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sparse_optim.backends.operands import num_bytes
from sparse_optim.delta import Delta, SparseValues

if TYPE_CHECKING:
    from sparse_optim.optim.masked_adamw import MaskedAdamW


def delta_of(optimizer: MaskedAdamW, model: torch.nn.Module | None) -> Delta:
    """Collect the active entries of the pool, and dense groups whole; see `MaskedAdamW.delta`."""
    names = _names(optimizer, model)
    sparse, fingerprints = {}, {}
    moved = _moved_entries(optimizer)
    for index, (param, (position, unmask_step)) in enumerate(
        zip(optimizer._pool, moved, strict=True)
    ):
        if position.numel():
            name = names[id(param)]
            sparse[name] = SparseValues(
                shape=tuple(param.shape),
                dtype=param.dtype,
                position=position,
                value=param.detach().view(-1)[position],
                unmask_step=unmask_step,
            )
            fingerprints[name] = optimizer._base.values[index]
    dense = {names[id(param)]: param.detach().clone() for param in optimizer._dense}
    method = {
        "importance": repr(optimizer.importance),
        "selection": type(optimizer.selection).__name__,
        "budget": int(optimizer._targets[-1]),
        "total_steps": optimizer._targets.numel() - 1,
        "step": int(optimizer._active.progress[0]),
    }
    return Delta(sparse=sparse, dense=dense, fingerprints=fingerprints, method=method)


def _moved_entries(optimizer: MaskedAdamW) -> list[tuple[Tensor, Tensor | None]]:
    """For each tensor of the pool: positions (int64) that may have moved, and when unmasked.

    Where entries leave the set again, no step says when one was unmasked.
    """
    if not optimizer.selection.replaces:
        segments = (optimizer._active.segment(index) for index in range(len(optimizer._pool)))
        return [(part["position"].long(), part["unmask_step"].clone()) for part in segments]
    index = optimizer._touched.index()
    ends = torch.tensor([param.numel() for param in optimizer._pool]).cumsum(0)
    last = torch.searchsorted(index, ends.to(index.device)).tolist()
    first = [0, *last[:-1]]
    starts = [0, *ends.tolist()[:-1]]
    return [(index[a:b] - start, None) for a, b, start in zip(first, last, starts, strict=True)]


def metrics_of(optimizer: MaskedAdamW) -> dict[str, int | float | str]:
    """Counts, norms and bytes as a flat dict; see `MaskedAdamW.metrics`."""
    step, active, skipped = optimizer._active.progress.tolist()
    budget = int(optimizer._targets[-1])
    counts = optimizer._active.offsets.diff().tolist()
    dense = (tensor for state in optimizer.state.values() for tensor in state.values())
    return {
        "step": step,
        "skipped_steps": skipped,
        "active": active,
        **({"touched": optimizer._touched.index().numel()} if optimizer.selection.replaces else {}),
        "budget": budget,
        "budget_left": budget - active,
        "threshold": float(optimizer._work.threshold),
        "grad_norm": float(optimizer._work.grad_norm),
        "backend": optimizer.backend,
        "state_bytes": num_bytes(
            optimizer._active, optimizer._work, optimizer._spare, optimizer._ranking
        )
        + optimizer._touched.nbytes
        + (optimizer._in_backward.nbytes if optimizer._in_backward else 0)
        + optimizer._targets.nbytes
        + sum(tensor.nbytes for tensor in dense),
        **{f"active/{name}": count for name, count in zip(optimizer._names, counts, strict=True)},
    }


def _names(optimizer: MaskedAdamW, model: torch.nn.Module | None) -> dict[int, str]:
    """id of each parameter that the optimizer trains -> its name."""
    params = optimizer._pool + optimizer._dense
    if model is not None:
        names = {id(param): name for name, param in model.named_parameters()}
        if any(id(param) not in names for param in params):
            raise ValueError("the optimizer holds parameters that are not the model's")
        return names
    if not all("param_names" in group for group in optimizer.param_groups):
        raise ValueError(
            "a delta needs names: pass model=, or build the optimizer from named_parameters()"
        )
    listed = optimizer._names + optimizer._dense_names
    return {id(param): name for param, name in zip(params, listed, strict=True)}

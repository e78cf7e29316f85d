"""What can be read off an engine: its delta, with names, and its metrics."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from sparse_optim.delta import Delta, SparseValues
from sparse_optim.delta._wrappers import plain_names
from sparse_optim.engine.engine import Engine
from sparse_optim.engine.pool import Pool
from sparse_optim.engine.sharded import ShardedEngine
from sparse_optim.optim.groups import DenseParams
from sparse_optim.optim.whole import whole_of

MAX_COUNTER_BYTES = 1024


def delta_of(
    engine: Engine,
    dense: DenseParams,
    param_groups: Sequence[Mapping[str, Any]],
    fingerprints: Sequence[str],
    model: torch.nn.Module | None,
) -> Delta:
    """Collect the active entries of the pool, and dense parameters and the model's buffers whole.

    Args:
        fingerprints: of the base's tensors, one for each tensor of the pool.
        model: gives names, tied names and buffers.

    Raises:
        ValueError: a parameter has no name, or is not the model's.
    """
    names = _names_of(engine.pool, dense, param_groups, model)
    engine.pool.check_unchanged()
    sparse, of_base, params = {}, {}, engine.pool.params
    moved = _touched_entries(engine)
    for index, (param, (position, value, unmask_step)) in enumerate(
        zip(params, moved, strict=True)
    ):
        if position.numel():
            name = names[id(param)]
            sparse[name] = SparseValues(
                shape=tuple(param.shape),
                dtype=param.dtype,
                position=position,
                value=value,
                unmask_step=unmask_step,
            )
            of_base[name] = fingerprints[index]
    whole = {names[id(param)]: whole_of(param).detach().clone() for param in dense.params}
    whole |= _moving_buffers(model)
    tied = _tied_names(model, names, {*sparse, *whole})
    method = {
        "importance": _name_of(engine.method.importance),
        "selection": type(engine.method.selection).__name__,
        "budget": engine.budget,
        "total_steps": engine.total_steps,
        "step": int(engine.progress[0]),
    }
    return Delta(sparse=sparse, dense=whole, fingerprints=of_base, method=method, tied=tied)


def _name_of(importance: object) -> str:
    """An importance as text; of a function its name, since its repr is an address."""
    return getattr(importance, "__qualname__", None) or repr(importance)


def _names_of(
    pool: Pool,
    dense: DenseParams,
    param_groups: Sequence[Mapping[str, Any]],
    model: torch.nn.Module | None,
) -> dict[int, str]:
    """id of each parameter that the optimizer trains -> its name without wrappers."""
    params = (*pool.params, *dense.params)
    if model is not None:
        plain = _plain_of(model)
        names = {id(param): plain[name] for name, param in model.named_parameters()}
        if any(id(param) not in names for param in params):
            raise ValueError("the optimizer holds parameters that are not the model's")
        return names
    if not all("param_names" in group for group in param_groups):
        raise ValueError(
            "a delta needs names: pass model=, or build the optimizer from named_parameters()"
        )
    listed = (*pool.names, *dense.names)
    twice = {name for name in listed if listed.count(name) > 1}
    if twice:
        raise ValueError(
            f"two parameters are called {min(twice)!r}: a delta needs one name each; pass model="
        )
    plain = plain_names(name for group in param_groups for name in group["param_names"])
    return {id(param): plain[name] for param, name in zip(params, listed, strict=True)}


def _moving_buffers(model: torch.nn.Module | None) -> dict[str, Tensor]:
    """Saved buffers that training may move: statistics, moving averages, counters.

    No one keeps what they were before training, so they are stored whole, moved or not. Large
    buffers of integers (masks, tables of positions) are constants.
    """
    if model is None:
        return {}
    saved = set(plain_names(model.state_dict(keep_vars=True)).values())
    buffers, plain = dict(model.named_buffers()), _plain_of(model)
    return {
        plain[name]: buffer.detach().clone()
        for name, buffer in buffers.items()
        if plain[name] in saved
        and (buffer.is_floating_point() or buffer.nbytes <= MAX_COUNTER_BYTES)
    }


def _plain_of(model: torch.nn.Module) -> dict[str, str]:
    """Each name of a parameter or buffer, tied ones under all names, and it without wrappers."""
    params = model.named_parameters(remove_duplicate=False)
    buffers = model.named_buffers(remove_duplicate=False)
    return plain_names(name for part in (params, buffers) for name, _ in part)


def _tied_names(
    model: torch.nn.Module | None, names: Mapping[int, str], changed: Collection[str]
) -> dict[str, str]:
    """Further names of the changed parameters."""
    if model is None:
        return {}
    named, plain = dict(model.named_parameters(remove_duplicate=False)), _plain_of(model)
    known = {plain[name]: names.get(id(param), "") for name, param in named.items()}
    return {
        alias: name for alias, name in known.items() if name in changed and alias not in changed
    }


def metrics_of(engine: Engine, further_bytes: int) -> dict[str, int | float]:
    """Counts, norms and bytes as a flat dict.

    Args:
        further_bytes: of state that is not the engine's.
    """
    step, active, skipped = engine.progress.tolist()
    budget = engine.budget
    counts = engine.active.offsets.diff().tolist()
    replaces = engine.method.selection.replaces
    return {
        "step": step,
        "skipped_steps": skipped,
        "active": active,
        **({"touched": engine.touched.index().numel()} if replaces else {}),
        "budget": budget,
        "budget_left": budget - active,
        "threshold": float(engine.work.new.threshold),
        "grad_norm": float(engine.work.scalars.grad_norm),
        "state_bytes": engine.nbytes + further_bytes,
        **{f"active/{name}": count for name, count in zip(engine.pool.names, counts, strict=True)},
    }


def _touched_entries(engine: Engine) -> list[tuple[Tensor, Tensor, Tensor | None]]:
    """For each tensor of the pool: positions (int64) that may have moved, their values, and when
    they were unmasked.

    Where entries leave the set again, no step says when one was unmasked.
    """
    params = engine.pool.params
    if isinstance(engine, ShardedEngine):
        active, values = engine.whole_active()
        bounds = pairwise(active.offsets.tolist())
        return [
            (
                active.position[first:last].long(),
                values[first:last].to(param.dtype),
                active.unmask_step[first:last].clone(),
            )
            for param, (first, last) in zip(params, bounds, strict=True)
        ]
    flat = [param.detach().view(-1) for param in params]
    if not engine.method.selection.replaces:
        segments = (engine.active.segment(index) for index in range(len(params)))
        found = ((part["position"].long(), part["unmask_step"].clone()) for part in segments)
        return [(at, values[at], step) for values, (at, step) in zip(flat, found, strict=True)]
    index = engine.touched.index()
    ends = engine.pool.sizes.cpu().cumsum(0)
    last = torch.searchsorted(index, ends.to(index.device)).tolist()
    first = [0, *last[:-1]]
    starts = [0, *ends.tolist()[:-1]]
    moved = (index[a:b] - start for a, b, start in zip(first, last, starts, strict=True))
    return [(at, values[at], None) for values, at in zip(flat, moved, strict=True)]

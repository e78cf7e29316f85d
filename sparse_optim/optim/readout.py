"""What can be read off an engine: its delta, with names, the entries that moved, its metrics."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor

from sparse_optim.backends.words import of_words
from sparse_optim.delta import Delta, SparseValues
from sparse_optim.delta._wrappers import plain_names
from sparse_optim.engine.engine import Engine
from sparse_optim.engine.pool import Pool
from sparse_optim.engine.sharded import ShardedEngine
from sparse_optim.optim.groups import DenseParams
from sparse_optim.optim.whole import whole_of

MAX_COUNTER_BYTES = 1024


@dataclass(frozen=True)
class Moved:
    """The entries of the pool that may have moved since the start, in ascending order.

    Attributes:
        position: (n,), int32, flat positions within their tensors, on the pool's device.
        offsets: S + 1 numbers: the entries of tensor i are offsets[i]:offsets[i + 1].
        runs: their values: (n,) if all tensors have one dtype, else (n_i,) of each tensor.
        unmask_step: (n,), int32; None where entries leave the set again, so that none is known.
        step: steps that were taken.
    """

    position: Tensor
    offsets: list[int]
    runs: Sequence[Tensor]
    unmask_step: Tensor | None
    step: int

    @property
    def values(self) -> Sequence[Tensor]:
        """Of each tensor its entries' values, in its dtype."""
        if len(self.runs) != 1:
            return self.runs
        counts = [last - first for first, last in pairwise(self.offsets)]
        return torch.split(self.runs[0], counts)


@dataclass(frozen=True)
class Layout:
    """The tensors of an optimizer, by the names that a delta gives them.

    Attributes:
        names, params: of the pool, live.
        fingerprints: of the base's tensors, one for each.
        dense: parameters trained densely and buffers that training may move, live.
        fixed: the model's other parameters and saved buffers, live.
        tied: further names of tensors.
    """

    names: tuple[str, ...]
    params: tuple[Tensor, ...]
    fingerprints: tuple[str, ...]
    dense: Mapping[str, Tensor]
    fixed: Mapping[str, Tensor]
    tied: Mapping[str, str]


def layout_of(
    pool: Pool,
    dense: DenseParams,
    param_groups: Sequence[Mapping[str, Any]],
    fingerprints: Sequence[str],
    model: torch.nn.Module | None,
) -> Layout:
    """Name the tensors.

    Args:
        fingerprints: of the base's tensors, one for each tensor of the pool.
        model: gives names, tied names and buffers.

    Raises:
        ValueError: a parameter has no name, or is not the model's.
    """
    names = _names_of(pool, dense, param_groups, model)
    whole = {names[id(param)]: param for param in dense.params} | _moving_buffers(model)
    of_pool = tuple(names[id(param)] for param in pool.params)
    return Layout(
        of_pool,
        pool.params,
        tuple(fingerprints),
        whole,
        _fixed_tensors(model, {*of_pool, *whole}),
        _tied_names(model, names, {*of_pool, *whole}),
    )


def delta_of(engine: Engine, layout: Layout) -> Delta:
    """Collect the active entries of the pool, dense parameters and moving buffers."""
    engine.pool.check_unchanged()
    sparse, of_base = {}, {}
    moved = moved_entries(engine)
    values = moved.values
    for index, (first, last) in enumerate(pairwise(moved.offsets)):
        if last > first:
            name, steps = layout.names[index], moved.unmask_step
            sparse[name] = SparseValues(
                shape=tuple(layout.params[index].shape),
                dtype=layout.params[index].dtype,
                position=moved.position[first:last].long(),
                value=values[index],
                unmask_step=None if steps is None else steps[first:last],
            )
            of_base[name] = layout.fingerprints[index]
    whole = {name: whole_of(tensor).detach() for name, tensor in layout.dense.items()}
    changed = {*sparse, *whole}
    tied = {alias: name for alias, name in layout.tied.items() if name in changed}
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
        plain[name]: buffer
        for name, buffer in buffers.items()
        if plain[name] in saved
        and (buffer.is_floating_point() or buffer.nbytes <= MAX_COUNTER_BYTES)
    }


def _fixed_tensors(model: torch.nn.Module | None, moving: Collection[str]) -> dict[str, Tensor]:
    """What a state dict holds beside the tensors that move, each under its first name."""
    if model is None:
        return {}
    tensors, found = model.state_dict(keep_vars=True), {}
    seen = {id(tensors[name]) for name, plain in plain_names(tensors).items() if plain in moving}
    for name, plain in plain_names(tensors).items():
        tensor = tensors[name]
        if isinstance(tensor, Tensor) and id(tensor) not in seen:
            seen.add(id(tensor))
            found[plain] = tensor
    return found


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


def moved_entries(engine: Engine) -> Moved:
    """The entries that may have moved; of sharded parameters, in all processes (collective)."""
    params, step = engine.pool.params, int(engine.progress[0])
    if isinstance(engine, ShardedEngine):
        active, everyone = engine.whole_active()
        offsets, count = active.offsets.tolist(), everyone.numel()
        pieces = everyone.split([last - first for first, last in pairwise(offsets)])
        values = [piece.to(param.dtype) for piece, param in zip(pieces, params, strict=True)]
        return Moved(active.position[:count], offsets, values, active.unmask_step[:count], step)
    if not engine.method.selection.replaces:
        bounds = engine.active.offsets
        offsets = bounds.tolist()
        position = engine.active.position[: offsets[-1]]
        steps = engine.active.unmask_step[: offsets[-1]]
    else:
        index, steps = engine.touched.index(), None
        starts = torch.tensor([0, *accumulate(param.numel() for param in params)])
        starts = starts.to(index.device)
        bounds = torch.searchsorted(index, starts)
        offsets = bounds.tolist()
        position = (index - starts[:-1].repeat_interleave(bounds.diff())).int()
    words = engine.read(position, bounds)
    dtypes = [param.dtype for param in params]
    if len(set(dtypes)) == 1:
        return Moved(position, offsets, [of_words(words, dtypes[0])], steps, step)
    pieces = words.split([last - first for first, last in pairwise(offsets)])
    runs = [of_words(piece, dtype) for piece, dtype in zip(pieces, dtypes, strict=True)]
    return Moved(position, offsets, runs, steps, step)

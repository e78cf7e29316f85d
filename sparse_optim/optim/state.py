"""`optimizer.state`, in the form that torch's tools expect: state of parameters alone (format 2).

    of each parameter in the pool
        pool_index         (), int64, its place in the pool
    of each parameter trained densely
        step, exp_avg, exp_avg_sq, as torch.optim.AdamW has them
    of the first parameter that requires gradients, besides:
        pool_position, pool_exp_avg, pool_exp_avg_sq, pool_unmask_step, pool_master, pool_offsets,
        pool_progress      as in `ActiveSet`
        pool_targets       int64, as in `Engine`
        pool_threshold     (), float32, as in `NewEntries`
        pool_base          (S, 16), uint8, fingerprints of the base; 0 before the first step
        pool_written       (), uint8, 1 if other code has written parameters, see `Engine`
        pool_touched       as in `Touched`, where entries leave the set again
        pool_known         uint8, as `Completion.flags`, on devices that the host lags behind

Everything exists from construction on and keeps its size until the budget, the schedule or the
groups change: torch.distributed.checkpoint takes a step with an optimizer whose state is empty, and
loads only into tensors of the size that was saved.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from sparse_optim.backends.operands import ENTRY_FIELDS, ActiveSet
from sparse_optim.engine.engine import Engine
from sparse_optim.engine.sharded import ShardedEngine

OURS = "pool_"  # begins the names of what is not torch.optim.AdamW's
INDEX = OURS + "index"
PROGRESS = OURS + "progress"
POSITION = OURS + "position"
DIGEST_BYTES = 16


def owner_of(param_groups: Sequence[dict[str, Any]]) -> Tensor:
    """The parameter in whose state the pool's is: torch drops the state of frozen ones."""
    params: list[Tensor] = [param for group in param_groups for param in group["params"]]
    if not params:
        raise ValueError("the optimizer has no parameter: every group is empty")
    return next((param for param in params if param.requires_grad), params[0])


def pool_state(engine: Engine, fingerprints: Sequence[str]) -> dict[str, Tensor]:
    """The engine's own tensors under their names in the state of the owner.

    Of sharded parameters, what this process holds; `whole_state` has all of it.
    """
    digests = [list(bytes.fromhex(value)) for value in fingerprints]
    if not digests:
        digests = [[0] * DIGEST_BYTES] * len(engine.pool.params)
    base = torch.tensor(digests, dtype=torch.uint8, device=engine.pool.device)
    state = {
        **active_state(engine.active),
        OURS + "targets": engine.targets,
        OURS + "threshold": engine.work.new.threshold,
        OURS + "base": base.view(-1, DIGEST_BYTES),
        OURS + "written": torch.tensor(engine.written_by_others, device=base.device).byte(),
    }
    if engine.method.selection.replaces:
        state[OURS + "touched"] = engine.touched.bits
    if engine.completion.lag:
        flags = [*engine.completion.flags, *[False] * engine.completion.lag]
        known = torch.tensor(flags[: engine.completion.lag + 1], device=base.device)
        state[OURS + "known"] = known.byte()
    return state


def whole_state(engine: ShardedEngine) -> dict[str, Tensor]:
    """What differs between the processes in `pool_state`, of all of them. Collective."""
    written = torch.tensor(engine.written_anywhere(), device=engine.pool.device)
    everyone, _ = engine.whole_active()
    return {**active_state(everyone), OURS + "written": written.byte()}


def active_state(active: ActiveSet) -> dict[str, Tensor]:
    """Those of the active set alone."""
    fields = [name for name in ENTRY_FIELDS if name != "master" or active.master.numel()]
    return {OURS + name: getattr(active, name) for name in (*fields, "offsets", "progress")}


def index_states(engine: Engine) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
    """Each parameter of the pool, and what its own state is."""
    places = torch.arange(len(engine.pool.params), device=engine.pool.device)
    for param, place in zip(engine.pool.params, places, strict=True):
        yield param, {INDEX: place}


def copied(state: dict[str, Any]) -> dict[str, Any]:
    """A parameter's state with what is ours copied, so that later steps do not change it."""
    return {
        name: value.clone() if str(name).startswith(OURS) and isinstance(value, Tensor) else value
        for name, value in state.items()
    }


def without_ours(state: dict[str, Any]) -> dict[str, Any]:
    """What torch.optim.AdamW knows of a parameter's state."""
    return {name: value for name, value in state.items() if not str(name).startswith(OURS)}

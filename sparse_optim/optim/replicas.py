"""What an optimizer with sampled gradients does for DistributedDataParallel, beside averages.

See `sparse_optim.engine.replicas`.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sparse_optim.delta._fingerprint import fingerprint
from sparse_optim.engine.sampled import SampledBackward
from sparse_optim.optim.attach import Layer

IGNORED = "_ddp_params_and_buffers_to_ignore"  # where DDP's constructor looks


def samplable(
    model: nn.Module, layers: Mapping[int, list[Layer]], params: Sequence[Tensor]
) -> dict[int, list[Layer]]:
    """The layers that may sample: all but those of the smallest weight, if DDP would have none.

    DDP refuses a module without a trainable parameter that it could average.
    """
    covered = {id(params[index]) for index in layers}
    if any(p.requires_grad and id(p) not in covered for p in model.parameters()):
        return dict(layers)
    smallest = min(layers, key=lambda index: params[index].numel())
    return {index: each for index, each in layers.items() if index != smallest}


def leave_out(model: nn.Module, params: Sequence[Tensor]) -> Callable[[], None]:
    """Let a DistributedDataParallel that wraps the model from now on leave these weights alone.

    Returns:
        What ends it, for wrappers to come.
    """
    wanted = {id(param) for param in params}
    names = {
        f"{prefix}.{name}" if prefix else name
        for prefix, module in model.named_modules()
        for name, param in module.named_parameters(recurse=False)
        if id(param) in wanted
    }
    before = set(getattr(model, IGNORED, ()))
    wrapper: Any = nn.parallel.DistributedDataParallel
    leave = wrapper._set_params_and_buffers_to_ignore_for_model  # noqa: SLF001 - DDP's docs name it
    leave(model, before | names)
    reference, ours = weakref.ref(model), names - before

    def end() -> None:
        held: Any = reference()
        if held is not None:
            setattr(held, IGNORED, set(getattr(held, IGNORED, ())) - ours)
            for name in ours:
                vars(held.get_parameter(name)).pop("_ddp_ignored", None)

    return end


def check_replicas(source: SampledBackward | None) -> None:
    """Once, where there are replicas: raise RuntimeError if they differ in weights of the source.

    DDP copies the weights of the first process to all others, but not what it leaves alone.
    """
    if source is None or source.window.group is None or source.window.compared:
        return
    pool, window = source.pool, source.window
    names = {id(param): name for param, name in zip(pool.params, pool.names, strict=True)}
    check_same_weights(window.params, [names[id(p)] for p in window.params], window.group)
    window.compared = True


def check_same_weights(params: Sequence[Tensor], names: Sequence[str], group: Any) -> None:
    """Raise RuntimeError if weights differ between processes."""
    mine = [fingerprint(param) for param in params]
    everyone: list[Any] = [None] * torch.distributed.get_world_size(group)
    torch.distributed.all_gather_object(everyone, mine, group)
    for name, *found in zip(names, *everyone, strict=True):
        if len(set(found)) > 1:
            raise RuntimeError(
                f"{name} differs between the processes, and with sampled_backward=True nothing "
                "copies it from the first to the others: load the same weights in all (seed them "
                "alike) before the first step"
            )


def check_not_left_out(source: SampledBackward | None) -> None:
    """Raise RuntimeError where a wrapper leaves gradients of the source to it."""
    if source is not None and source.window.group is not None:
        raise RuntimeError(
            "sampled_backward cannot be switched off in several processes: "
            "DistributedDataParallel leaves out the weights whose layers sample, so that nothing "
            "would average their gradients. Build an optimizer without it, then wrap the model "
            "again"
        )

"""Copy per-step scalars to the device without synchronising.

Hyper-parameters are copied only when they have changed, from pinned memory; what is on the device
already (a learning rate that is a tensor, the loss scale) is copied there. A step in which nothing
changed therefore copies nothing from the host, and can be captured in a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

Rows = list[list[float]]


def _lives_on_device(lr: float | Tensor) -> bool:
    return isinstance(lr, Tensor) and lr.device.type != "cpu"


def hyper_rows(groups: Sequence[dict[str, Any]]) -> Rows:
    """The host's part of `hyper` (see `reference.update`); 0 for an lr that the device holds."""
    return [
        [
            0.0 if _lives_on_device(group["lr"]) else float(group["lr"]),
            *map(float, group["betas"]),
            float(group["eps"]),
            float(group["weight_decay"]),
            -1.0 if group["maximize"] else 1.0,
        ]
        for group in groups
    ]


def write_hyper(hyper: Tensor, groups: Sequence[dict[str, Any]], rows: Rows | None) -> None:
    """Bring the groups' hyper-parameters to the device.

    Args:
        hyper: (num_groups, 6), float64. Mutated.
        groups: param groups, in the order of the rows.
        rows: what `hyper_rows` gave; None if the device knows it already.
    """
    if rows is not None:
        # torch reuses a pinned block only when the copy that reads it is done.
        staged = torch.tensor(rows, dtype=torch.float64, pin_memory=hyper.is_cuda)
        hyper.copy_(staged, non_blocking=True)
    for row, group in enumerate(groups):
        if _lives_on_device(group["lr"]):
            hyper[row, 0].copy_(group["lr"].squeeze(), non_blocking=True)


def write_scalar(buffer: Tensor, given: Tensor | None, default: float) -> None:
    """buffer <- given, or a default where nothing is given."""
    if given is None:
        buffer.fill_(default)
    else:
        buffer.copy_(given.squeeze(), non_blocking=True)


def check_capture(
    device: torch.device,
    capturable: bool,
    ready: bool,
    groups: Sequence[dict[str, Any]],
    known: Rows,
) -> None:
    """Raise where a CUDA graph is being captured that could not be replayed.

    Args:
        device: of the parameters.
        capturable: as the optimizer was constructed.
        ready: a step has been taken outside of a capture.
        groups: param groups.
        known: what `hyper_rows` gave in the last step.

    Raises:
        RuntimeError: says what to do before the capture.
    """
    if device.type != "cuda" or not torch.cuda.is_current_stream_capturing():
        return
    if not capturable:
        raise RuntimeError("step() is being captured in a CUDA graph: construct the optimizer with "
                           "capturable=True")  # fmt: skip
    if not ready:
        raise RuntimeError("take a step before the capture: the first one allocates state")
    if hyper_rows(groups) != known:
        raise RuntimeError(
            "hyper-parameters changed since the last step outside of the capture: a graph would "
            "keep them. Take a step before the capture; for a schedule, make lr a tensor on the "
            "device and change it in place"
        )

"""The processes that torchrun starts. One of them, the first, writes and prints.

torchrun passes a process its number in environment variables. They are read here, because the
process group does not exist yet when the output folder is locked. torch is imported on use: the
command prints before it does.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def count() -> int:
    """Number of processes that train together: 1 without torchrun."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "LOCAL_RANK" in os.environ else 1


def is_first() -> bool:
    """Whether this process writes the results and prints."""
    return count() == 1 or os.environ.get("RANK", "0") == "0"


def is_first_here() -> bool:
    """Whether this process is the first on its machine."""
    return count() == 1 or os.environ["LOCAL_RANK"] == "0"


def _is_group() -> bool:
    from torch import distributed

    return distributed.is_available() and distributed.is_initialized()


def wait_for_all() -> None:
    """Return once all processes have come here."""
    from torch import distributed

    if _is_group():
        distributed.barrier()


def largest(number: int, device: torch.device) -> int:
    """The largest of the numbers that the processes give. All of them must call it."""
    import torch
    from torch import distributed

    if not _is_group():
        return number
    numbers = torch.tensor(number, device=device)
    distributed.all_reduce(numbers, distributed.ReduceOp.MAX)
    return int(numbers)


def leave() -> None:
    """End the process group, if there is one: torch warns about one that is left open."""
    from torch import distributed

    if _is_group():
        distributed.destroy_process_group()

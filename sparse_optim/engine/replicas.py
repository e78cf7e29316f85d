"""Several processes that train replicas of a model: the averages that are left to us.

DistributedDataParallel averages whole gradients, and waits for all of them. Weights whose layers
sample have none on most steps: they are left out of its buckets (`sparse_optim.optim.left_out`),
and averaged here, within `step()`:

    every step    one all-reduce of a byte for each weight: does any process have a gradient of it?
    quiet step    one all-reduce of the gradients of active entries, 4 bytes each
    loud step     all-reduces of the whole gradients, in buckets, before entries are ranked

All processes then hold the same bits, so that they select and update alike. Gradients of
micro-batches under `no_sync()` add up locally and are averaged once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

BUCKET_BYTES = 25 << 20  # as DDP's


def has_group() -> bool:
    """Whether a process group exists, be it of one process."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def is_distributed() -> bool:
    """Whether several processes train together."""
    return has_group() and torch.distributed.get_world_size() > 1


class Replicas:
    """The processes that train a model, and the weights whose gradients they average themselves.

    Attributes:
        group: the process group of the wrapper; None until its forward pass has run.
        weights: the weights that the wrapper leaves out, each once, in the model's order.
    """

    def __init__(self) -> None:
        self.group: Any = None
        self.weights: Sequence[Tensor] = ()
        self._came: set[int] = set()

    def indices(self, params: Sequence[Tensor]) -> list[int]:
        """Which of these parameters' gradients are to be averaged here."""
        ours = {id(weight) for weight in self.weights} if is_distributed() else set()
        return [index for index, param in enumerate(params) if id(param) in ours]

    def came(self, param: Tensor) -> bool:
        """Whether any process has a gradient of this weight in this step."""
        return id(param) in self._came

    def agree(self, gave: Callable[[Tensor], bool], flag: bool, device: torch.device) -> bool:
        """Learn which weights have a gradient in any process.

        Args:
            gave: whether this process has a gradient of a weight.
            flag: a question of the caller's.
            device: of the weights.

        Returns:
            whether any process has raised the flag.
        """
        flags = [flag, *map(gave, self.weights)]
        anywhere = torch.tensor(flags, dtype=torch.uint8, device=device)
        torch.distributed.all_reduce(anywhere, torch.distributed.ReduceOp.MAX, self.group)
        raised, *came = anywhere.tolist()
        self._came = {id(weight) for weight, there in zip(self.weights, came, strict=True) if there}
        return bool(raised)

    def average_whole(self) -> None:
        """Average `.grad` of the weights that have one anywhere; elsewhere it counts as zeros."""
        there = [weight for weight in self.weights if self.came(weight)]
        for weight in there:
            if weight.grad is None:
                weight.grad = torch.zeros_like(weight)
        self.average([weight.grad for weight in there if weight.grad is not None])

    def average(self, tensors: Sequence[Tensor]) -> None:
        """Put the means over processes in place of these tensors, which all processes have."""
        for bucket in buckets(tensors):
            first, *more = bucket  # a large tensor is one by itself, and needs no copy
            flat = torch.cat([each.reshape(-1) for each in bucket]) if more else first
            flat = flat.contiguous().view(-1)
            # Divided first, as DDP does it: sums of 16-bit gradients might overflow.
            flat.div_(torch.distributed.get_world_size(self.group))
            torch.distributed.all_reduce(flat, group=self.group)
            means = flat.split([tensor.numel() for tensor in bucket])
            for tensor, mean in zip(bucket, means, strict=True):
                tensor.copy_(mean.view_as(tensor))

    def gather(self, numbers: Sequence[int], device: torch.device) -> list[list[int]]:
        """The numbers (int64) of each process; all processes give as many."""
        mine = torch.tensor(numbers, dtype=torch.int64, device=device)
        processes = torch.distributed.get_world_size(self.group)
        found = [torch.empty_like(mine) for _ in range(processes)]
        torch.distributed.all_gather(found, mine, self.group)
        return [each.tolist() for each in found]


def check_wrapped(replicas: Replicas) -> None:
    """Raise RuntimeError in several processes whose gradients nothing would average."""
    if replicas.group is not None or not is_distributed():
        return
    raise RuntimeError(
        "sampled_backward=True in several processes, but the model has not run in "
        "DistributedDataParallel, so that nothing would average its gradients. Keep this order: "
        "init_process_group(); the optimizer, with model=model; DistributedDataParallel(model), "
        "of the same model, not of one that holds it or is compiled from it. Then call the wrapper"
    )


def buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Runs of tensors of one dtype with at most BUCKET_BYTES; a larger tensor is one by itself."""
    bucket: list[Tensor] = []
    held = 0
    for tensor in tensors:
        if bucket and (held + tensor.nbytes > BUCKET_BYTES or tensor.dtype != bucket[0].dtype):
            yield bucket
            bucket, held = [], 0
        bucket.append(tensor)
        held += tensor.nbytes
    if bucket:
        yield bucket

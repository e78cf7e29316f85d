"""Several processes that train replicas of a model: what DistributedDataParallel leaves to us.

With sampled gradients the weights that layers sample are no business of DDP's: on most steps they
have no gradient that it could average. They are left out of its buckets
(`sparse_optim.optim.replicas`), and averaged here, when `step()` takes them:

    quiet step    one all-reduce of the active entries, 4 bytes each
    loud step     all-reduces of the whole gradients, in buckets, before entries are ranked

All ranks then hold the same bits, so that they select and update alike. Gradients of micro-batches
under `no_sync()` add up locally and are averaged once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

BUCKET_BYTES = 25 << 20  # as DDP's


def is_distributed() -> bool:
    """Whether several processes train together."""
    distributed = torch.distributed
    started = distributed.is_available() and distributed.is_initialized()
    return started and distributed.get_world_size() > 1


def replicas_of(params: Sequence[Tensor]) -> Any:
    """The process group of the DDP module whose forward pass is running.

    Args:
        params: weights that it must have left out.

    Raises:
        RuntimeError: none is running, it averages a weight of these itself, or it is in a `join`.
    """
    parallel = torch.nn.parallel.DistributedDataParallel
    wrapper: Any = parallel._get_active_ddp_module()  # noqa: SLF001 - there is no public way
    if wrapper is None:
        raise RuntimeError(
            "sampled_backward=True in several processes, and the forward pass is not that of "
            "DistributedDataParallel: nothing would average gradients. Build the optimizer with "
            "the model, wrap the model, DistributedDataParallel(model), and call the wrapper"
        )
    ours = {id(param) for param in params}
    left_out = wrapper.parameters_to_ignore
    if any(id(p) in ours and n not in left_out for n, p in wrapper.module.named_parameters()):
        raise RuntimeError(
            "sampled_backward=True, but DistributedDataParallel averages the weights whose layers "
            "sample, and would wait for gradients that do not come. First init_process_group(), "
            "then build the optimizer, with model=model, then DistributedDataParallel(model)"
        )
    if wrapper._join_config.enable:  # noqa: SLF001
        raise RuntimeError(
            "sampled_backward=True does not work in DDP's join(): a process without data would not "
            "take part in our averages. Give all processes as many batches, or leave "
            "sampled_backward False"
        )
    return wrapper.process_group


def agree(flags: Sequence[bool], device: torch.device, group: Any) -> list[bool]:
    """Whether any process has the flag, of each."""
    ours = torch.tensor(flags, dtype=torch.uint8, device=device)
    torch.distributed.all_reduce(ours, torch.distributed.ReduceOp.MAX, group)
    return [bool(flag) for flag in ours.tolist()]


def average(tensors: Sequence[Tensor], group: Any) -> None:
    """Put the means over processes in place of the tensors, which all processes have alike."""
    size = torch.distributed.get_world_size(group)
    for bucket in buckets(tensors):
        # Divided first, as DDP does it: sums of 16-bit gradients might overflow.
        flat = torch.cat([tensor.reshape(-1) for tensor in bucket]).div_(size)
        torch.distributed.all_reduce(flat, group=group)
        for tensor, mean in zip(
            bucket, flat.split([tensor.numel() for tensor in bucket]), strict=True
        ):
            tensor.copy_(mean.view_as(tensor))


def buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Runs of tensors of one dtype with at most BUCKET_BYTES; a larger tensor is one by itself."""
    bucket: list[Tensor] = []
    held = 0
    for tensor in tensors:
        size = tensor.numel() * tensor.element_size()
        if bucket and (held + size > BUCKET_BYTES or tensor.dtype != bucket[0].dtype):
            yield bucket
            bucket, held = [], 0
        bucket.append(tensor)
        held += size
    if bucket:
        yield bucket

"""What vLLM's sparse weight transfer takes.

Its dataclass and what it checks before it sends and applies patches, as published with
vllm-project/vllm pull requests 40096 and 53751 (vllm/distributed/weight_transfer/
sparse_nccl_engine.py and vllm/model_executor/model_loader/checkpoint_weight_patch.py).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from publish_cases import Net, Run, assert_same, states
from torch import Tensor


@dataclass
class SparseWeightPatch:
    """The fields, in their order."""

    name: str
    indices: Tensor
    values: Tensor
    full_shape: tuple[int, ...]


def check(patch: SparseWeightPatch) -> None:
    """What the trainer's side rejects, and what NCCL and the loader rely on."""
    assert isinstance(patch.full_shape, tuple)
    assert patch.indices.dtype == torch.int32
    assert patch.indices.ndim == patch.values.ndim == 1
    assert patch.indices.numel() == patch.values.numel() > 0
    assert patch.indices.is_contiguous()  # NCCL sends raw memory
    assert patch.values.is_contiguous()
    assert patch.indices.unique().numel() == patch.indices.numel()
    assert int(patch.indices.min()) >= 0
    assert int(patch.indices.max()) < torch.Size(patch.full_shape).numel()
    assert not patch.values.isnan().any()  # the loader marks unchanged entries by NaN


def load(model: dict[str, Tensor], patch: SparseWeightPatch) -> None:
    """As the checkpoint loader does: a tensor of NaN with the new values, loaded where not NaN."""
    full = torch.full(patch.full_shape, torch.nan).to(patch.values.dtype)
    full.view(-1).index_copy_(0, patch.indices.long(), patch.values)
    target = model[patch.name]
    assert patch.values.dtype == target.dtype
    target.copy_(torch.where(full.isnan(), target, full))


def test_entries_are_its_patches():
    run, served = Run(torch.bfloat16), states(Net(torch.bfloat16))
    buffers = {name for name, _ in run.net.named_buffers()}
    for _ in range(4):
        run.next()
        for entry in run.publisher.whole().entries():
            if entry.name in buffers:  # buffers are no weights: vLLM loads none
                continue
            patch = SparseWeightPatch(*entry)
            check(patch)
            load(served, patch)
            if patch.name == "words.weight":  # tied: its loader knows of one of them
                served["out.weight"].copy_(served["words.weight"])
    weights = {name: tensor for name, tensor in states(run.net).items() if name not in buffers}
    assert_same({name: served[name] for name in weights}, weights)

"""accelerate's FSDP2 plugin, from `prepare` to `load_state`, in processes on the CPU.

python accelerate_fsdp.py FOLDER        (RANK, WORLD_SIZE, ... as torchrun sets them)

accelerate turns the plugin on for accelerators alone. Here its state is told that the group of
CPU processes is one of FSDP; all that follows is accelerate's own.
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from processes import leave_group
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from sparse_optim import IncrementalMaskedAdamW, save_delta

STEPS, SAVED = 6, 3


def build(accelerator: Accelerator) -> tuple[Any, Any]:
    """A net and its optimizer, sharded by the plugin."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 31), nn.Tanh(), nn.Linear(31, 3))
    optimizer = IncrementalMaskedAdamW(
        net.named_parameters(), budget=60, total_steps=STEPS, unmask_steps=1.0, lr=0.01
    )
    return accelerator.prepare(net, optimizer)


def train(accelerator: Accelerator, net: Any, optimizer: Any, step: int) -> None:
    """One step of two micro-batches, clipped by accelerate."""
    for micro in range(2):
        seed = torch.Generator().manual_seed(10 * step + 2 * micro + accelerator.process_index)
        with accelerator.accumulate(net):
            accelerator.backward(net(torch.randn(4, 8, generator=seed)).square().mean())
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(net.parameters(), 0.05)
            optimizer.step()
            optimizer.zero_grad()


def weights(net: Any) -> list[Tensor]:
    """Whole, in every process."""
    return [param.full_tensor().clone() for param in net.parameters()]


def main() -> None:
    folder = Path(sys.argv[1])
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="no_wrap", state_dict_type="SHARDED_STATE_DICT",
        cpu_ram_efficient_loading=False,
    )  # fmt: skip
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    for state in (AcceleratorState, PartialState):
        state._shared_state["distributed_type"] = DistributedType.FSDP
    accelerator.state.fsdp_plugin = plugin
    assert accelerator.is_fsdp2

    net, optimizer = build(accelerator)
    assert all(isinstance(param, DTensor) for param in net.parameters())
    for step in range(STEPS):
        train(accelerator, net, optimizer, step)
        if step == SAVED - 1:
            accelerator.save_state(folder / "state")
            assert optimizer.optimizer.metrics()["active"] == 30
    expected = weights(net)
    save_delta(optimizer.optimizer.delta(net), folder / f"whole{accelerator.process_index}")

    accelerator.free_memory()
    net, optimizer = build(accelerator)
    accelerator.load_state(folder / "state")
    assert optimizer.optimizer.metrics()["active"] == 30
    for step in range(SAVED, STEPS):
        train(accelerator, net, optimizer, step)
    for got, want in zip(weights(net), expected, strict=True):
        assert torch.equal(got, want)
    save_delta(optimizer.optimizer.delta(net), folder / f"resumed{accelerator.process_index}")
    leave_group()


if __name__ == "__main__":
    main()

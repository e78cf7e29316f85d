"""What this process holds of a sharded pool, and the processes that hold the rest.

Each process reads the gradients of its own shards, and keeps the state of their active entries.
All of them agree on what is unmasked (`kth_largest`), and on one norm: one all-reduce of a number
for each tensor.

Positions in deltas and checkpoints, and the order of ties, are those of the whole tensor, so that
a run of any number of processes unmasks the same entries and writes the same files.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from sparse_optim.engine.blocks import Block, is_sharded, local_of, make_up


class Shards:
    """What this process holds of a pool, and with whom it shares the rest.

    Building it is collective: all processes build it with the same parameters.

    Args:
        params, names: S parameters of the pool.
        dense: D parameters trained densely.

    Attributes:
        params: both.
        group: of the processes that share the pool.
        blocks: of the shards of the pool.
        held: (S + D) lists of the blocks that the processes hold of a parameter.
        owned: (S + D,), bool: whether this process counts a shard, which others may hold, too: a
            replicated one counts once.

    Raises:
        TypeError, ValueError, RuntimeError: see `Block.of`; parameters that are whole in each
            process beside sharded ones; other parameters in other processes; a mesh without a
            process group for all of it.
    """

    def __init__(
        self, params: Sequence[Tensor], names: Sequence[str], dense: Sequence[Any]
    ) -> None:
        both = self.params = (*params, *dense)
        every = [*names, *(f"dense parameter {number}" for number in range(len(dense)))]
        for param, name in zip(both, every, strict=True):
            if not is_sharded(param):
                raise TypeError(
                    f"{name} is whole in each process, and others are sharded: nothing would keep "
                    "its replicas equal. Shard it too (fully_shard of the whole model), make it a "
                    "DTensor with Replicate(), or put it into a group with unmask='none'"
                )
        self.group = _group_of(both)
        self.size = torch.distributed.get_world_size(self.group)
        self.rank = torch.distributed.get_rank(self.group)
        device = local_of(both[0]).device
        said = [(name, tuple(p.shape), p.dtype) for p, name in zip(both, every, strict=True)]
        self.check_agreed(
            [len(params), len(dense), *digest_of(said)], device, "parameters of the optimizer"
        )
        blocks, error = [], None
        try:
            blocks = [Block.of(param, name) for param, name in zip(both, every, strict=True)]
        except TypeError as found:
            error = found
        self.raise_together(error, device)
        self.blocks = tuple(blocks[: len(params)])
        mine = [[each.run, each.pitch, each.offset, each.entries] for each in blocks]
        held = self.gather(torch.tensor(mine, dtype=torch.int64, device=device)).tolist()
        self.held = [[Block(*block) for block in blocks] for blocks in zip(*held, strict=True)]
        self.owned = self._find_owned(both, every).to(device)
        self._run, self._pitch, self._offset = (
            torch.tensor([getattr(each, field) for each in self.blocks], device=device)
            for field in ("run", "pitch", "offset")
        )
        sizes = torch.tensor([0, *(param.numel() for param in params)])
        self.starts = sizes.cumsum(0)[:-1].to(device)

    def _find_owned(self, params: Sequence[Tensor], names: Sequence[str]) -> Tensor:
        """Whether each shard is this process's to count: the first one that holds it."""
        owned = []
        for param, name, blocks in zip(params, names, self.held, strict=True):
            if not make_up(set(blocks), param.numel()):
                raise RuntimeError(
                    f"the shards of {name} do not make up its {param.numel()} entries: the process "
                    f"group of {self.size} does not hold all of it, or some of it twice"
                )
            owned.append(blocks.index(blocks[self.rank]) == self.rank)
        return torch.tensor(owned)

    def check_agreed(self, numbers: Sequence[int], device: torch.device, what: str) -> None:
        """Raise RuntimeError, in all processes, unless all of them give the same numbers."""
        everyone = self.gather(torch.tensor(numbers, dtype=torch.int64, device=device))
        if not bool((everyone == everyone[0]).all()):
            raise RuntimeError(
                f"the {what} differ between the processes: build the same optimizer, with the "
                "same arguments, in all of them"
            )

    def raise_together(self, error: Exception | None, device: torch.device) -> None:
        """Raise the error of this process, or that another process has one; else nothing.

        A process that raised alone would leave the others waiting for it.
        """
        failed = torch.tensor(int(error is not None), device=device)
        self.add(failed)
        if error is not None:
            raise error
        if failed:
            raise RuntimeError(
                f"{int(failed)} of {self.size} processes raised an error: see their messages"
            )

    def gather(self, mine: Tensor) -> Tensor:
        """The same tensor of all processes: (processes, *shape)."""
        everyone = mine.new_empty(self.size * mine.numel())
        renamed = getattr(torch.distributed, "all_gather_single", None)  # since torch 2.13
        all_gather = renamed or torch.distributed.all_gather_into_tensor
        all_gather(everyone, mine.reshape(-1), group=self.group)
        return everyone.view(self.size, *mine.shape)

    def add(self, numbers: Tensor) -> None:
        """Put the sum over all processes in place of the numbers."""
        if self.size > 1:
            torch.distributed.all_reduce(numbers, group=self.group)

    def greatest(self, numbers: Tensor) -> None:
        """Put the largest of all processes in place of the numbers."""
        if self.size > 1:
            greatest = torch.distributed.ReduceOp.MAX
            torch.distributed.all_reduce(numbers, op=greatest, group=self.group)

    def add_norms(self, norms: Tensor, found_inf: Tensor, counted: Tensor) -> None:
        """Put the norms of whole tensors in place of those of shards.

        Args:
            norms: (S + D,), float64. Mutated.
            found_inf: (), float32. Mutated: 1 where it is 1 in any process.
            counted: (S + D,), bool: which of them this process counts.
        """
        if self.size == 1:
            return
        squares = torch.where(counted, norms.square(), 0.0)
        both = torch.cat([squares, found_inf.double().view(1)])
        self.add(both)
        norms.copy_(both[:-1].sqrt())
        found_inf.copy_((both[-1] != 0).float())

    def whole_position(self, tensor: Tensor, position: Tensor) -> Tensor:
        """Positions in the whole tensors, int64.

        Args:
            tensor: (n,), int, index in the pool.
            position: (n,), int, position in the shard.
        """
        run, at = self._run[tensor], position.long()
        return at // run * self._pitch[tensor] + at % run + self._offset[tensor]

    def cut_out(self, index: int, position: Tensor) -> tuple[Tensor, Tensor]:
        """Which positions of a whole tensor are in this process's shard, and where in it.

        Args:
            index: of the tensor in the pool.
            position: (n,), int.

        Returns:
            (inside (n,) bool, positions in the shard of those inside, int64)
        """
        block = self.blocks[index]
        at = position.long() - block.offset
        row, column = at // block.pitch, at % block.pitch
        inside = (at >= 0) & (column < block.run) & (row < block.entries // block.run)
        return inside, row[inside] * block.run + column[inside]

    def pieces(self, mine: Tensor) -> Iterator[Tensor]:
        """Tensors of all processes that differ in length, (n, columns), one after the other."""
        lengths = self.gather(torch.tensor([mine.size(0)], device=mine.device)).view(-1).tolist()
        for rank, length in enumerate(lengths):
            piece = mine.contiguous() if rank == self.rank else mine.new_empty(length, mine.size(1))
            if length:
                source = torch.distributed.get_global_rank(self.group, rank)
                torch.distributed.broadcast(piece, source, group=self.group)
                yield piece


def digest_of(value: object) -> list[int]:
    """A hash of what `repr` shows, addresses apart, as two int64."""
    shown = re.sub(r" at 0x[0-9a-f]+", "", repr(value))
    digest = hashlib.blake2b(shown.encode(), digest_size=16).digest()
    return [int.from_bytes(digest[at : at + 8], "little", signed=True) for at in (0, 8)]


def _group_of(params: Sequence[Any]) -> Any:
    """The process group of the largest mesh over which parameters are sharded."""
    mesh = max((param.device_mesh for param in params), key=lambda mesh: mesh.size())
    if mesh.ndim == 1:
        return mesh.get_group()
    if mesh.size() == torch.distributed.get_world_size():
        return torch.distributed.group.WORLD
    raise RuntimeError(
        f"parameters are sharded over {mesh}, which has several dimensions and is not the whole "
        "world, so that no process group has all of it: start one world for it"
    )

"""Sharded parameters (DTensor: `fully_shard`, tensor parallelism): what this process holds of them.

Each process reads the gradients of its own shards, and keeps the state of their active entries.
All processes agree on what is unmasked, and on one norm:

    norms      one all-reduce of a number for each tensor
    selection  8 bytes a winner of each process in one all-gather; or, where that is much, six
               all-reduces of 16 KB, whatever the pool, the budget and the processes

Positions in deltas and checkpoints, and the order of ties, are those of the whole tensor, so that
a run of any number of processes unmasks the same entries and writes the same files.

A shard is a block of its tensor. Entry p of it, in C order, is this entry of the whole tensor:

    (p // run) * pitch + p % run + offset

`Shard(0)` is one run; `Shard(1)` of a matrix has a run in each row.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

DIGIT_BITS = 11
SHIFTS = (55, 44, 33, 22, 11, 0)
DIGITS = 1 << DIGIT_BITS
SIGN = 1 << (63 - SHIFTS[0])  # words are signed: their first digit counts from -SIGN
LEAST = torch.iinfo(torch.int64).min
# Up to here one collective of more bytes takes less time than six: see docs/scale.md.
GATHERED_BYTES = 1 << 20


def is_sharded(param: Tensor) -> bool:
    """Whether a tensor is a DTensor; does not import torch.distributed.tensor."""
    if type(param) is Tensor or type(param) is torch.nn.Parameter:
        return False
    return hasattr(param, "to_local") and hasattr(param, "placements")


def local_of(tensor: Any) -> Tensor:
    """The memory of a tensor in this process; of a plain tensor, itself."""
    if not is_sharded(tensor):
        plain: Tensor = tensor
        return plain
    # `to_local()` makes a view each time, which took 4 us a parameter and call.
    local: Any = tensor._local_tensor  # noqa: SLF001
    return local.wait() if hasattr(local, "wait") else local  # type: ignore[no-any-return]


def local_gradient(param: Any, name: str) -> Tensor | None:
    """The gradient of this process's shard of a parameter, or None.

    One with other placements (Partial, after tensor parallelism) is redistributed, which all
    processes do together.

    Raises:
        TypeError: the gradient is no DTensor.
    """
    grad: Any = param.grad
    if grad is None:
        return None
    if not is_sharded(grad):
        raise TypeError(f"{name} is a DTensor, but its gradient is a {type(grad).__name__}")
    if grad.placements != param.placements:
        grad = grad.redistribute(param.device_mesh, param.placements)
    return local_of(grad)


@dataclass(frozen=True)
class Block:
    """Where a shard is in its tensor; see the module.

    Attributes:
        entries: of the shard.
    """

    run: int
    pitch: int
    offset: int
    entries: int

    @staticmethod
    def of(param: Any, name: str) -> Block:
        """The block that this process holds of a parameter.

        Raises:
            TypeError: it is a sum to be made (Partial), or no block of this form.
        """
        from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

        if not is_sharded(param):
            return Block(max(param.numel(), 1), max(param.numel(), 1), 0, param.numel())
        whole, placements = tuple(param.shape), param.placements
        if any(each.is_partial() for each in placements):
            raise TypeError(
                f"{name} has placements {placements}: expected Shard or Replicate. Redistribute it "
                "before the optimizer is built"
            )
        shape, begin = compute_local_shape_and_global_offset(whole, param.device_mesh, placements)
        local = tuple(local_of(param).shape)
        if tuple(shape) != local:
            raise TypeError(
                f"{name} has placements {placements} and a shard of {local}, expected "
                f"{tuple(shape)}: such a layout is not supported"
            )
        return block_of(whole, shape, begin, name)


def block_of(whole: Sequence[int], shape: Sequence[int], begin: Sequence[int], name: str) -> Block:
    """The block of `shape` that begins at the coordinates `begin` of a tensor of shape `whole`.

    Raises:
        TypeError: it takes more than one run in each of evenly spaced places.

    Examples:
        >>> block_of((6, 4), (2, 4), (2, 0), "rows")
        Block(run=8, pitch=24, offset=8, entries=8)
        >>> block_of((6, 4), (6, 2), (0, 2), "columns")
        Block(run=2, pitch=4, offset=2, entries=12)
    """
    entries = prod(shape)
    if not entries:
        return Block(1, 1, 0, 0)
    strides = [prod(whole[dim + 1 :]) for dim in range(len(whole))]
    offset = sum(at * stride for at, stride in zip(begin, strides, strict=True))
    cut = [dim for dim, size in enumerate(shape) if size != whole[dim]]
    last = cut[-1] if cut else 0
    before = cut[:-1]
    if before and prod(shape[: before[-1]]) != 1:
        raise TypeError(
            f"{name} of shape {tuple(whole)} is sharded in dimensions {cut}: at most the first one "
            "and one more are supported"
        )
    return Block(prod(shape[last:]), prod(whole[last:]), offset, entries)


def make_up(blocks: Collection[Block], entries: int) -> bool:
    """Whether different blocks are a grid that holds each of a tensor's entries once."""
    columns: dict[tuple[int, int], list[tuple[int, int]]] = {}
    pitch = max((block.pitch for block in blocks if block.entries), default=1)
    for block in blocks:
        if block.entries:
            row, column = divmod(block.offset, block.pitch)
            rows = (row, row + block.entries // block.run)
            columns.setdefault((column, column + block.run), []).append(rows)
            if block.pitch != pitch:
                return False
    return all(covers(rows, entries // pitch) for rows in columns.values()) and covers(
        list(columns), pitch if entries else 0
    )


def covers(ranges: Sequence[tuple[int, int]], size: int) -> bool:
    """Whether ranges are 0 to size, without gap or overlap."""
    ends = [0, *(end for _, end in sorted(ranges))]
    return ends == [*(begin for begin, _ in sorted(ranges)), size]


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


def kth_largest(
    words: Tensor, alive: Tensor, k: Tensor, most: int, shards: Shards
) -> tuple[Tensor, Tensor]:
    """The k-th largest of the words of all processes.

    Args:
        words: (n,), int64, all different, above LEAST; n at most `most`.
        alive: (n,), bool: which of them count.
        k: (), int64, at most `most`; the same in all processes, as `most` is.

    Returns:
        (count (), int64: k, or how many there are if these are fewer; the count-th largest word,
        (), int64). The same in all processes. Where count is 0, no word reaches it.
    """
    gather = most * words.element_size() * shards.size <= GATHERED_BYTES
    count, word = (by_gathering if gather else by_counting)(words, alive, k, most, shards)
    return count, torch.where(count > 0, word, torch.iinfo(torch.int64).max)


def by_gathering(
    words: Tensor, alive: Tensor, k: Tensor, most: int, shards: Shards
) -> tuple[Tensor, Tensor]:
    """`kth_largest` of all words in one place: one collective."""
    mine = words.new_full((most,), LEAST)
    mine[: words.numel()] = torch.where(alive, words, LEAST)
    everyone = shards.gather(mine).view(-1)
    count = torch.minimum(k, (everyone != LEAST).sum())
    best = everyone.topk(most).values
    return count, best.gather(0, (count - 1).clamp(min=0).view(1)).squeeze(0)


def by_counting(
    words: Tensor, alive: Tensor, k: Tensor, most: int, shards: Shards
) -> tuple[Tensor, Tensor]:
    """`kth_largest` by its digits, from the first on (radix select)."""
    left, count, found = k, k, torch.zeros_like(k)
    for number, shift in enumerate(SHIFTS):
        digit = (words >> shift) + SIGN if number == 0 else words >> shift & (DIGITS - 1)
        counts = torch.zeros(DIGITS, dtype=torch.int64, device=words.device)
        counts.index_add_(0, digit.clamp(0, DIGITS - 1), alive.long())
        shards.add(counts)
        if number == 0:
            left = count = torch.minimum(k, counts.sum())
        reached = counts.flip(0).cumsum(0)  # words of this digit or a larger one, from the largest
        above = (reached < left).sum().clamp(max=DIGITS - 1)
        chosen = DIGITS - 1 - above
        before = reached.gather(0, (above - 1).clamp(min=0).view(1)).squeeze(0)
        left = left - torch.where(above > 0, before, 0)
        alive = alive & (digit == chosen)
        found = found + ((chosen - SIGN if number == 0 else chosen) << shift)
    return count, found


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

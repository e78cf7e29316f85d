"""What an optimizer of sharded parameters says about the unsharded ones: tensors, moments,
fingerprints.

No process gathers the pool. Only what is trained densely is put together in every process; for
fingerprints, one tensor at a time is put together in one of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sparse_optim.delta._fingerprint import Hasher, fingerprint
from sparse_optim.engine.blocks import is_sharded, local_of
from sparse_optim.engine.pool import Pool
from sparse_optim.engine.shards import Shards
from sparse_optim.optim.state import DIGEST_BYTES


def whole_of(tensor: Any) -> Tensor:
    """A DTensor as a plain tensor, gathered from all processes; a plain one as it is."""
    whole: Tensor = tensor.full_tensor() if is_sharded(tensor) else tensor
    return whole


def placed_like(param: Any, value: Any) -> Any:
    """A state tensor of the whole parameter, sharded as the parameter is."""
    if not is_sharded(param) or is_sharded(value):
        return value
    from torch.distributed.tensor import distribute_tensor

    value = value.to(param.device)
    return distribute_tensor(value, param.device_mesh, param.placements, src_data_rank=None)


def hasher_of(pool: Pool) -> Hasher:
    """What takes the fingerprints of a pool."""
    return Hasher() if pool.shards is None else ShardedHasher(pool.shards)


class ShardedHasher(Hasher):
    """Fingerprints of whole tensors: each is put together and hashed in one of the processes.

    Every process sends its shards once, and hashes its share of the tensors.
    """

    def __init__(self, shards: Shards) -> None:
        self._shards = shards

    def fingerprints(self, pool: Sequence[Tensor], indices: Iterable[int]) -> list[str]:
        """See `Hasher`; collective."""
        shards, places = self._shards, list(indices)
        digests = torch.zeros(len(places), DIGEST_BYTES, dtype=torch.uint8)
        for number, index in enumerate(places):
            whole = self._gathered(pool[index], index, to=number % shards.size)
            if whole is not None:
                digest = bytes.fromhex(fingerprint(whole))
                digests[number] = torch.frombuffer(bytearray(digest), dtype=torch.uint8)
        digests = digests.to(shards.owned.device)
        shards.add(digests)
        return [bytes(row).hex() for row in digests.tolist()]

    def mark(self, tensor: Tensor) -> tuple[int, int]:
        """See `Hasher`."""
        local = local_of(tensor)
        return tensor._version + local._version, local.data_ptr()

    def agreed(self, indices: list[int]) -> list[int]:
        """Those that any process found."""
        found = torch.zeros_like(self._shards.owned, dtype=torch.int32)
        found[indices] = 1
        self._shards.add(found)
        return found.nonzero().view(-1).tolist()

    def _gathered(self, param: Tensor, index: int, to: int) -> Tensor | None:
        """The whole tensor, flat, in process `to` of the group; None in the others."""
        shards, local = self._shards, local_of(param).detach().reshape(-1)
        blocks, place = shards.held[index], partial(torch.distributed.get_global_rank, shards.group)
        if shards.rank != to:
            # The first process that holds a block sends it, if the receiver has not got it itself.
            mine = blocks[shards.rank]
            if shards.owned[index] and mine.entries and mine != blocks[to]:
                as_bytes = local.contiguous().view(torch.uint8)  # gloo does not send all dtypes
                torch.distributed.send(as_bytes, place(to), group=shards.group)
            return None
        whole = local.new_empty(param.numel())
        for rank, block in enumerate(blocks):
            if not block.entries or blocks.index(block) != rank:
                continue
            piece = local
            if block != blocks[to]:
                piece = local.new_empty(block.entries)
                torch.distributed.recv(piece.view(torch.uint8), place(rank), group=shards.group)
            rows = (block.entries // block.run, block.run)
            whole.as_strided(rows, (block.pitch, 1), block.offset).copy_(piece.view(rows))
        return whole

"""What an optimizer of sharded parameters says of the whole: tensors, moments, fingerprints.

No process ever gathers the pool: whole tensors are made of what is trained densely, and for
fingerprints one at a time, in one of the processes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from sparse_optim.delta._fingerprint import Hasher, fingerprint
from sparse_optim.engine.pool import Pool
from sparse_optim.engine.shards import Shards, is_sharded, local_of
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
        return tensor._version, local_of(tensor).data_ptr()

    def agreed(self, indices: list[int]) -> list[int]:
        """Those that any process found."""
        found = torch.zeros_like(self._shards.owned, dtype=torch.int32)
        found[indices] = 1
        self._shards.add(found)
        return found.nonzero().view(-1).tolist()

    def _gathered(self, param: Tensor, index: int, to: int) -> Tensor | None:
        """The whole tensor, flat, in process `to` of the group; None in the others."""
        shards, local = self._shards, local_of(param).detach().reshape(-1)
        blocks = shards.held[index]
        piece = local.new_zeros(max(block.entries for block in blocks))
        piece[: local.numel()] = local
        as_bytes = piece.view(torch.uint8)  # gloo does not send all dtypes
        here = shards.rank == to
        pieces = [torch.empty_like(as_bytes) for _ in blocks] if here else None
        target = torch.distributed.get_global_rank(shards.group, to)
        torch.distributed.gather(as_bytes, pieces, target, group=shards.group)
        if pieces is None:
            return None
        whole = local.new_empty(param.numel())
        for block, found in zip(blocks, pieces, strict=True):
            if block.entries:
                rows = (block.entries // block.run, block.run)
                room = whole.as_strided(rows, (block.pitch, 1), block.offset)
                room.copy_(found.view(local.dtype)[: block.entries].view(rows))
        return whole

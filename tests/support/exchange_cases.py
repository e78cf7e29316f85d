"""Cases of the operations `exchange` and `gather`, and what must come of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from op_cases import DTYPES
from torch import Tensor

WORDS = {4: torch.int32, 2: torch.int16}


@dataclass
class Exchange:
    """Parameters, and entries to swap with values.

    Attributes:
        params: of any dtypes that the operations take.
        position, offsets, value: arguments of the operation.
    """

    params: list[Tensor]
    position: Tensor
    offsets: Tensor
    value: Tensor

    def copy(self, device: str | torch.device = "cpu") -> Exchange:
        """With memory of its own, on a device; views stay where they were in their memory."""
        return Exchange(
            [_copy(param, device) for param in self.params],
            self.position.to(device, copy=True),
            self.offsets.to(device, copy=True),
            self.value.to(device, copy=True),
        )

    def run(self, ops: Any, name: str = "exchange") -> Exchange:
        """Do it, in place; or `gather`."""
        device = self.offsets.device
        table = torch.zeros(len(self.params), 4, dtype=torch.int64, device=device)
        bound = ops.bind([param.new_empty(0) for param in self.params], self.params, table)
        getattr(ops, name)(bound, self.position, self.offsets, self.value)
        return self

    def expected(self) -> Exchange:
        """Entry by entry."""
        result = self.copy()
        for index, param in enumerate(result.params):
            flat = bits_of(param).view(-1)
            for e in range(*result.offsets[index : index + 2].tolist()):
                at = int(result.position[e])
                before = int(flat[at]) & (0xFFFFFFFF if flat.dtype == torch.int32 else 0xFFFF)
                flat[at] = result.value[e].to(flat.dtype)
                result.value[e] = torch.tensor(before).to(torch.int32)
        return result


def _copy(param: Tensor, device: str | torch.device) -> Tensor:
    start = param.storage_offset()
    memory = torch.zeros(start + param.numel(), dtype=param.dtype, device=device)
    bits_of(memory)[start:] = bits_of(param).view(-1).to(device)
    return memory[start:].view(param.shape)


def bits_of(tensor: Tensor) -> Tensor:
    return tensor.view(WORDS[tensor.dtype.itemsize])


def make_exchange(
    sizes: Sequence[int],
    share: float,
    dtypes: Sequence[torch.dtype] = DTYPES,
    seed: int = 0,
    offset_views: bool = False,
) -> Exchange:
    """Parameters and values of random bits, NaN payloads among them."""
    generator = torch.Generator().manual_seed(seed)
    params, positions, values = [], [], []
    for index, size in enumerate(sizes):
        dtype = dtypes[index % len(dtypes)]
        start = int(offset_views)
        word = WORDS[dtype.itemsize]
        params.append(random_bits(start + size, word, generator).view(dtype)[start:])
        chosen = torch.rand(size, generator=generator) < share
        positions.append(chosen.nonzero().view(-1).int())
        new = random_bits(len(positions[-1]), word, generator).int()
        values.append(new if word == torch.int32 else new & 0xFFFF)
    counts = torch.tensor([0, *map(len, positions)])
    none = [torch.empty(0, dtype=torch.int32)]
    return Exchange(
        params, torch.cat([*positions, *none]), counts.cumsum(0), torch.cat([*values, *none])
    )


def random_bits(size: int, word: torch.dtype, generator: torch.Generator) -> Tensor:
    info = torch.iinfo(word)
    return torch.randint(info.min, info.max, (size,), generator=generator, dtype=word)


def exchange_cases() -> Iterator[tuple[str, Exchange]]:
    """Sizes around blocks of 256 threads and tasks of 4096 entries, dtypes, shares, views."""
    yield "no tensors", make_exchange([], 0.5)
    yield "no entries", make_exchange([5, 0, 9], 0.0)
    for size in (1, 127, 128, 129, 255, 256, 257):
        for dtype in DTYPES:
            yield f"{size} {dtype}", make_exchange([size], 1.0, [dtype], seed=size)
    for share in (0.01, 0.3, 1.0):
        yield f"many tensors {share}", make_exchange([0, 1, 700, 0, 33, 900, 1, 5], share)
    yield "tasks", make_exchange([4096, 4097, 9000], 1.0)
    yield "views", make_exchange([257, 90], 0.5, offset_views=True)
    short = make_exchange([300, 200], 0.5)
    room = torch.full((50,), 7, dtype=torch.int32)  # entries that no tensor has
    yield (
        "room behind the entries",
        replace(
            short, position=torch.cat([short.position, room]), value=torch.cat([short.value, room])
        ),
    )


def assert_exchanged(ops: Any, name: str, case: Exchange, device: str = "cpu") -> None:
    """The operation does what it should, and undoes it; before, `gather` reads what it replaces."""
    want, got = case.expected(), case.copy(device)
    read = case.copy(device)
    read.run(ops, "gather")
    assert torch.equal(read.value.cpu(), want.value), f"gather {name}"
    for index, (a, b) in enumerate(zip(read.params, case.params, strict=True)):
        assert torch.equal(bits_of(a.cpu()), bits_of(b)), f"gather {name}: tensor {index}"
    for expected in (want, case):
        got.run(ops)
        assert torch.equal(got.value.cpu(), expected.value), name
        for index, (a, b) in enumerate(zip(got.params, expected.params, strict=True)):
            assert torch.equal(bits_of(a.cpu()), bits_of(b)), f"{name}: tensor {index}"

"""The C++ CPU backend: the operations of `reference` as compiled torch operators (csrc/)."""

from __future__ import annotations

import importlib
from collections.abc import Sequence

import torch
from torch import Tensor

importlib.import_module("sparse_optim._C")  # registers torch.ops.sparse_optim

# 512 entries: 2 KB of float32, small enough that opening a tile costs little, large enough that
# tile maxima (4 bytes each) do not count. A prototype's choice; not measured anew here.
TILE = 512


def bind(grads: Sequence[Tensor], params: Sequence[Tensor], table: Tensor) -> Tensor:
    """Note pointers, sizes and dtypes in the table, which is what the operations take.

    Once a step: handing two lists of 200 tensors to an operator takes 0.1 ms.
    """
    torch.ops.sparse_optim.bind(grads, params, table)
    return table


scan = torch.ops.sparse_optim.scan.default
clip = torch.ops.sparse_optim.clip.default
rank = torch.ops.sparse_optim.rank.default
cut = torch.ops.sparse_optim.cut.default
append = torch.ops.sparse_optim.append.default
update = torch.ops.sparse_optim.update.default


def scratch_bytes(num_tiles: int, capacity: int, max_quota: int) -> int:
    """No scratch: work space of the CPU kernels lives on their stacks and in short vectors."""
    return 0


def _mutates_only(*args: object) -> None:
    """Shape function of an operator that returns nothing."""


for _name in ("bind", "scan", "clip", "rank", "cut", "append", "update"):
    torch.library.register_fake(f"sparse_optim::{_name}", _mutates_only)

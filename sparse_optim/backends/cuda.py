"""The CUDA backend: the operations of `reference` as kernels on the parameters' device (csrc/cuda).

Nothing in a step waits for the device: quota, counts and flags stay there, so that a step can be
captured in a CUDA graph. Selections equal those of `reference` bit for bit, for exponents in
{-1, -0.5, 0, 0.5, 1, 2}.

Unrun on a GPU so far: the kernels are compiled for sm_80, sm_86 and sm_90 and run against
`reference` by an emulator on the CPU. No claim about speed has been measured.
"""

from __future__ import annotations

import importlib

from sparse_optim.backends.cpp import append, bind, clip, cut, rank, sampled_grad, scan, update

__all__ = [
    "TILE", "append", "bind", "clip", "cut", "rank", "sampled_grad", "scan", "scratch_bytes",
    "update",
]  # fmt: skip

# The operators are those of `cpp`; this registers their CUDA kernels.
_kernels = importlib.import_module("sparse_optim._C_cuda")

# 4096 entries: 128 for each lane of the warp that reads a tile, so that searching the active
# entries and reducing over the warp cost little beside; tile maxima are 4 bytes in 16 KB.
# Larger ones would make `cut` read more around each winner. Not yet measured on a GPU.
TILE = 4096


def scratch_bytes(num_tiles: int, capacity: int, max_quota: int) -> int:
    """Bytes of scratch memory: 200 KB for the sums of dense gradients and 4 per tile; or 400 KB for
    candidates and 24 per tile; or 8 per entry of the capacity and 32 per entry of the quota; the
    largest of these."""
    return int(_kernels.scratch_bytes(num_tiles, capacity, max_quota))

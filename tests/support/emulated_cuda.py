"""The CUDA backend on the CPU: a backend whose operations run in `cuda_emulator`.

The functions and signatures of `reference`, on CPU tensors; call `load` first.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from repository import ROOT
from torch import Tensor

from sparse_optim.backends.operands import ActiveSet, Tiles
from sparse_optim.backends.targets import signed_length

FLAGS = [
    "-std=c++17", "-O1", "-fPIC", "-DSPARSE_OPTIM_EMULATED",
    "-ffp-contract=off", "-fno-strict-aliasing", "-Wall", "-Wextra", "-Werror",
    "-Wno-unused-parameter", "-Wno-unknown-pragmas", "-Wno-unused-but-set-variable",
]  # fmt: skip
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
TILE = 96  # the kernels take any tile up to 4096; small ones keep the cases small
LIBRARY = "emulated_cuda.so"
GUARD = 64  # bytes behind the scratch memory that must stay as they are

_library: ctypes.CDLL | None = None


class Pool(ctypes.Structure):
    """cuda::Pool of csrc/cuda/kernels.h."""

    _fields_ = (
        ("table", ctypes.c_void_p),
        ("tile_offsets", ctypes.c_void_p),
        ("num_tensors", ctypes.c_int64),
        ("num_tiles", ctypes.c_int64),
        ("tile", ctypes.c_int64),
    )


class Active(ctypes.Structure):
    """Active of csrc/core/pool.h."""

    _fields_ = tuple(
        (name, ctypes.c_void_p)
        for name in (
            "position", "exp_avg", "exp_avg_sq", "unmask_step", "master", "grad", "offsets",
            "progress",
        )
    )  # fmt: skip


def build(folder: Path, sources: Path = ROOT / "csrc") -> Path:
    """Compile the kernels under `sources` and the emulator with g++; returns the library."""
    emulator = Path(__file__).with_name("cuda_emulator")
    files = [*sorted((sources / "cuda").glob("*.cu")), emulator / "library.cpp"]
    includes = [f"-I{sources}", f"-I{emulator}"]

    def compile_one(file: Path) -> str:
        target = str(folder / file.with_suffix(".o").name)
        subprocess.run(
            ["g++", *FLAGS, *includes, "-x", "c++", "-c", str(file), "-o", target], check=True
        )
        return target

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile_one, files))
    unfinished = folder / f"{LIBRARY}.unfinished"
    subprocess.run(["g++", "-shared", *objects, "-o", str(unfinished)], check=True)
    return unfinished.rename(folder / LIBRARY)


def load(library: Path) -> None:
    global _library
    _library = ctypes.CDLL(str(library))
    for sizes in (
        _library.scratch_bytes, _library.sampled_grad_scratch_bytes, _library.launches,
        _library.collected_bytes,
    ):  # fmt: skip
        sizes.restype = ctypes.c_int64


def configure(multiprocessors: int, seed: int) -> None:
    """Pretend a device of so many multiprocessors; shuffle threads and blocks by `seed`."""
    assert _library is not None
    _library.configure(ctypes.c_int(multiprocessors), ctypes.c_uint(seed))


def launches() -> int:
    """Kernels launched so far."""
    assert _library is not None
    return int(_library.launches())


def scratch_bytes(num_tiles: int, capacity: int, max_quota: int) -> int:
    assert _library is not None
    sizes = map(ctypes.c_int64, (num_tiles, capacity, max_quota))
    return int(_library.scratch_bytes(*sizes)) + GUARD


def bind(grads: Sequence[Tensor], params: Sequence[Tensor], table: Tensor) -> Tensor:
    rows = [
        [
            grad.data_ptr() if grad.numel() else 0, param.data_ptr(), param.numel(),
            DTYPES[grad.dtype], DTYPES[param.dtype],
        ]
        for grad, param in zip(grads, params, strict=True)
    ]  # fmt: skip
    _write_table(torch.tensor(rows, dtype=torch.int64), table)
    return table


def bind_rows(rows: Tensor, table: Tensor) -> Tensor:
    packed = torch.empty(len(rows), 5, dtype=torch.int64)
    packed[:, :3] = rows[:, :3]
    packed[:, 3], packed[:, 4] = rows[:, 3] >> 8 & 0xFF, rows[:, 3] & 0xFF
    _write_table(packed, table)
    return table


def _write_table(packed: Tensor, table: Tensor) -> None:
    _call("write_table", packed, ctypes.c_int64(len(packed)), table)


def scan(bound, dense_grads, tiles, active, norms, found_inf, scratch) -> None:
    rows = [[grad.data_ptr(), grad.numel(), DTYPES[grad.dtype]] for grad in dense_grads]
    with _Poisoned(scratch):
        _call(
            "scan", _pool(bound, tiles), torch.tensor(rows, dtype=torch.int64),
            ctypes.c_int64(len(rows)), active.position, active.offsets, tiles.max, active.grad,
            norms, found_inf, scratch,
        )  # fmt: skip


def scan_one(grad, param, table, tiles, active, norm, found_inf, arrived, scratch) -> None:
    row = [
        grad.data_ptr(),
        param.data_ptr(),
        param.numel(),
        DTYPES[grad.dtype],
        DTYPES[param.dtype],
    ]
    with _Poisoned(scratch):
        _call(
            "scan_one", torch.tensor(row), table, ctypes.c_int64(tiles.max.numel()),
            ctypes.c_int64(tiles.size), active.position, active.offsets, tiles.max, active.grad,
            norm, found_inf, arrived, scratch,
        )  # fmt: skip


def clip(norms, grad_scale, max_grad_norm, grad_norm, grad_factor) -> None:
    _call(
        "clip", norms, ctypes.c_int64(norms.numel()), grad_scale, ctypes.c_double(max_grad_norm),
        grad_norm, grad_factor,
    )  # fmt: skip


def rank(bound, tiles, active, noise, scratch) -> None:
    _call("rank", _pool(bound, tiles), active.position, active.offsets, noise, tiles.max)


def cut(bound, tiles, active, rule, targets, found_inf, new, scratch) -> None:
    with _Poisoned(scratch):
        _call(
            "cut", _pool(bound, tiles), active.position, active.offsets, tiles.max,
            tiles.param_bound, targets, ctypes.c_int64(signed_length(targets)), active.progress,
            found_inf, ctypes.c_double(rule.exp), ctypes.c_double(rule.eps), rule.noise, new.tensor,
            new.position, new.count, ctypes.c_int64(new.position.numel()), new.threshold, scratch,
        )  # fmt: skip


def collected_bytes(max_quota: int) -> int:
    assert _library is not None
    return int(_library.collected_bytes(ctypes.c_int64(max_quota)))


def collect_begin(active, targets, max_quota, collected) -> None:
    _call(
        "collect_begin", targets, ctypes.c_int64(signed_length(targets)), active.progress,
        ctypes.c_int64(max_quota), collected,
    )  # fmt: skip


def collect(bound, tiles, active, rule, scored, first, max_quota, collected, scratch) -> None:
    with _Poisoned(scratch):
        _call(
            "collect", _pool(bound, tiles), active.position, active.offsets, tiles.max,
            tiles.param_bound, ctypes.c_double(rule.exp), ctypes.c_double(rule.eps),
            ctypes.c_int(scored), ctypes.c_int64(first), ctypes.c_int64(max_quota), collected,
            scratch,
        )  # fmt: skip


def collect_end(found_inf, new, grad, collected, max_quota=None) -> None:
    """`max_quota`: that of the beginning, if there is less room now."""
    room = new.position.numel()
    _call(
        "collect_end", found_inf, new.tensor, new.position, new.count, ctypes.c_int64(room),
        new.threshold, grad, ctypes.c_int64(room if max_quota is None else max_quota), collected,
    )  # fmt: skip


def append(bound, new, active, scratch) -> None:
    with _Poisoned(scratch):
        _call(
            "append", _pool(bound), new.tensor, new.position, new.count,
            ctypes.c_int64(new.position.numel()), _active(active),
            ctypes.c_int64(active.position.numel()), scratch,
        )  # fmt: skip


def update(bound, active, scalars, bias_correction) -> None:
    _call(
        "update", _pool(bound), _active(active), ctypes.c_int64(active.position.numel()),
        scalars.grad_factor, scalars.found_inf, scalars.hyper,
        ctypes.c_int64(scalars.hyper.shape[0]), scalars.group_index,
        ctypes.c_int(bias_correction == "entry"), scalars.arrived,
    )  # fmt: skip


def sampled_grad(input, grad_output, position, transposed, out, scratch_bytes=None) -> None:
    """`scratch_bytes`: in place of what the launcher asks for."""
    assert _library is not None
    outer, inner = (input, grad_output) if transposed else (grad_output, input)
    count = ctypes.c_int64(position.numel())
    if scratch_bytes is None:
        asked = _library.sampled_grad_scratch_bytes(ctypes.c_int64(input.size(0)), count)
        scratch_bytes = int(asked)
    with _Poisoned(torch.empty(scratch_bytes + GUARD, dtype=torch.uint8)) as scratch:
        _call(
            "sampled_grad", _matrix(outer), _matrix(inner), position, count, out, scratch,
            ctypes.c_int64(scratch_bytes),
        )  # fmt: skip


def gather(bound, position, offsets, value) -> None:
    count = ctypes.c_int64(position.numel())
    _call("gather", _pool(bound), position, offsets, count, value)


def exchange(bound, position, offsets, value) -> None:
    count = ctypes.c_int64(position.numel())
    _call("exchange", _pool(bound), position, offsets, count, value)


class _Poisoned:
    """Scratch memory holds garbage before an operation, and its last bytes are not touched."""

    def __init__(self, scratch: Tensor) -> None:
        self._scratch = scratch

    def __enter__(self) -> Tensor:
        return self._scratch.fill_(0xA5)

    def __exit__(self, *exception: object) -> None:
        # By NumPy: a step that runs here must not seem to read the device.
        behind = self._scratch[-GUARD:].numpy()
        assert (behind == 0xA5).all(), "wrote beyond the scratch memory"


def _pointer(tensor: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr() if tensor.numel() else None)


def _pool(table: Tensor, tiles: Tiles | None = None) -> Pool:
    if tiles is None:
        return Pool(table.data_ptr(), None, table.numel() // 4, 0, 1)
    number = tiles.max.numel()
    return Pool(table.data_ptr(), tiles.offsets.data_ptr(), table.numel() // 4, number, tiles.size)


def _matrix(tensor: Tensor) -> Tensor:
    """Matrix of csrc/core/pool.h."""
    pointer = tensor.data_ptr() if tensor.numel() else 0
    return torch.tensor([pointer, *tensor.shape, *tensor.stride(), DTYPES[tensor.dtype]])


def _active(active: ActiveSet) -> Active:
    return Active(*(_pointer(getattr(active, name)) for name, _ in Active._fields_))


def _call(name: str, *arguments: object) -> None:
    passed = [_pointer(item) if isinstance(item, Tensor) else item for item in arguments]
    error = getattr(_library, name)(*passed)
    if error:
        raise RuntimeError(f"{name}: a kernel's threads wait for others that never come")

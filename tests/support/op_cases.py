"""Arguments of the operations, filled at random, for every backend alike."""

from __future__ import annotations

import copy
import itertools
import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from sparse_optim.backends.operands import (
    ActiveSet,
    NewEntries,
    Rule,
    StepScalars,
    Tiles,
    max_quota,
)
from sparse_optim.engine.engine import WorkSpace

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TILE = 512
# Around the tile, the vector width and the block of 128 entries, and the sizes without a tile.
EDGE_SIZES = (0, 1, 127, 128, 129, TILE - 1, TILE, TILE + 1, 3 * TILE + 5)
# Where the buffers of the operators' schemas are, seen from a case.
BUFFERS = {
    "tile_max": "work.tiles.max",
    "tile_offsets": "work.tiles.offsets",
    "param_bound": "work.tiles.param_bound",
    "tile": "tile",
    "position": "active.position",
    "offsets": "active.offsets",
    "progress": "active.progress",
    "active_grad": "active.grad",
    "exp_avg": "active.exp_avg",
    "exp_avg_sq": "active.exp_avg_sq",
    "unmask_step": "active.unmask_step",
    "master": "active.master",
    "new_tensor": "work.new.tensor",
    "new_position": "work.new.position",
    "new_count": "work.new.count",
    "threshold": "work.new.threshold",
    "grad_scale": "work.scalars.grad_scale",
    "found_inf": "work.scalars.found_inf",
    "grad_norm": "work.scalars.grad_norm",
    "grad_factor": "work.scalars.grad_factor",
    "hyper": "work.scalars.hyper",
    "group_index": "work.scalars.group_index",
    "arrived": "work.scalars.arrived",
    "norms": "work.norms",
    "table": "work.table",
    "scratch": "work.scratch",
    "dense_grads": "dense_grads",
    "grads": "grads",
    "params": "params",
    "targets": "targets",
    "exp": "exp",
    "eps": "eps",
    "noise": "noise",
    "bias_correction": "bias_correction",
    "max_grad_norm": "max_grad_norm",
}
EXPS = (-1.0, -0.5, 0.0, 0.5, 1.0, 2.0)


def bits(tensor: Tensor) -> Tensor:
    """The bit patterns of a tensor, so that NaN equals itself and -0.0 differs from 0.0."""
    if not tensor.is_floating_point():
        return tensor
    return (
        tensor.detach()
        .contiguous()
        .view({8: torch.int64, 4: torch.int32, 2: torch.int16}[tensor.itemsize])
    )


def assert_same_bits(got: Tensor, expected: Tensor, what: str = "") -> None:
    assert got.shape == expected.shape, what
    assert got.dtype == expected.dtype, what
    torch.testing.assert_close(
        bits(got), bits(expected), rtol=0, atol=0, msg=lambda m: f"{what}: {m}"
    )


def assert_as_exact(
    got: Tensor, same_dtype: Tensor, exact: Tensor, what: str = "", scale: float = 0.0
) -> None:
    """The tolerance rule: error against float64 at most twice that of torch in the same dtype.

    Where torch happens to be (nearly) exact, two units in the last place are allowed: of the value,
    or of `scale` where it is what is left of larger terms.
    """
    exact, limits = exact.double(), torch.finfo(same_dtype.dtype)
    error = (got.double() - exact).abs()
    if not error.numel():
        assert got.shape == exact.shape, what
        return
    twice = 2 * (same_dtype.double() - exact).abs().max()
    units = 2 * limits.eps * exact.abs().clamp(min=scale) + 2 * limits.smallest_normal * limits.eps
    assert (error <= torch.maximum(twice, units)).all(), (
        f"{what}: error {float(error.max())}, allowed {float(twice)}"
    )


def unaligned(tensor: Tensor) -> Tensor:
    """The same values as a view that begins one element into its storage."""
    storage = torch.full((tensor.numel() + 1,), math.nan, dtype=tensor.dtype)
    storage[1:] = tensor.reshape(-1)
    return storage[1:].view(tensor.shape)


def random_values(size: int, dtype: torch.dtype, kind: str, generator: torch.Generator) -> Tensor:
    """Values of a kind: "normal", "ties" (five values), "equal", "zeros" or "rows" (scales)."""
    values = torch.randn(size, generator=generator)
    if kind == "ties":
        values = (values * 2).round().clamp(-2, 2) / 4
    elif kind == "equal":
        values = torch.full((size,), -0.25)
    elif kind == "zeros":
        values = torch.zeros(size)
    elif kind == "rows":  # per-row scales: a few rows hold nearly every great value
        rows = torch.arange(size) // 48
        values *= torch.exp(3 * torch.randn(size // 48 + 1, generator=generator))[rows]
    return values.to(dtype)


def map_tensors(owner: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """A copy of a dataclass of buffers, nested or not, each of them replaced."""
    if isinstance(owner, Tensor):
        return function(owner)
    if not is_dataclass(owner):
        return owner
    values = {item.name: getattr(owner, item.name) for item in fields(owner)}
    return replace(owner, **{name: map_tensors(value, function) for name, value in values.items()})


def work_space(
    params: Sequence[Tensor],
    num_dense: int,
    rows: Sequence[int],
    num_groups: int,
    quota: int,
    tile: int,
    bounded: bool,
    scratch_bytes: int = 0,
) -> WorkSpace:
    """On the CPU, with tiles of any size."""
    cpu = torch.device("cpu")
    return WorkSpace(
        table=torch.zeros(len(params), 4, dtype=torch.int64),
        tiles=Tiles.empty(params, tile, bounded, cpu),
        new=NewEntries.empty(quota, cpu),
        scalars=StepScalars.empty(rows, num_groups, cpu),
        norms=torch.zeros(len(params) + num_dense, dtype=torch.float64),
        scratch=torch.zeros(scratch_bytes, dtype=torch.uint8),
    )


@dataclass
class Case:
    """One optimizer step in the arguments of the operations."""

    grads: list[Tensor]
    params: list[Tensor]
    dense_grads: list[Tensor]
    active: ActiveSet
    work: WorkSpace
    targets: Tensor
    exp: float = 0.0
    eps: float = 1.0
    tile: int = TILE
    bias_correction: str = "entry"
    max_grad_norm: float = math.inf
    noise: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))

    def copy(self) -> Case:
        return copy.deepcopy(self)

    def bound(self, ops: ModuleType) -> Any:
        return ops.bind(self.grads, self.params, self.work.table)

    def scan_args(self, ops: ModuleType) -> tuple[Any, ...]:
        work = self.work
        return (
            self.bound(ops), self.dense_grads, work.tiles, self.active, work.norms,
            work.scalars.found_inf, work.scratch,
        )  # fmt: skip

    def clip_args(self, ops: ModuleType) -> tuple[Any, ...]:
        work, scalars = self.work, self.work.scalars
        return (
            work.norms, scalars.grad_scale, self.max_grad_norm, scalars.grad_norm,
            scalars.grad_factor,
        )  # fmt: skip

    def rank_args(self, ops: ModuleType) -> tuple[Any, ...]:
        return self.bound(ops), self.work.tiles, self.active, self.noise, self.work.scratch

    def cut_args(self, ops: ModuleType) -> tuple[Any, ...]:
        work = self.work
        return (
            self.bound(ops), work.tiles, self.active, Rule(self.exp, self.eps, self.noise),
            self.targets, work.scalars.found_inf, work.new, work.scratch,
        )  # fmt: skip

    def append_args(self, ops: ModuleType) -> tuple[Any, ...]:
        return self.bound(ops), self.work.new, self.active, self.work.scratch

    def update_args(self, ops: ModuleType) -> tuple[Any, ...]:
        return self.bound(ops), self.active, self.work.scalars, self.bias_correction

    def buffer(self, name: str) -> Tensor:
        """A buffer by its name in the schema of the operators."""
        return operator.attrgetter(BUFFERS[name])(self)

    def step(self, ops: ModuleType, until: str = "update") -> Case:
        """Run the operations of a step, up to and including one of them."""
        for name in ("scan", "clip", "cut", "append", "update"):
            getattr(ops, name)(*getattr(self, f"{name}_args")(ops))
            if name == until:
                break
        return self

    def new_entries(self) -> list[tuple[int, int]]:
        """(tensor, position) of what `cut` found, in its order."""
        count = int(self.work.new.count)
        pairs = zip(self.work.new.tensor[:count], self.work.new.position[:count], strict=True)
        return [(int(tensor), int(position)) for tensor, position in pairs]


def make_case(
    sizes: Sequence[int],
    *,
    dtypes: Sequence[torch.dtype] = (torch.float32,),
    grad_dtypes: Sequence[torch.dtype] | None = None,
    kind: str = "normal",
    quota: int = 10,
    num_active: int = 0,
    dense_sizes: Sequence[int] = (),
    missing: Sequence[int] = (),
    seed: int = 0,
    step: int = 7,
    exp: float = 0.0,
    eps: float = 1.0,
    tile: int = TILE,
    offset_views: bool = False,
    bias_correction: str = "entry",
    max_grad_norm: float = math.inf,
) -> Case:
    """A step of a pool of 1-D tensors; dtypes are dealt out in turn.

    `num_active` entries at random positions are active already, with plausible moments; `step`
    steps have been applied, and the schedule asks for `quota` entries more.
    """
    generator = torch.Generator().manual_seed(seed)
    grad_dtypes = grad_dtypes or dtypes
    params, grads = [], []
    for index, size in enumerate(sizes):
        param = torch.randn(size, generator=generator).to(dtypes[index % len(dtypes)])
        grad = random_values(size, grad_dtypes[index % len(grad_dtypes)], kind, generator)
        params.append(param)
        grads.append(grad.new_empty(0) if index in missing else grad)
    dense = [random_values(size, dtypes[0], kind, generator) for size in dense_sizes]
    if offset_views:
        grads, dense = [[unaligned(grad) for grad in some] for some in (grads, dense)]

    total = sum(sizes)
    num_active = min(num_active, total)
    target = min(num_active + quota, total)
    targets = torch.tensor([0] * (step + 1) + [target], dtype=torch.int64)
    capacity, most = target, max(target - num_active, 0)
    active = ActiveSet.empty(params, capacity, torch.device("cpu"))
    chosen = torch.randperm(total, generator=generator)[:num_active].sort().values
    starts = torch.tensor([0, *sizes]).cumsum(0)
    segments = []
    for first, last in itertools.pairwise(starts):
        position = chosen[(chosen >= first) & (chosen < last)] - first
        segments.append({
            "position": position,
            "exp_avg": 0.1 * torch.randn(position.numel(), generator=generator),
            "exp_avg_sq": 0.1 * torch.rand(position.numel(), generator=generator),
            "unmask_step": torch.randint(1, step + 2, position.shape, generator=generator),
        })  # fmt: skip
    for segment, param in zip(segments, params, strict=True):
        noise = 1 + 1e-4 * torch.randn(segment["position"].numel(), generator=generator)
        segment["master"] = param[segment["position"]].float()
        if active.master.numel():  # between two values of the parameter's dtype
            segment["master"] *= noise
    active.fill(segments, torch.tensor([step, num_active, 0]))
    rows = [index % 2 for index in range(len(sizes))]
    quota_room = min(most, max_quota(targets, capacity))
    work = work_space(params, len(dense), rows, 2, quota_room, tile, exp < 0)
    work.scalars.hyper.copy_(
        torch.tensor([[1e-2, 0.9, 0.999, 1e-8, 0.1, 1.0], [3e-3, 0.8, 0.95, 1e-6, 0.0, -1.0]])
    )
    case = Case(
        grads, params, dense, active, work, targets, exp, eps, tile, bias_correction, max_grad_norm
    )
    fill_bounds(case)
    return case


def fill_bounds(case: Case) -> None:
    """Largest |param| of each tile, which exp < 0 needs; by hand."""
    if case.work.tiles.param_bound.numel():
        bounds = [
            part.float().abs().max() for param in case.params for part in param.split(case.tile)
            if part.numel()
        ]  # fmt: skip
        case.work.tiles.param_bound.copy_(torch.stack(bounds))

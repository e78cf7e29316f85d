"""Random cases for the emulated CUDA kernels, and what must equal the reference in them."""

from __future__ import annotations

import math

import emulated_cuda
import op_cases
import torch
from op_cases import map_tensors, work_space

from sparse_optim.backends import reference, scoring
from sparse_optim.backends.operands import ActiveSet, Rule

TILE = emulated_cuda.TILE
FLOAT = torch.float32


class Case:
    """Tensors of the pool and all buffers, with some entries active; one for each backend."""

    def __init__(
        self, sizes, *, seed=0, grad_dtypes=(FLOAT,), param_dtypes=(FLOAT,), shift=0, missing=(),
        active=0.05, quota=20, max_quota=None, levels=None, tile=TILE, exp=0.0, spread=2.0,
        noise=(),
    ):  # fmt: skip
        self.generator = torch.Generator().manual_seed(seed)
        self.tile, self.exp = tile, exp
        self.noise = torch.tensor(noise, dtype=torch.int64)
        self.params, self.grads, masks = [], [], []
        for i, size in enumerate(sizes):
            scale = 10.0 ** (spread * (torch.rand((), generator=self.generator) - 1))
            param, grad = self._normal(size), self._normal(size) * scale
            if levels is not None:
                grad = (grad.sign() * torch.randint(0, levels + 1, (size,))).float()
            grad = grad.to(grad_dtypes[i % len(grad_dtypes)])
            if shift:
                padded = torch.empty(size + shift, dtype=grad.dtype)
                padded[shift:] = grad
                grad = padded[shift:]
            self.params.append(param.to(param_dtypes[i % len(param_dtypes)]))
            self.grads.append(grad.new_empty(0) if i in missing else grad)
            masks.append(torch.rand(size, generator=self.generator) < active)
        self.max_quota = quota if max_quota is None else max_quota
        self.num_active = int(sum(mask.sum() for mask in masks))
        self.capacity = self.num_active + self.max_quota
        self._allocate(masks, quota)

    def _normal(self, size):
        return torch.randn(size, generator=self.generator)

    def _allocate(self, masks, quota):
        num_tiles = sum(-(-param.numel() // self.tile) for param in self.params)
        groups = [i % 2 for i in range(len(self.params))]
        device = torch.device("cpu")
        self.active = ActiveSet.empty(self.params, self.capacity, device)
        scratch = emulated_cuda.scratch_bytes(num_tiles, self.capacity, self.max_quota)
        self.work = work_space(
            self.params, 0, groups, 2, self.max_quota, self.tile, self.exp < 0, scratch
        )
        step = 7
        segments = []
        for mask, param in zip(masks, self.params, strict=True):
            position = mask.nonzero().squeeze(1)
            count = position.numel()
            segments.append(
                {
                    "position": position.int(),
                    "exp_avg": self._normal(count),
                    "exp_avg_sq": self._normal(count).square(),
                    "unmask_step": torch.randint(
                        1, step + 1, (count,), generator=self.generator, dtype=torch.int32
                    ),
                    "master": param[position].float(),
                }
            )
        self.active.fill(segments, torch.tensor([step, self.num_active, 3]))
        self.targets = torch.arange(step + 4) * 0 + self.num_active + quota
        self.work.scalars.hyper.copy_(
            torch.tensor([[1e-2, 0.9, 0.999, 1e-8, 0.1, 1.0], [3e-3, 0.5, 0.99, 1e-6, 0.0, -1.0]])
        )
        if self.exp < 0:
            bounds = [scoring.tile_abs_max(param, self.tile) for param in self.params]
            self.work.tiles.param_bound.copy_(torch.cat(bounds))
        for name in ("active_grad", "grad_norm", "grad_factor"):
            self.buffer(name).fill_(math.nan)
        self.work.tiles.max.fill_(-1)

    def copy(self):
        """The same case in memory of its own (gradients are read only, and shared)."""
        other = object.__new__(Case)
        other.__dict__.update(self.__dict__)
        other.params = [param.clone() for param in self.params]
        other.active = map_tensors(self.active, torch.clone)
        other.work = map_tensors(self.work, torch.clone)
        return other

    buffer = op_cases.Case.buffer

    def bind(self, ops):
        self.bound = ops.bind(self.grads, self.params, self.work.table)

    def scan(self, ops, dense=(), max_grad_norm=math.inf):
        """And `clip`."""
        work, scalars = self.work, self.work.scalars
        work.norms = torch.full((len(self.grads) + len(dense),), math.nan, dtype=torch.float64)
        ops.scan(
            self.bound, list(dense), work.tiles, self.active, work.norms, scalars.found_inf,
            work.scratch,
        )  # fmt: skip
        ops.clip(
            work.norms, scalars.grad_scale, max_grad_norm, scalars.grad_norm, scalars.grad_factor
        )

    def rank(self, ops):
        ops.rank(self.bound, self.work.tiles, self.active, self.noise, self.work.scratch)

    def cut(self, ops):
        work = self.work
        ops.cut(
            self.bound, work.tiles, self.active, Rule(self.exp, 1e-3, self.noise), self.targets,
            work.scalars.found_inf, work.new, work.scratch,
        )  # fmt: skip

    def append(self, ops):
        ops.append(self.bound, self.work.new, self.active, self.work.scratch)

    def update(self, ops, bias_correction="entry"):
        ops.update(self.bound, self.active, self.work.scalars, bias_correction)


def run_both(case, *steps, **options):
    """The case after these operations by the reference, and by the emulated kernels."""
    results = []
    for ops in (reference, emulated_cuda):
        own = case.copy()
        own.bind(ops)
        for name in steps:
            getattr(own, name)(ops, **options.get(name, {}))
        results.append(own)
    return results


def check_exact(expected, actual, *names):
    for name in names:
        want, got = expected.buffer(name), actual.buffer(name)
        assert torch.equal(want.nan_to_num(nan=-7.0), got.nan_to_num(nan=-7.0)), name


def check_cut(expected, actual):
    count = int(expected.work.new.count)
    assert int(actual.work.new.count) == count
    assert torch.equal(actual.work.new.tensor[:count], expected.work.new.tensor[:count])
    assert torch.equal(actual.work.new.position[:count], expected.work.new.position[:count])
    assert actual.work.new.threshold == expected.work.new.threshold


def check_scan(expected, actual, rtol=1e-6):
    check_exact(expected, actual, "tile_max", "active_grad", "found_inf")
    for name in ("norms", "grad_norm", "grad_factor"):
        want, got = expected.buffer(name), actual.buffer(name)
        torch.testing.assert_close(got, want, rtol=rtol, atol=0, equal_nan=True, msg=name)


def check_state(expected, actual):
    check_exact(expected, actual, "position", "unmask_step", "offsets", "progress")
    total = int(expected.active.progress[1])
    for name in ("exp_avg", "exp_avg_sq", "master"):
        want, got = expected.buffer(name), actual.buffer(name)
        # A handful of float32 roundings, relative to the terms that are added up.
        torch.testing.assert_close(got[:total], want[:total], rtol=2e-6, atol=1e-7, msg=name)
    for want, got in zip(expected.params, actual.params, strict=True):
        unit = torch.finfo(want.dtype).eps  # a rounding to the parameter's dtype may flip
        torch.testing.assert_close(got, want, rtol=2 * unit, atol=1e-7)

"""Random cases for the emulated CUDA kernels, and what must equal the reference in them."""

from __future__ import annotations

import math

import emulated_cuda
import torch

from sparse_optim.backends import reference, scoring
from sparse_optim.backends.operands import ActiveSet, WorkSpace

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
        self.state = ActiveSet.empty(self.params, self.capacity, device)
        self.work = WorkSpace.empty(
            self.params, 0, groups, 2, self.capacity, self.max_quota, self.tile, self.exp < 0,
            emulated_cuda.scratch_bytes(num_tiles, self.capacity, self.max_quota), device,
        )  # fmt: skip
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
        self.state.fill(segments, torch.tensor([step, self.num_active, 3]))
        self.targets = torch.arange(step + 4) * 0 + self.num_active + quota
        self.work.hyper.copy_(
            torch.tensor([[1e-2, 0.9, 0.999, 1e-8, 0.1, 1.0], [3e-3, 0.5, 0.99, 1e-6, 0.0, -1.0]])
        )
        if self.exp < 0:
            bounds = [scoring.tile_abs_max(param, self.tile) for param in self.params]
            self.work.param_bound.copy_(torch.cat(bounds))
        for name in ("active_grad", "grad_norm", "grad_factor"):
            getattr(self.work, name).fill_(math.nan)
        self.work.tile_max.fill_(-1)

    def copy(self):
        """The same case in memory of its own (gradients are read only, and shared)."""
        other = object.__new__(Case)
        other.__dict__.update(self.__dict__)
        other.params = [param.clone() for param in self.params]
        for name in ("state", "work"):
            owner = getattr(self, name)
            clones = {key: value.clone() for key, value in vars(owner).items()}
            setattr(other, name, type(owner)(**clones))
        return other

    def bind(self, ops):
        self.bound = ops.bind(self.grads, self.params, self.work.table)

    def scan(self, ops, dense=(), max_grad_norm=math.inf):
        """And `clip`."""
        state, work = self.state, self.work
        work.norms = torch.full((len(self.grads) + len(dense),), math.nan, dtype=torch.float64)
        ops.scan(
            self.bound, list(dense), state.position, state.offsets, work.tile_offsets, self.tile,
            work.tile_max, work.active_grad, work.norms, work.found_inf, work.scratch,
        )  # fmt: skip
        ops.clip(work.norms, work.grad_scale, max_grad_norm, work.grad_norm, work.grad_factor)

    def rank(self, ops):
        state, work = self.state, self.work
        ops.rank(
            self.bound, state.position, state.offsets, work.tile_offsets, self.noise, self.tile,
            work.tile_max, work.scratch,
        )  # fmt: skip

    def cut(self, ops):
        state, work = self.state, self.work
        ops.cut(
            self.bound, state.position, state.offsets, work.tile_offsets, work.tile_max,
            work.param_bound, self.targets, state.progress, work.found_inf, self.exp, 1e-3,
            self.noise, self.tile, work.new_tensor, work.new_position, work.new_count,
            work.threshold, work.scratch,
        )  # fmt: skip

    def append(self, ops):
        state, work = self.state, self.work
        ops.append(
            self.bound, work.new_tensor, work.new_position, work.new_count, state.position,
            state.exp_avg, state.exp_avg_sq, state.unmask_step, state.master, work.active_grad,
            state.offsets, state.progress, work.scratch,
        )  # fmt: skip

    def update(self, ops, bias_correction="entry"):
        state, work = self.state, self.work
        ops.update(
            self.bound, state.position, state.offsets, work.active_grad, work.grad_factor,
            work.found_inf, work.hyper, work.group_index, bias_correction, state.exp_avg,
            state.exp_avg_sq, state.unmask_step, state.master, state.progress,
        )  # fmt: skip


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


def check_exact(expected, actual, owner, *names):
    for name in names:
        want, got = getattr(getattr(expected, owner), name), getattr(getattr(actual, owner), name)
        assert torch.equal(want.nan_to_num(nan=-7.0), got.nan_to_num(nan=-7.0)), name


def check_cut(expected, actual):
    count = int(expected.work.new_count)
    assert int(actual.work.new_count) == count
    assert torch.equal(actual.work.new_tensor[:count], expected.work.new_tensor[:count])
    assert torch.equal(actual.work.new_position[:count], expected.work.new_position[:count])
    assert actual.work.threshold == expected.work.threshold


def check_scan(expected, actual, rtol=1e-6):
    check_exact(expected, actual, "work", "tile_max", "active_grad", "found_inf")
    for name in ("norms", "grad_norm", "grad_factor"):
        want, got = getattr(expected.work, name), getattr(actual.work, name)
        torch.testing.assert_close(got, want, rtol=rtol, atol=0, equal_nan=True, msg=name)


def check_state(expected, actual):
    check_exact(expected, actual, "state", "position", "unmask_step", "offsets", "progress")
    total = int(expected.state.progress[1])
    for name in ("exp_avg", "exp_avg_sq", "master"):
        want, got = getattr(expected.state, name), getattr(actual.state, name)
        # A handful of float32 roundings, relative to the terms that are added up.
        torch.testing.assert_close(got[:total], want[:total], rtol=2e-6, atol=1e-7, msg=name)
    for want, got in zip(expected.params, actual.params, strict=True):
        unit = torch.finfo(want.dtype).eps  # a rounding to the parameter's dtype may flip
        torch.testing.assert_close(got, want, rtol=2 * unit, atol=1e-7)

"""One step of any backend on any device, compared with the reference on the CPU."""

from __future__ import annotations

import copy
from types import ModuleType

import torch
from op_cases import Case, assert_as_exact, assert_same_bits, map_tensors
from torch import Tensor

from sparse_optim.backends import reference

EXACT_ACTIVE = ("position", "unmask_step", "offsets", "progress")
FLOAT_ACTIVE = ("exp_avg", "exp_avg_sq", "master")
EXACT_WORK = ("tile_max", "new_count", "threshold", "found_inf")
GUARD = 64  # bytes behind the scratch memory that must stay as they are
GARBAGE = 0xA5


def moved(tensor: Tensor, device: str | torch.device) -> Tensor:
    """A copy on a device that begins as far into its storage as before: unaligned stays so."""
    first = tensor.storage_offset()
    storage = torch.empty(first + tensor.numel(), dtype=tensor.dtype, device=device)
    storage[first:] = tensor.detach().reshape(-1).to(device)
    return storage[first:].view(tensor.shape)


def case_on(case: Case, device: str | torch.device, ops: ModuleType = reference) -> Case:
    """A copy of the case in the memory of a device, with garbage in the scratch that `ops` wants"""
    own = copy.copy(case)
    for name in ("params", "grads", "dense_grads"):
        setattr(own, name, [moved(tensor, device) for tensor in getattr(case, name)])
    for name in ("active", "work"):
        setattr(own, name, map_tensors(getattr(case, name), lambda buffer: moved(buffer, device)))
    own.targets, own.noise = case.targets.to(device), case.noise.to(device)
    work = own.work
    size = ops.scratch_bytes(
        work.tiles.max.numel(), own.active.position.numel(), work.new.tensor.numel()
    )
    work.scratch = torch.full((size + GUARD,), GARBAGE, dtype=torch.uint8, device=device)
    return own


def in_float64(case: Case) -> Case:
    """The update of a case as float64 computes it: the reference code on float64 tensors."""
    twin = case.copy()
    for name in FLOAT_ACTIVE:
        setattr(twin.active, name, twin.buffer(name).double())
    if not twin.active.master.numel():
        twin.params = [param.double() for param in twin.params]
    twin.active.grad = twin.active.grad.double()
    reference.update(*twin.update_args(reference))
    return twin


def fading(case: Case, beta1: float) -> Case:
    """The case with moments of gradients that were 10^8 times larger than those of this step."""
    case.work.scalars.hyper[:, 1] = beta1
    case.active.exp_avg *= 1e4
    case.grads = [grad * 1e-4 for grad in case.grads]
    return case


SMALL_BETAS = (0.0, 0.3, 0.5, 0.6)  # torch.lerp adds from the other end above 0.5


def assert_same_step(
    case: Case, ops: ModuleType, device: str | torch.device = "cpu", lanes: int = 8
) -> Case:
    """Run one step by the reference and by `ops` on a device, and compare everything.

    Args:
        case: on the CPU.
        lanes: chains in which `ops` at least adds the squares of a tile: the narrowest CPU vectors
            have two of four, a warp has 32.

    Returns:
        What `ops` left, on the CPU.
    """
    plain, fast = case.copy(), case_on(case, device, ops)
    for name in ("scan", "clip", "cut", "append"):
        getattr(reference, name)(*getattr(plain, f"{name}_args")(reference))
        getattr(ops, name)(*getattr(fast, f"{name}_args")(ops))
    got = case_on(fast, "cpu")
    assert_same_selection(got, plain)
    for name in (*EXACT_ACTIVE, *FLOAT_ACTIVE):
        assert_same_bits(got.buffer(name), plain.buffer(name), name)
    rtol = (case.tile / lanes + 8) * 2**-24
    for name in ("norms", "grad_norm", "grad_factor"):
        ours, others = got.buffer(name), plain.buffer(name)
        torch.testing.assert_close(ours, others, rtol=rtol, atol=0)

    plain.work.scalars.grad_factor.copy_(got.work.scalars.grad_factor)
    exact = in_float64(plain)
    reference.update(*plain.update_args(reference))
    ops.update(*fast.update_args(ops))
    assert (fast.work.scratch[-GUARD:] == GARBAGE).all(), "wrote beyond the scratch memory"
    got = case_on(fast, "cpu")
    assert_same_state(got, plain, exact)
    assert_params_follow(got, exact, plain, case)
    for after, untouched in zip(got.grads, case.grads, strict=True):
        assert_same_bits(after, untouched, "gradients are never written")
    return got


def assert_same_sample(case: Case, ops: ModuleType, device: str | torch.device = "cpu") -> Case:
    """`rank` and the `cut` after it, by the reference and by `ops` on a device; what `ops` left."""
    plain, fast = case.copy(), case_on(case, device, ops)
    for name in ("rank", "cut"):
        getattr(reference, name)(*getattr(plain, f"{name}_args")(reference))
        getattr(ops, name)(*getattr(fast, f"{name}_args")(ops))
    assert (fast.work.scratch[-GUARD:] == GARBAGE).all(), "wrote beyond the scratch memory"
    got = case_on(fast, "cpu")
    assert_same_selection(got, plain)
    return got


def assert_same_selection(got: Case, plain: Case) -> None:
    """Tile maxima, new entries, threshold and gradients of active entries, bit for bit."""
    for name in EXACT_WORK:
        assert_same_bits(got.buffer(name), plain.buffer(name), name)
    count = int(plain.work.new.count)
    for name in ("new_tensor", "new_position"):
        assert_same_bits(got.buffer(name)[:count], plain.buffer(name)[:count], name)
    total = int(plain.active.progress[1])
    assert_same_bits(got.active.grad[:total], plain.active.grad[:total], "active_grad")


def assert_same_state(got: Case, plain: Case, exact: Case) -> None:
    """The active set after `update`: integers exactly, moments and master by the tolerance rule."""
    for name in EXACT_ACTIVE:
        assert_same_bits(got.buffer(name), plain.buffer(name), name)
    total = int(plain.active.progress[1])
    for name in FLOAT_ACTIVE:
        assert_as_exact(
            got.buffer(name)[:total], plain.buffer(name)[:total],
            exact.buffer(name)[:total], name,
        )  # fmt: skip


def assert_params_follow(got: Case, exact: Case, plain: Case, before: Case) -> None:
    """Parameters: the rounded master, or as exact as torch; frozen entries keep their bits."""
    skipped = bool(got.work.scalars.found_inf)
    for index, param in enumerate(got.params):
        first, last = got.active.offsets[index : index + 2].tolist()
        position = got.active.position[first:last].long()
        if skipped or got.grads[index].numel() == 0:
            position = position[:0]
        elif got.active.master.numel():
            assert_same_bits(param[position], got.active.master[first:last].to(param.dtype))
        else:
            assert_as_exact(
                param[position], plain.params[index][position], exact.params[index][position]
            )
        frozen = torch.ones(param.numel(), dtype=torch.bool)
        frozen[position] = False
        assert_same_bits(param[frozen], before.params[index][frozen], "frozen entries")

"""update: one AdamW step on the active entries alone.

    grad       <- sign * grad_factor * active_grad
    exp_avg    <- beta1 * exp_avg + (1 - beta1) * grad    (as torch.lerp)
    exp_avg_sq <- beta2 * exp_avg_sq + (1 - beta2) * grad^2
    param      <- (1 - lr * weight_decay) * param
                  - lr / bias_correction1 * exp_avg
                    / (sqrt(exp_avg_sq) / sqrt(bias_correction2) + eps)
    bias_correctionN = 1 - betaN^age

Bytes: 28 per active entry streamed (8 more with master values), and a 32-byte sector of the
parameter each way per entry. Equal to the reference up to float32 rounding; entries that are not
active, and parameters without a gradient, keep their bits.

B = 3.5e6 active entries with master values: 350 MB. Predicted: bytes / bandwidth = 0.18 ms on A100
(2.0 TB/s), 0.46 ms on A6000 (0.768), 0.10 ms on H100 (3.35), 73 us on H200 (4.8).
Not run on a GPU yet: compiled ahead of time and interpreted.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparse_optim.backends.operands import ActiveSet, StepScalars

from .device_functions import (
    COLUMNS,
    GRAD,
    PARAM,
    load_entries,
    lower_bound,
    param_dtype,
    store_entries,
)
from .launch import blocks_of

# The gathers want many requests in flight: small programs, two entries a thread. Unmeasured.
UPDATE_BLOCK = 256
UPDATE_WARPS = 4

LR = tl.constexpr(0)
BETA1 = tl.constexpr(1)
BETA2 = tl.constexpr(2)
EPS = tl.constexpr(3)
WEIGHT_DECAY = tl.constexpr(4)
SIGN = tl.constexpr(5)
NUM_HYPER = tl.constexpr(6)


@triton.jit
def bias_correction_of(beta, age, oldest):
    """1 - beta^age for a block; beta and the result float64, where the difference is exact enough.

    By repeated squaring: on GPUs for graphics float64 runs at 1/64 of the speed, and `pow` takes
    some hundred operations; this takes two for each bit of `oldest`, a scalar >= age.
    """
    power = tl.full(beta.shape, 1.0, tl.float64)
    while oldest > 0:
        power = tl.where((age & 1) == 1, power * beta, power)
        beta = beta * beta
        age = age >> 1
        oldest = oldest >> 1
    return 1.0 - power


@triton.jit(do_not_specialize=["num_tensors"])
def update_kernel(
    table_ptr,
    position_ptr,
    offsets_ptr,
    active_grad_ptr,
    grad_factor_ptr,
    found_inf_ptr,
    hyper_ptr,
    group_index_ptr,
    exp_avg_ptr,
    exp_avg_sq_ptr,
    unmask_step_ptr,
    master_ptr,
    progress_ptr,
    num_tensors,
    ENTRY_AGE: tl.constexpr,
    HAS_MASTER: tl.constexpr,
    BLOCK: tl.constexpr,
):
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    num_active = tl.load(offsets_ptr + num_tensors)
    if (tl.load(found_inf_ptr) != 0.0) | (tl.program_id(0).to(tl.int64) * BLOCK >= num_active):
        return
    in_bounds = offs < num_active
    first_tensor = tl.zeros((BLOCK,), tl.int32)
    behind = lower_bound(
        offsets_ptr, first_tensor, first_tensor + num_tensors + 1, num_tensors + 1, offs + 1
    )
    tensor = tl.where(in_bounds, behind - 1, 0)
    in_bounds &= tl.load(table_ptr + tensor * COLUMNS + GRAD) != 0
    address = tl.load(table_ptr + tensor * COLUMNS + PARAM)
    dtype = param_dtype(table_ptr, tensor)
    position = tl.load(position_ptr + offs, mask=in_bounds, other=0)

    row_ptr = hyper_ptr + tl.load(group_index_ptr + tensor) * NUM_HYPER
    lr, beta1, beta2 = tl.load(row_ptr + LR), tl.load(row_ptr + BETA1), tl.load(row_ptr + BETA2)
    step = (tl.load(progress_ptr) + 1).to(tl.int32)
    age = step
    if ENTRY_AGE:
        age += 1 - tl.load(unmask_step_ptr + offs, mask=in_bounds, other=1)
    bias_correction1 = bias_correction_of(beta1, age, step).to(tl.float32)
    bias_correction2 = bias_correction_of(beta2, age, step).to(tl.float32)
    step_size = tl.div_rn(lr.to(tl.float32), bias_correction1)

    grad = tl.load(active_grad_ptr + offs, mask=in_bounds, other=0.0)
    grad *= tl.load(grad_factor_ptr) * tl.load(row_ptr + SIGN).to(tl.float32)
    exp_avg = tl.load(exp_avg_ptr + offs, mask=in_bounds, other=0.0)
    exp_avg_sq = tl.load(exp_avg_sq_ptr + offs, mask=in_bounds, other=0.0)
    if HAS_MASTER:
        value = tl.load(master_ptr + offs, mask=in_bounds, other=0.0)
    else:
        value = load_entries(address, dtype, position, in_bounds)

    # As torch.lerp: from the nearer end. From exp_avg alone, a gradient that is far smaller than it
    # would be lost where beta1 is small.
    keep1, gap = (1.0 - beta1).to(tl.float32), grad - exp_avg
    exp_avg = tl.where(keep1 < 0.5, exp_avg + keep1 * gap, grad - (1.0 - keep1) * gap)
    exp_avg_sq = beta2.to(tl.float32) * exp_avg_sq + (1.0 - beta2).to(tl.float32) * (grad * grad)
    denominator = tl.div_rn(tl.sqrt_rn(exp_avg_sq), tl.sqrt_rn(bias_correction2))
    denominator += tl.load(row_ptr + EPS).to(tl.float32)
    decay = (1.0 - lr * tl.load(row_ptr + WEIGHT_DECAY)).to(tl.float32)
    value = decay * value - step_size * tl.div_rn(exp_avg, denominator)

    tl.store(exp_avg_ptr + offs, exp_avg, mask=in_bounds)
    tl.store(exp_avg_sq_ptr + offs, exp_avg_sq, mask=in_bounds)
    if HAS_MASTER:
        tl.store(master_ptr + offs, value, mask=in_bounds)
    store_entries(address, dtype, position, value, in_bounds)


@triton.jit
def count_step_kernel(found_inf_ptr, progress_ptr):
    """Count one more applied or skipped step. A separate kernel: all programs read the step."""
    counter_ptr = progress_ptr + tl.where(tl.load(found_inf_ptr) != 0.0, 2, 0)
    tl.store(counter_ptr, tl.load(counter_ptr) + 1)


def update(bound: Tensor, active: ActiveSet, scalars: StepScalars, bias_correction: str) -> None:
    """See `reference.update`."""
    has_master = active.master.numel() > 0
    with torch.cuda.device_of(bound):
        if programs := blocks_of(active.position.numel(), UPDATE_BLOCK):
            update_kernel[(programs,)](
                bound, active.position, active.offsets, active.grad, scalars.grad_factor,
                scalars.found_inf, scalars.hyper, scalars.group_index, active.exp_avg,
                active.exp_avg_sq, active.unmask_step,
                active.master if has_master else active.exp_avg, active.progress,
                active.offsets.numel() - 1, ENTRY_AGE=bias_correction == "entry",
                HAS_MASTER=has_master, BLOCK=UPDATE_BLOCK, num_warps=UPDATE_WARPS,
            )  # fmt: skip
        count_step_kernel[(1,)](scalars.found_inf, active.progress, num_warps=1)

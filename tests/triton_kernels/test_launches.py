"""How many kernels a step launches: each costs the host some microseconds, whatever it does.

Counted by names, without a GPU (triton_launches.py). A device operation of torch that is not a
kernel of ours (a fill, a copy) is not counted.
"""

from __future__ import annotations

import pytest
import torch
from gpu_tools import require

require("triton")

from triton_launches import noted  # noqa: E402

from sparse_optim import D3, Increment, MaskedAdamW  # noqa: E402
from sparse_optim.engine import fused_backward  # noqa: E402

SCAN = ["locate_kernel", "scan_kernel", "norms_kernel"]
COLLECT = ["locate_and_count_kernel", "collect_kernel", "settle_kernel"]
# Unless exp = 0, or where tiles are few for the quota, tiles that reach the floor are opened first.
COLLECT_BY_GROUPS = ["locate_kernel", "group_maxima_kernel", *COLLECT[1:]]
CUT = [
    "begin_kernel", "bound_histogram_kernel", "list_kernel", "list_kernel", "digit_kernel",
    "digit_kernel", "digit_kernel", "count_kernel", "write_kernel",
]  # fmt: skip
# Unless exp = 0, exact maxima of the tiles that bounds let through make a second list.
CUT_BY_BOUNDS = [*CUT[:4], "maxima_kernel", "list_kernel", "list_kernel", *CUT[4:]]
APPEND = ["insert_kernel", "move_kernel", "move_kernel", "move_kernel"]
END = ["clip_kernel", "update_kernel", "count_step_kernel"]


def launched(steps: int = 1, **options: object) -> list[str]:
    """Kernels of the last of some steps over many tensors."""
    params = [torch.nn.Parameter(torch.zeros(300, dtype=torch.bfloat16)) for _ in range(40)]
    for param in params:
        param.grad = torch.zeros_like(param)
    order: list[str] = []
    with noted(order):
        optimizer = MaskedAdamW(params, lr=1e-3, backend="triton", max_grad_norm=1.0, **options)
        for _ in range(steps):
            order.clear()
            optimizer.step()
    return order


@pytest.mark.parametrize(("exp", "cut", "total"), [(0.0, CUT, 19), (2.0, CUT_BY_BOUNDS, 22)])
def test_a_step_that_unmasks(exp: float, cut: list[str], total: int) -> None:
    """Whatever the number of tensors."""
    selection = Increment(100, total_steps=10)
    order = launched(importance=D3(exp=exp), selection=selection)
    assert order == [*SCAN, *cut, *APPEND, *END]
    assert len(order) == total


def test_a_quiet_step() -> None:
    selection = Increment(100, total_steps=10, every=2)
    assert launched(2, importance=D3(), selection=selection) == [*SCAN, *END]


@pytest.mark.parametrize(
    ("exp", "quota", "collect"),
    [
        (0.0, 1, COLLECT),
        (0.0, 100, COLLECT_BY_GROUPS),
        (2.0, 1, COLLECT_BY_GROUPS),
        (2.0, 100, COLLECT_BY_GROUPS),
    ],
)
def test_gradients_ranked_in_the_backward_pass(exp: float, quota: int, collect: list[str]) -> None:
    """Six kernels for each large tensor, or seven."""
    size, tensors = fused_backward.BATCH_BYTES // 4, 5
    params = [torch.nn.Parameter(torch.zeros(size)) for _ in range(tensors)]
    order: list[str] = []
    with noted(order):
        optimizer = MaskedAdamW(
            params, lr=1e-3, backend="triton", max_grad_norm=1.0, fuse_backward=True,
            importance=D3(exp=exp), selection=Increment(quota, total_steps=1),
        )  # fmt: skip
        torch.stack([param.sum() for param in params]).sum().backward()
        assert order == ["collect_begin_kernel", *[*SCAN, *collect] * tensors]
        order.clear()
        optimizer.step()
    winners = ["finish_kernel", "write_in_order_kernel"]
    assert order == [*winners, *APPEND, *END]

"""Warnings name the line of the user's code that caused them, whatever lies between."""

from __future__ import annotations

import inspect
import subprocess
import sys
import warnings
from collections.abc import Callable

import pytest
import torch
from torch.nn import Parameter

from sparse_optim import D3, Magnitude, MaskedAdamW, Snip, Static
from sparse_optim.optim.gradient_watch import STEPS_WITHOUT_GRADIENTS
from sparse_optim.warn import warn_user


def line() -> int:
    """Of the caller."""
    frame = inspect.currentframe()
    assert frame is not None
    assert frame.f_back is not None
    return frame.f_back.f_lineno


def build(values: torch.Tensor, **options: object) -> MaskedAdamW:
    arguments = {"importance": D3(), "selection": Static(1), **options}
    return MaskedAdamW([Parameter(values)], **arguments)  # a warning of the constructor: here


def step(optimizer: MaskedAdamW) -> int:
    """One step on gradients of 1; the line that takes it."""
    for group in optimizer.param_groups:
        for param in group["params"]:
            param.grad = torch.ones_like(param)
    optimizer.step()
    return line() - 1


def no_clipping() -> int:
    build(torch.ones(4), fuse_backward=True)
    return inspect.getsourcelines(build)[1] + 2


def no_score() -> int:
    return step(build(torch.zeros(4), importance=Snip()))


def no_score_with_a_scheduler() -> int:
    """A scheduler wraps `step`; torch's profiler hook and `no_grad` stand between, too."""
    optimizer = build(torch.zeros(4), importance=Snip())
    torch.optim.lr_scheduler.ConstantLR(optimizer)
    return step(optimizer)


def zero_matrix() -> int:
    return step(build(torch.zeros(4, 4), importance=Magnitude()))


def no_gradients() -> int:
    optimizer = build(torch.ones(4))
    for _ in range(STEPS_WITHOUT_GRADIENTS):
        optimizer.step()
    return line() - 1


def in_a_closure_of_torch() -> int:
    with torch.no_grad():
        warn_user("a warning")
    return line() - 1


CASES = [
    (no_clipping, "nothing clips gradients"),
    (no_score, "scores every entry 0"),
    (no_score_with_a_scheduler, "scores every entry 0"),
    (zero_matrix, "are all zeros"),
    (no_gradients, "no parameter has had a gradient"),
    (in_a_closure_of_torch, "a warning"),
]


@pytest.mark.parametrize(("cause", "message"), CASES)
def test_a_warning_names_the_line_of_the_user(cause: Callable[[], int], message: str) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        expected = cause()
    [warning] = [each for each in caught if message in str(each.message)]
    assert (warning.filename, warning.lineno) == (__file__, expected)


TWO = """
import torch
from sparse_optim import D3, MaskedAdamW, Static
def build():
    return [torch.nn.Parameter(torch.ones(4))]
first = MaskedAdamW(build(), importance=D3(), selection=Static(1), fuse_backward=True)
second = MaskedAdamW(build(), importance=D3(), selection=Static(1), fuse_backward=True)
"""


def test_python_shows_the_warning_of_a_second_optimizer() -> None:
    """It shows one a line: both have theirs only if neither is that of torch or this package."""
    run = subprocess.run([sys.executable, "-c", TWO], capture_output=True, text=True, check=True)
    assert run.stderr.count("nothing clips gradients") == 2
    assert "<string>:6: UserWarning" in run.stderr
    assert "<string>:7: UserWarning" in run.stderr

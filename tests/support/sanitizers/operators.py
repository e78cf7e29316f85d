"""The operators through torch, from a library that was built with sanitizers.

    python operators.py LIBRARY

Right arguments give the reference's results; wrong ones, in shape or contents, an error and never
an access beyond a tensor. Prints how many cases ran.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

if __name__ == "__main__":
    torch.ops.load_library(sys.argv[1])
    sys.modules["sparse_optim._C"] = types.ModuleType("_C")  # its operators are registered already
    sys.path.insert(0, str(Path(__file__).parents[1]))

from exchange_cases import assert_exchanged, exchange_cases, make_exchange
from op_cases import DTYPES, Case, assert_same_bits, make_case
from sampled_cases import all_cases, assert_sampled, make_sampled

from sparse_optim.backends import cpp, reference

OPS = ("bind", "scan", "clip", "rank", "cut", "append", "update")
INTEGERS = (-1, 1000, 2**31 - 1, -(2**31), 2**40, -(2**62))


def check_steps() -> int:
    """Whole steps against the reference."""
    count = 0
    for seed in range(24):
        case = make_case(
            [700, 0, 1, 513, 90 + seed], dtypes=[DTYPES[seed % len(DTYPES)]], seed=seed,
            kind=("normal", "ties", "zeros")[seed % 3], quota=20 + seed, num_active=40,
            dense_sizes=[9, 0, 700], exp=(0.0, 2.0, -1.0, 0.3)[seed % 4],
            offset_views=seed % 2 == 0, max_grad_norm=(0.1, 1e9)[seed % 2],
        )  # fmt: skip
        got, expected = case.copy().step(cpp), case.copy().step(reference)
        assert_same_bits(got.active.position, expected.active.position)
        for a, b in zip(got.params, expected.params, strict=True):
            torch.testing.assert_close(a, b)
        count += 1
    return count


def check_sampled() -> int:
    """Weight gradients at active entries."""
    cases = dict(all_cases(large=False))
    for name, case in cases.items():
        assert_sampled(cpp, name, case)
    return len(cases)


def check_exchange() -> int:
    """Entries read, and swapped with values."""
    cases = dict(exchange_cases())
    for name, case in cases.items():
        assert_exchanged(cpp, name, case)
    return len(cases)


def operator(name: str) -> Any:
    return getattr(torch.ops.sparse_optim, name).default


def arguments(name: str, case: Case) -> dict[str, Any]:
    names = [argument.name for argument in operator(name)._schema.arguments]
    found = {each: case.buffer(each) for each in names if each != "bound"}
    return {"bound": case.bound(cpp), **found} if "bound" in names else found


def right_arguments(name: str) -> tuple[dict[str, Any], Any]:
    """Of any operator, as they are when it is called, and what keeps addresses in them valid."""
    if name == "sampled_grad":
        case = make_sampled(20, 30, 20, 40, dtype=torch.bfloat16)
        return vars(case), case
    if name in ("gather", "exchange"):
        swap = make_exchange([600, 30], 0.1)
        table = torch.zeros(2, 4, dtype=torch.int64)
        bound = cpp.bind([param[:0] for param in swap.params], swap.params, table)
        found = {"position": swap.position, "offsets": swap.offsets, "value": swap.value}
        return {"bound": bound, **found}, swap
    step = before(name)
    return arguments(name, step), step


def before(name: str) -> Case:
    """A case as it stands when an operation begins."""
    case = make_case([600, 30], quota=10, num_active=9, dense_sizes=[5], dtypes=[torch.bfloat16])
    for previous in OPS[: OPS.index(name)]:
        operator(previous)(*arguments(previous, case).values())
    return case


def wrong(value: Any) -> Iterator[Any]:
    if isinstance(value, list):
        yield from ([], value[:1], [torch.zeros(3)] * 2, [torch.zeros(3, dtype=torch.int32)] * 2)
    elif isinstance(value, bool):
        return
    elif isinstance(value, int):
        yield from (0, -1, 7, 4097, 2**40, -(2**63))
    elif isinstance(value, float):
        yield from (float("nan"), float("inf"), -1.0, 1e308)
    elif isinstance(value, str):
        yield from ("", "x", "entry\0")
    elif isinstance(value, Tensor):
        yield from wrong_tensors(value)


def wrong_tensors(value: Tensor) -> Iterator[Tensor]:
    flat = value.reshape(-1)
    for dtype in (torch.float64, torch.float32, torch.int64, torch.int32, torch.uint8):
        if dtype != value.dtype:
            yield value.to(dtype)
    yield from (flat[:0].clone(), torch.cat([flat, flat[:1]]))
    if flat.numel() > 1:
        yield from (flat[:-1].clone(), flat.repeat_interleave(2)[::2], flat[:1].expand(len(flat)))
    numbers: tuple[float, ...] = (float("nan"), float("inf"), -1.0)
    if not value.is_floating_point():
        limits = torch.iinfo(value.dtype)
        numbers = [number for number in INTEGERS if limits.min <= number <= limits.max]
    for number in numbers:
        yield torch.full_like(value, number)
        for index in {0, flat.numel() - 1, min(4, flat.numel() - 1)} if flat.numel() else ():
            changed = value.clone()
            changed.view(-1)[index] = number
            yield changed


def check_errors() -> tuple[int, int]:
    """Every argument of every operator, wrong in every way; (cases, refused)."""
    cases = refused = 0
    for name in (*OPS, "sampled_grad", "gather", "exchange"):
        for argument in right_arguments(name)[0]:
            for number in range(1000):
                args, _alive = right_arguments(name)
                changes = list(wrong(args[argument]))
                if number >= len(changes):
                    break
                args[argument] = changes[number]
                cases += 1
                try:
                    operator(name)(*args.values())
                except (RuntimeError, TypeError, NotImplementedError):
                    refused += 1
    return cases, refused


if __name__ == "__main__":
    torch.set_num_threads(2)
    steps = check_steps() + check_sampled() + check_exchange()
    sys.stdout.write(" ".join(map(str, (steps, *check_errors()))))

"""What optimizers launch on a GPU, without one: Triton launches noted instead of run.

Whole steps run on the CPU up to the launches. No launcher looks at a tensor's contents, so that
kernels which do not run make no difference to what is launched.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import warnings
from collections.abc import Iterator
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction, mangle_type

from sparse_optim import D3, Increment, MaskedAdamW, Scores, Stochastic
from sparse_optim.backends import registry

EXACT_EXPS = (-1.0, -0.5, 0.0, 0.5, 1.0, 2.0)
GENERAL_EXPS = (-0.3, 1.7)  # through pow
# Arguments whose dtype is the caller's.
ANY_DTYPE = ("grad_ptr", "matrix_ptr", "outer_ptr", "inner_ptr")
# Of tensors with three tiles between them: entries are counted in parts of tiles, or one by one.
QUOTAS = (50, 500)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Launch(NamedTuple):
    """What makes one compiled kernel of a `triton.jit` function."""

    kernel: Any
    types: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    aligned: frozenset[str]  # pointers to multiples of 16 bytes
    warps: int
    fuses: bool

    @property
    def name(self) -> str:
        types = [f"{arg}:{kind}" for arg, kind in self.types if arg in ANY_DTYPE]
        odd = [f"{arg}:unaligned" for arg, kind in self.types
               if kind.startswith("*") and arg not in self.aligned]  # fmt: skip
        values = [f"{constant}={value}" for constant, value in self.constants]
        return " ".join([self.kernel.__name__, *types, *odd, *values])


@functools.cache
def compiled(launch: Launch, target: GPUTarget) -> Any:
    """The kernel of a launch, compiled ahead of time."""
    kernel, types, constants, aligned, warps, fuses = launch
    names = kernel.arg_names
    signature = dict.fromkeys(names, "constexpr") | dict(types)
    return triton.compile(
        ASTSource(
            kernel, {arg: signature[arg] for arg in names},
            constexprs={(names.index(arg),): value for arg, value in constants},
            attrs={(names.index(arg),): [["tt.divisibility", 16]] for arg in aligned},
        ),
        target=target,
        options={"num_warps": warps, "enable_fp_fusion": fuses},
    )  # fmt: skip


def launch_of(kernel: Any, args: tuple[Any, ...], options: dict[str, Any]) -> Launch:
    constexprs = {param.name for param in kernel.params if param.is_constexpr}
    constants = {name: options.pop(name) for name in tuple(options) if name in constexprs}
    passed = dict(zip(kernel.arg_names, args, strict=False))
    # Its type follows its value: the greater one, of gradients beyond 2^31 entries.
    types = {name: "i64" if name == "numel" else mangle_type(arg) for name, arg in passed.items()}
    aligned = {
        name for name, arg in passed.items()
        if isinstance(arg, torch.Tensor) and arg.data_ptr() % 16 == 0
    }  # fmt: skip
    warps, fuses = options.pop("num_warps"), options.pop("enable_fp_fusion", True)
    assert not options, f"unknown options of {kernel.__name__}: {options}"
    return Launch(
        kernel, tuple(types.items()), tuple(constants.items()), frozenset(aligned), warps, fuses
    )


@contextlib.contextmanager
def noted(order: list[str] | None = None) -> Iterator[dict[str, Launch]]:
    """Launches by name, on the CPU; nothing is run. `order` gets each kernel's name, in turn."""
    launches: dict[str, Launch] = {}
    order = [] if order is None else order

    def note(kernel: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        launch = launch_of(kernel, args, options)
        assert launches.setdefault(launch.name, launch) == launch, launch.name
        order.append(kernel.__name__)

    on_cpu = {"triton": ("sparse_optim.triton_kernels", "cpu")}
    with (
        mock.patch.object(JITFunction, "run", note),
        mock.patch.dict(registry.BACKENDS, on_cpu),
    ):
        yield launches


def launches_of_optimizers() -> dict[str, Launch]:
    """All that one step of every kind of optimizer launches."""
    with noted() as launches, warnings.catch_warnings():
        # Scores are read before the cut, and nothing has ranked them.
        warnings.filterwarnings("ignore", message="Scores.* scores every entry 0")
        for exp in EXACT_EXPS + GENERAL_EXPS:
            take_step(importance=D3(exp=exp, eps=1e-3))
            take_fused_step(importance=D3(exp=exp, eps=1e-3))
        for dtype, bias_correction in itertools.product(DTYPES, ("entry", "global")):
            take_step(dtype, bias_correction=bias_correction, max_grad_norm=1.0)
        take_step(selection=Increment(90, total_steps=10))  # an odd part of `append`'s scratch
        scores = Scores({"body": torch.ones(3000), "more": torch.ones(5000)})
        take_step(importance=scores)
        take_step(importance=scores, selection=Stochastic(100))
        take_fused_step(importance=scores)
        for exp, quota in itertools.product((0.0, 1.7), QUOTAS):
            take_fused_step(importance=D3(exp=exp), selection=Increment(quota, total_steps=1))
        for dtype, transposed in itertools.product(DTYPES, (False, True)):
            sample(torch.zeros(300, 20, dtype=dtype), torch.zeros(300, 40, dtype=dtype), transposed)
        sample(torch.zeros(20, 300).t(), torch.zeros(300, 40, dtype=torch.bfloat16), False)
        swap_entries()
        sample(torch.zeros(12001)[1:].view(300, 40), torch.zeros(300, 20), False)
    return launches


def sample(input: torch.Tensor, grad_output: torch.Tensor, transposed: bool) -> None:
    """The gradients of 100 entries of a weight of 800, the pool's first tensor or a later one."""
    start = int(transposed)
    position, out = torch.arange(0, 800, 8, dtype=torch.int32)[start:], torch.zeros(100)[start:]
    registry.load("triton").sampled_grad(input, grad_output, position, transposed, out)


def swap_entries() -> None:
    """Entries of two tensors with their values."""
    ops, params = registry.load("triton"), [torch.zeros(300), torch.zeros(200).bfloat16()]
    table = torch.zeros(2, 4, dtype=torch.int64)
    bound = ops.bind([param[:0] for param in params], params, table)
    position, value = (torch.zeros(7, dtype=torch.int32) for _ in range(2))
    ops.gather(bound, position, torch.tensor([0, 3, 7]), value)
    ops.exchange(bound, position, torch.tensor([0, 3, 7]), value)


def take_fused_step(**options: Any) -> None:
    """One step whose gradients are ranked in the backward pass: of 3000 entries and of 5000."""
    params = {"body": torch.nn.Parameter(torch.zeros(3000)),
              "more": torch.nn.Parameter(torch.zeros(5000))}  # fmt: skip
    options = {"importance": D3(), "selection": Increment(1, total_steps=1), **options}
    optimizer = MaskedAdamW(
        params.items(), lr=1e-3, backend="triton", max_grad_norm=1.0, fuse_backward=True, **options
    )
    sum(param.sum() for param in params.values()).backward()
    optimizer.step()


def take_step(dtype: torch.dtype = torch.float32, **options: Any) -> None:
    """One step with two tensors in the pool and two trained densely, one gradient unaligned."""
    params = {
        name: torch.nn.Parameter(torch.zeros(size, dtype=dtype))
        for name, size in {"body": 3000, "more": 5000, "head": 700, "odd": 701}.items()
    }
    for name, param in params.items():
        start = int(name == "odd")  # a gradient in a bucket
        param.grad = torch.zeros(start + param.numel(), dtype=dtype)[start:]
    named = list(params.items())
    groups = [{"params": named[:2]}, {"params": named[2:], "unmask": "all"}]
    options = {"importance": D3(), "selection": Increment(100, total_steps=10), **options}
    MaskedAdamW(groups, lr=1e-3, backend="triton", **options).step()

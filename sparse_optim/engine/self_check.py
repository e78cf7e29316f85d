"""Whether a backend computes on a device what the reference computes on the CPU.

`backend="auto"` asks before it takes a backend that tests do not run on such devices. A few steps
of a tiny pool (ties, three dtypes, sizes around a tile, a gradient that begins anywhere, an
overflow) on the same gradients: selections must be equal bit for bit, moments and parameters within
rounding. An exponent that goes through `pow` promises no equal bits: there the scores are far
apart, the same entries must win, and the least of their scores is compared within rounding.
Own random numbers; the work is queued on the current stream, whose end it waits for.
"""

from __future__ import annotations

import functools
import logging

import torch
from torch import Tensor

from sparse_optim.backends.registry import load
from sparse_optim.backends.words import of_words
from sparse_optim.engine.engine import Engine, Method
from sparse_optim.engine.pool import Pool
from sparse_optim.policy.importance import D3
from sparse_optim.policy.selection import Increment, Selection, Stochastic

_log = logging.getLogger(__name__)

SHAPES = ((4097,), (0,), (1,), (41, 101), (33,))  # tiles of GPU backends are of 4096
DTYPES = (torch.float32, torch.bfloat16, torch.float32, torch.float16, torch.bfloat16)
TOKENS = 130  # of the weight gradients
STEPS = ("normal", "ties", "overflow", "ties")  # what the gradients of each step are like
POWER = D3(exp=1.7, eps=1.0)
POWER_STEPS = ("far apart", "far apart")
METHODS: tuple[tuple[D3, Selection], ...] = (
    (D3(), Increment(300, total_steps=3)),
    (D3(exp=2.0, eps=0.01), Increment(300, total_steps=3)),
    (D3(exp=-1.0, eps=0.01), Increment(300, total_steps=3)),
    (D3(exp=0.5, eps=0.01), Increment(300, total_steps=3)),
    (POWER, Increment(300, total_steps=3)),
    (D3(), Stochastic(100)),
)

HYPER = {"lr": 0.01, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01, "maximize": False}

COUNTS = ("progress", "offsets")
SELECTED = ("position", "unmask_step")
ROUNDED = ("exp_avg", "exp_avg_sq", "master")
# A handful of float32 roundings, of values up to the largest; values that are rounded to 16 bits
# may end a unit apart.
TOLERANCE = 1e-5


@functools.cache
def first_mismatch(backend: str, device: torch.device) -> str | None:
    """What a backend does wrong on a device, in words; None if nothing.

    Args:
        backend: its name; it must be installed.
        device: that the pool is put on.

    Raises:
        RuntimeError: a CUDA graph is being captured, in which nothing can be read.
        torch.OutOfMemoryError: the device has no room for a tiny pool.
    """
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError("construct the optimizer before the capture of a CUDA graph begins")
    _log.info("checking backend %r on %s (Triton compiles its kernels the first time)",
              backend, device)  # fmt: skip
    try:
        with torch.device("cpu"):  # not the user's default device
            for importance, selection in METHODS:
                if found := _first_difference(backend, device, importance, selection):
                    return found
            return _sampled_difference(backend, device)
    except torch.OutOfMemoryError:
        raise  # says nothing of the backend, and is not remembered
    except Exception as error:  # a compiler, a driver or a kernel may raise anything
        first_line = next(iter(str(error).splitlines()), "")
        return f"it raised {type(error).__name__}: {first_line}"


@torch.no_grad()
def _first_difference(
    backend: str, device: torch.device, importance: D3, selection: Selection
) -> str | None:
    """What differs in the first step in which anything does."""
    start = _values("normal", torch.Generator().manual_seed(0))
    want = _engine(start, importance, selection, "reference", torch.device("cpu"))
    got = _engine(start, importance, selection, backend, device)
    touched = [torch.zeros(value.numel(), dtype=torch.bool) for value in start]
    power = importance == POWER
    for number, kind in enumerate(POWER_STEPS if power else STEPS, 1):
        generator = torch.Generator().manual_seed(number)
        grads = _far_apart(start, generator) if power else _values(kind, generator)
        for engine in (want, got):
            _step(engine, grads)
        for index, moves in enumerate(touched):
            moves[want.active.segment(index)["position"].long()] = True
        what = _difference(got, want, equal_scores=not power)
        if what := what or _frozen_changed(got, start, touched):
            return f"{what} in step {number} of {importance}, {selection}"
    return None


def _sampled_difference(backend: str, device: torch.device) -> str | None:
    """What differs in weight gradients at active entries."""
    generator = torch.Generator().manual_seed(0)
    for dtype in set(DTYPES):
        for transposed in (False, True):
            input = torch.randn(TOKENS, 70, generator=generator).to(dtype)
            grad = torch.randn(TOKENS, 50, generator=generator).to(dtype)
            position = torch.randperm(3500, generator=generator)[:300].sort().values.int()
            want = torch.zeros(300, dtype=torch.float32)
            got = want.to(device, copy=True)
            load("reference").sampled_grad(input, grad, position, transposed, want)
            x, dy, where = (each.to(device) for each in (input, grad, position))
            load(backend).sampled_grad(x, dy, where, transposed, got)
            if not torch.allclose(got.cpu(), want, rtol=TOLERANCE, atol=TOLERANCE * TOKENS):
                return "weight gradients of active entries are further off than rounding explains"
    return None


def _engine(
    start: list[Tensor], importance: D3, selection: Selection, backend: str, device: torch.device
) -> Engine:
    """An engine over copies of these values."""
    params = tuple(torch.nn.Parameter(value.to(device, copy=True)) for value in start)
    names = tuple(f"tensor {index}" for index in range(len(params)))
    pool = Pool(params, names, (0,) * len(params), num_groups=1, num_dense=0, device=device)
    targets = selection.targets(int(selection.budget))
    return Engine(pool, Method(importance, selection), targets, backend)


def _step(engine: Engine, grads: list[Tensor]) -> None:
    """One clipped step on these gradients."""
    for param, grad in zip(engine.pool.params, grads, strict=True):
        param.grad = _unaligned(grad, param.device)
    engine.begin([HYPER])
    bound = engine.bind([])
    engine.select(bound)
    engine.clip(max_grad_norm=1.0)
    engine.update(bound)


def _difference(got: Engine, want: Engine, equal_scores: bool) -> str | None:
    """What differs between two engines after a step; scores bit for bit, or within rounding."""
    count = int(want.active.progress[1])
    for name in COUNTS + SELECTED:
        ours, theirs = getattr(got.active, name).cpu(), getattr(want.active, name)
        if name in SELECTED:
            ours, theirs = ours[:count], theirs[:count]
        if not torch.equal(ours, theirs):
            return f"it unmasks other entries than the reference ({name} differs)"
    same = torch.equal if equal_scores else _near
    if not same(got.work.new.threshold.cpu(), want.work.new.threshold):
        return "the least importance that it unmasks differs from the reference"
    if not _near(got.work.scalars.grad_norm, want.work.scalars.grad_norm):
        return "its gradient norm differs from the reference"
    for name in ROUNDED:
        if not _near(getattr(got.active, name)[:count], getattr(want.active, name)[:count]):
            return f"{name} is further from the reference than rounding explains"
    for ours, theirs in zip(got.pool.params, want.pool.params, strict=True):
        if not _near(ours.detach(), theirs.detach()):
            return "parameters are further from the reference than rounding explains"
    return _misread(got, count)


def _misread(got: Engine, count: int) -> str | None:
    """Whether an operation reads other values of active entries than torch."""
    words = got.read(got.active.position[:count], got.active.offsets)
    for index, param in enumerate(got.pool.params):
        at = got.active.segment(index)["position"].long()
        first = int(got.active.offsets[index])
        want = param.detach().view(-1)[at]
        if not torch.equal(of_words(words[first : first + at.numel()], param.dtype), want):
            return "it reads other values of active entries than torch"
    return None


def _frozen_changed(got: Engine, start: list[Tensor], touched: list[Tensor]) -> str | None:
    """Whether an entry that was never active has other bits than at the start."""
    for param, before, moves in zip(got.pool.params, start, touched, strict=True):
        if not torch.equal(param.detach().cpu().view(-1)[~moves], before.view(-1)[~moves]):
            return "frozen entries have moved"
    return None


def _near(ours: Tensor, theirs: Tensor) -> bool:
    """Equal up to rounding."""
    if not theirs.numel():
        return True
    relative = TOLERANCE
    if theirs.dtype not in (torch.float32, torch.float64):
        relative = 2 * torch.finfo(theirs.dtype).eps
    largest = float(theirs.abs().max())
    return torch.allclose(ours.cpu(), theirs, rtol=relative, atol=TOLERANCE * largest)


def _values(kind: str, generator: torch.Generator) -> list[Tensor]:
    """Values of the pool on the CPU: "normal", "ties", or "overflow" with one that is infinite."""
    values = [torch.randn(shape, generator=generator, dtype=torch.float32) for shape in SHAPES]
    if kind == "ties":
        values = [(2 * value).round().clamp(-2, 2) / 4 for value in values]
    if kind == "overflow":
        values[0][-1] = torch.inf
    return [value.to(dtype) for value, dtype in zip(values, DTYPES, strict=True)]


def _far_apart(params: list[Tensor], generator: torch.Generator) -> list[Tensor]:
    """Gradients by which the best 700 scores by POWER are 1% apart: more than any dtype rounds."""
    order = torch.randperm(sum(param.numel() for param in params), generator=generator)
    scores = (1.01 ** -order.clamp(max=700)).split([param.numel() for param in params])
    return [
        (score.view(param.shape) * (param.float().abs() + POWER.eps) ** POWER.exp).to(param.dtype)
        for score, param in zip(scores, params, strict=True)
    ]


def _unaligned(grad: Tensor, device: torch.device) -> Tensor:
    """The gradient on a device as a view that begins one entry into its memory."""
    memory = torch.zeros(grad.numel() + 1, dtype=grad.dtype, device=device)
    memory[1:] = grad.reshape(-1).to(device)
    return memory[1:].view(grad.shape)

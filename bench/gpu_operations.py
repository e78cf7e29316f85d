"""Build single operations beside what torch offers: sampled gradients, the selection."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench.gpu_subjects import Builder
from bench.subjects import midway, snapshot
from bench.timing import Subject
from sparse_optim.backends.registry import load

# (outputs, inputs) of the weights of Llama-7B, and tokens of a batch.
WEIGHTS = ((4096, 4096), (11008, 4096), (4096, 11008))
TOKENS = (512, 4096)
SHARES = (0.0005, 0.003)  # of a weight's entries: 3.5M of 7B, and the budget of many experiments
# (entries of the tensor, budget, quota) of a selection: a weight of Llama-7B, and a billion.
SELECTIONS = (
    (11008 * 4096, 3_500_000, 466),
    (11008 * 4096, 3_500_000, 350_000),
    (1 << 30, 3_500_000, 466),
    (1 << 30, 3_500_000, 350_000),
)
TINY_WEIGHTS, TINY_TOKENS, TINY_SELECTIONS = ((48, 40),), (16,), ((20_000, 2000, 32),)


def sampled_grads(
    device: torch.device, dtype: torch.dtype, backends: Sequence[str]
) -> Iterator[Builder]:
    """Compute a weight's gradient, dense and at the active entries alone.

    dense = grad_output.T @ input       sampled[e] = dense[position[e]]
    """
    is_large = device.type == "cuda"
    for outputs, inputs in WEIGHTS if is_large else TINY_WEIGHTS:
        for tokens in TOKENS if is_large else TINY_TOKENS:
            labels = {"outputs": outputs, "inputs": inputs, "tokens": tokens}
            make = partial(_operands, device, dtype, tokens, outputs, inputs)
            yield Builder({"name": "dense", **labels}, partial(_dense, labels, make))
            for backend in backends:
                for share in SHARES:
                    own = {"name": backend, **labels, "share": share}
                    yield Builder(own, partial(_sampled, own, backend, share, make))


Operands = tuple[Tensor, Tensor]  # input, grad_output


def _operands(
    device: torch.device, dtype: torch.dtype, tokens: int, outputs: int, inputs: int
) -> Operands:
    generator = torch.Generator(device).manual_seed(0)
    sizes = (tokens, inputs), (tokens, outputs)
    first, second = (
        torch.randn(size, generator=generator, device=device).to(dtype) for size in sizes
    )
    return first, second


def _dense(labels: dict[str, Any], make: Callable[[], Operands]) -> Subject:
    x, grad = make()
    moved = x.nbytes + grad.nbytes + x.shape[1] * grad.shape[1] * x.element_size()
    return Subject({"name": "dense", **labels}, lambda: grad.t() @ x, moved_bytes=moved)


def _sampled(
    labels: dict[str, Any], backend: str, share: float, make: Callable[[], Operands]
) -> Subject:
    x, grad = make()
    size = x.shape[1] * grad.shape[1]
    generator = torch.Generator(x.device).manual_seed(1)
    drawn = torch.randint(size, (int(share * size) + 1,), generator=generator, device=x.device)
    position = drawn.unique().int()
    out, ops = torch.zeros(position.numel(), device=x.device), load(backend)
    return Subject(
        labels, lambda: ops.sampled_grad(x, grad, position, False, out),
        moved_bytes=x.nbytes + grad.nbytes + 8 * out.numel(),
    )  # fmt: skip


def selections(
    device: torch.device, dtype: torch.dtype, backends: Sequence[str]
) -> Iterator[Builder]:
    """Find the k entries of the largest |grad|: torch.topk, and our scan and cut.

    Ours also leaves out the active entries, gathers their gradients and sums the squares.
    """
    for entries, budget, quota in SELECTIONS if device.type == "cuda" else TINY_SELECTIONS:
        labels = {"entries": entries, "quota": quota}
        make = partial(_one_tensor, device, dtype, entries)
        yield Builder({"name": "torch.topk", **labels}, partial(_topk, labels, make))
        for backend in backends:
            own = {"name": backend, **labels, "budget": budget}
            yield Builder(own, partial(_selection, own, make))


def _one_tensor(device: torch.device, dtype: torch.dtype, entries: int) -> Tensor:
    generator = torch.Generator(device).manual_seed(0)
    param = torch.nn.Parameter(torch.zeros(entries, dtype=dtype, device=device))
    param.grad = torch.empty_like(param).normal_(generator=generator)
    return param


def _topk(labels: dict[str, Any], make: Callable[[], Tensor]) -> Subject:
    grad, quota = make().grad, labels["quota"]
    assert grad is not None

    def run() -> object:
        return torch.topk(grad.abs(), quota, sorted=False)

    return Subject({"name": "torch.topk", **labels}, run, moved_bytes=grad.nbytes)


def _selection(labels: dict[str, Any], make: Callable[[], Tensor]) -> Subject:
    param, backend = make(), labels["name"]
    optimizer = midway([param], labels["budget"], labels["quota"], exp=0.0, backend=backend)
    restore, engine = snapshot(optimizer), optimizer.engine
    found = engine.work.new

    def prepare() -> None:
        restore()
        engine.begin(optimizer.param_groups)

    def run() -> None:
        grads = engine.bind([])
        engine.scan(grads)
        engine.cut(grads)

    def check() -> None:
        if int(found.count) != labels["quota"]:
            raise RuntimeError(f"selected {int(found.count)}, expected {labels['quota']}")

    return Subject(labels, run, param.nbytes, prepare, check)

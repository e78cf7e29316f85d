"""Count the memory of a training step from a model's config: no weights are loaded or allocated.

Forward and backward run on fake tensors, which have shapes and devices but no memory. Every storage
that an operation returns is counted while it lives: activations, temporaries (such as those of a
language model's loss) and gradients as they come; with `fuse_backward=True` each gradient is freed
at once, with `sampled_backward=True` layers compute none of their weights. On the CPU the result is
within 1% to 8% of measured steps (tests/test_estimate.py); on a GPU it is unmeasured. Operations
are chosen as on a CPU; attention with dropout keeps its matrices there, not on a GPU, where the
result is then an upper bound.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sparse_optim.engine.sampled import Cover, Window
from sparse_optim.estimate import Footprint
from sparse_optim.optim.attach import Attachment, find_layers


def footprint_of(build: Callable[[], tuple[torch.nn.Module, dict[str, Tensor]]]) -> Footprint:
    """Count a model on fake tensors.

    Args:
        build: makes the model, in training mode, and the inputs of a forward pass that returns a
            `loss`. It is called in fake tensor mode.
    """
    with FakeTensorMode():
        model, inputs = build()
        trained = [param for param in model.parameters() if param.requires_grad]
        step = _step_bytes(model, inputs)
        model.zero_grad()
        with _freed(trained):
            step_in_backward = _step_bytes(model, inputs)
        layers = find_layers(model, trained)  # those without hooks
        source = _Layers(trained, layers)
        attachment = Attachment(model, layers, source)
        with _freed(trained):
            step_sampled = _step_bytes(model, inputs)
        attachment.detach()
    held = [*model.parameters(), *model.buffers()]
    return Footprint(
        entries=sum(param.numel() for param in trained),
        tensors=len(trained),
        weights=sum(tensor.nbytes for tensor in held),
        step=step,
        step_in_backward=step_in_backward,
        step_sampled=step_sampled,
    )


class _Layers:
    """Layers that sample at one entry of each weight: what more take is state."""

    def __init__(self, params: Sequence[Tensor], indices: Iterable[int]) -> None:
        self.window = Window()
        self.window.quiet = True
        self.covers = {index: Cover(self.window, params[index], "reference") for index in indices}
        for cover in self.covers.values():
            cover.renew(torch.zeros(1, dtype=torch.float32), torch.zeros(1, dtype=torch.int32))

    def discard(self) -> None:
        """For the model's `zero_grad`."""


@contextmanager
def _freed(params: Sequence[Tensor]) -> Iterator[None]:
    """Free each gradient as soon as it is computed."""
    handles = [param.register_post_accumulate_grad_hook(_free_grad) for param in params]
    yield
    for handle in handles:
        handle.remove()


def _free_grad(param: Tensor) -> None:
    param.grad = None


def _step_bytes(model: torch.nn.Module, inputs: dict[str, Tensor]) -> int:
    """The most that a forward and a backward pass hold at once."""
    live = _Live([*model.parameters(), *model.buffers(), *inputs.values()])
    with live:
        model(**inputs).loss.backward()
    return live.peak


class _Live(TorchDispatchMode):
    """Count the bytes of the storages that operations return, while these live."""

    def __init__(self, known: Sequence[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak = self._now = 0
        # By address: storages known before live longer, and others leave as they die.
        self._known = {tensor.untyped_storage()._cdata for tensor in known}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        returned = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(returned):
            if isinstance(leaf, Tensor):
                self._count(leaf.untyped_storage())
        return returned

    def _count(self, storage: torch.UntypedStorage) -> None:
        address, size = storage._cdata, storage.nbytes()
        if address in self._known:
            return
        self._known.add(address)
        self._now += size
        self.peak = max(self.peak, self._now)
        weakref.finalize(storage, self._forget, address, size)

    def _forget(self, address: int, size: int) -> None:
        self._known.discard(address)
        self._now -= size

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

import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sparse_optim.engine.sampled import Cover, Window
from sparse_optim.estimate import PLAIN, Footprint
from sparse_optim.finetune.adapter_kinds import AdapterRequest
from sparse_optim.finetune.adapters import lora
from sparse_optim.optim.attach import Attachment, find_layers

RANK = 16  # of LoRA and QLoRA


class Planner:
    """Counts training steps of a model, in each way and at any batch size.

    Args:
        build: makes the model, in training mode. It is called on the meta device.
        inputs: makes the inputs of a forward pass that returns a `loss`, for a batch size. It is
            called in fake tensor mode.
    """

    def __init__(
        self, build: Callable[[], nn.Module], inputs: Callable[[int], dict[str, Tensor]]
    ) -> None:
        self._build, self._inputs = build, inputs
        self._mode = FakeTensorMode()
        self._models: dict[str, nn.Module] = {}
        self._counted: dict[tuple[str, int], Footprint] = {}

    def footprint(self, way: str, batch: int) -> Footprint:
        """Count a step; a count is made once.

        Args:
            way: "plain", "in-backward" (each gradient is freed as soon as it is computed),
                "sampled" (and layers compute no weight gradients), "lora" (LoRA of rank RANK on all
                Linear modules but a language model's output layer) or "qlora" (and these modules
                are in 4-bit NormalFloat, the constants of their blocks quantized too).
            batch: examples.

        Raises:
            ValueError: LoRA finds no module to adapt.
            ModuleNotFoundError: LoRA needs peft.
        """
        if (way, batch) not in self._counted:
            self._counted[way, batch] = self._count(way, batch)
        return self._counted[way, batch]

    def _count(self, way: str, batch: int) -> Footprint:
        model = self._model(way if way in ("lora", "qlora") else PLAIN)
        trained = [param for param in model.parameters() if param.requires_grad]
        with self._mode:
            sampled = _sampled(model, trained) if way == "sampled" else nullcontext()
            freed = _freed(trained) if way in ("in-backward", "sampled") else nullcontext()
            with sampled, freed:  # in this order: layers with hooks are not sampled
                step = _step_bytes(model, self._inputs(batch))
            for param in trained:
                param.grad = None
        held = [*model.parameters(), *model.buffers()]
        return Footprint(
            entries=sum(param.numel() for param in trained),
            tensors=len(trained),
            weights=sum(tensor.nbytes for tensor in held),
            step=step,
        )

    def _model(self, kind: str) -> nn.Module:
        """The model, plain or with adapters, on fake tensors."""
        if kind not in self._models:
            # peft moves adapters to their layer, which fake tensors do not allow: it builds on meta
            with torch.device("meta"), warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # transformers renames, peft lags
                model = self._build()
                if kind != PLAIN:
                    model = lora(model, AdapterRequest(RANK, whole=[]))
                if kind == "qlora":
                    _quantize(model)
            with self._mode:
                _move_to_cpu(model)
            self._models[kind] = model
        return self._models[kind]


def _move_to_cpu(model: nn.Module) -> None:
    """Replace tensors on meta by fake ones on the CPU; tied ones stay tied."""
    moved: dict[Tensor, Tensor] = {}
    for module in model.modules():
        own = [*module.named_parameters(recurse=False, remove_duplicate=False)]
        for name, tensor in [*own, *module.named_buffers(recurse=False, remove_duplicate=False)]:
            if tensor not in moved:
                moved[tensor] = _on_cpu(tensor)
            setattr(module, name, moved[tensor])


def _on_cpu(tensor: Tensor) -> Tensor:
    new = torch.empty(tensor.shape, dtype=tensor.dtype)
    return nn.Parameter(new, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else new


def _quantize(model: nn.Module) -> None:
    """Put the adapted layers into 4 bits; the rest keeps its dtype, as in bitsandbytes.

    So do the layers that a model's class keeps in float32 (wo of T5), which transformers does not
    quantize.
    """
    kept = {
        name
        for module in model.modules()
        for name in getattr(module, "_keep_in_fp32_modules", None) or ()
    }
    for path, module in model.named_modules():
        layer = getattr(module, "base_layer", None)
        if isinstance(layer, nn.Linear) and not kept & set(path.split(".")):
            module.base_layer = _FourBitLinear(layer)


class _FourBitLinear(nn.Module):
    """The memory of a Linear layer in 4-bit NormalFloat with double quantization.

        bytes of an entry = 1/2 + (1/64 + 4 / (64 * 256))      (0.127 bits of constants)

    Its weight is dequantized in forward and again in backward.

    Reference: Dettmers et al. 2023, QLoRA, arXiv:2305.14314, section 3.
    """

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        entries = layer.weight.numel()
        packed = -(-entries // 2) + -(-entries // 64) + 4 * -(-entries // (64 * 256))
        self.weight = nn.Parameter(torch.empty(packed, dtype=torch.uint8), requires_grad=False)
        self.shape, self.bias = layer.weight.shape, layer.bias

    def forward(self, inputs: Tensor) -> Tensor:
        """The product with the dequantized weight."""
        product: Tensor = _FourBitProduct.apply(inputs, self.weight, self.shape)  # type: ignore[no-untyped-call]
        return product if self.bias is None else product + self.bias


class _FourBitProduct(torch.autograd.Function):
    """inputs @ weight.T, with a weight that exists during the product alone."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, packed: Tensor, shape: torch.Size) -> Tensor:
        ctx.shape = shape
        return inputs @ inputs.new_empty(shape).T

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad @ grad.new_empty(ctx.shape), None, None


@contextmanager
def _sampled(model: nn.Module, trained: Sequence[Tensor]) -> Iterator[None]:
    """Compute no weight gradients in the layers that can leave them out."""
    layers = find_layers(model, trained)
    source = _Layers(trained, layers)  # its end would detach
    attachment = Attachment(model, layers, source)
    yield
    attachment.detach()


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

"""Which layers of a model give sampled gradients, and how their forward passes are exchanged.

A layer gets an attribute `forward` of its own, so that classes stay as they are; a copy or a pickle
of the model has the class's forward there. Layers are recognised by the forward that they run,
Conv1D by its name.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any, Protocol

from torch import Tensor, nn
from torch.nn.utils import parametrize

from sparse_optim.engine import sampled
from sparse_optim.engine.sampled import CLOSED, COVERS, Cover, Exchanged, Window

logger = logging.getLogger(__name__)

Forward = Callable[..., Tensor]

_numbers = count()  # of covers


def _linear(number: int, plain: Forward) -> Forward:
    def forward(self: nn.Linear, input: Tensor) -> Tensor:
        cover = COVERS.get(number)
        if cover is None or input.dim() < 2 or not cover.samples(self.weight):
            return plain(self, input)
        return sampled.linear(input, self.weight, self.bias, cover)

    return forward


def _conv1d(number: int, plain: Forward) -> Forward:
    def forward(self: Any, x: Tensor) -> Tensor:
        cover = COVERS.get(number)
        if cover is None or not cover.samples(self.weight):
            return plain(self, x)
        return sampled.conv1d(x, self.weight, self.bias, cover)

    return forward


def _embedding(number: int, plain: Forward) -> Forward:
    def forward(self: nn.Embedding, input: Tensor) -> Tensor:
        cover = COVERS.get(number)
        if cover is None or not cover.samples(self.weight):
            return plain(self, input)
        return sampled.embedding(input, self.weight, self.padding_idx, cover)

    return forward


@dataclass(frozen=True)
class Layer:
    """A layer that can give sampled gradients, and what makes its forward."""

    module: nn.Module
    build: Callable[[int, Forward], Forward]


def find_layers(model: nn.Module, params: Sequence[Tensor]) -> dict[int, list[Layer]]:
    """The layers that use each of these parameters as their weight, by its index.

    Layers of these kinds that must keep ordinary gradients are named in the log.

    Raises:
        ValueError: another optimizer is attached to one of them.
    """
    places = {id(param): index for index, param in enumerate(params)}
    found: dict[int, list[Layer]] = {}
    left: list[str] = []
    for name, module in model.named_modules():
        index = places.get(id(dict(module.named_parameters(recurse=False)).get("weight")))
        build = _kind(module)
        if index is None or build is None:
            continue
        if why := _obstacle(module):
            left.append(f"{name} (it has {why})")
            continue
        found.setdefault(index, []).append(Layer(module, build))
    if left:
        logger.warning("layers that keep ordinary weight gradients: %s", ", ".join(left))
    return found


class Owner(Protocol):
    """What `Attachment` needs of the source that gives the covers; see `SampledBackward`."""

    window: Window
    covers: dict[int, Cover]

    def discard(self) -> None: ...


def can_sample(model: nn.Module, params: Sequence[Tensor]) -> bool:
    """Whether `sampled_backward=True` has a layer to work with."""
    weights = {id(param) for param in params}
    return any(
        _kind(module) is not None and id(weight) in weights
        for module in model.modules()
        for name, weight in module.named_parameters(recurse=False)
        if name == "weight"
    )


def _kind(module: nn.Module) -> Callable[[int, Forward], Forward] | None:
    forward = type(module).forward
    if forward is nn.Linear.forward:
        return _linear
    if forward is nn.Embedding.forward:
        return _embedding
    kind = type(module)
    if kind.__name__ == "Conv1D" and kind.__module__.startswith("transformers."):
        return _conv1d
    return None


def _obstacle(module: nn.Module) -> str | None:
    """Why a layer cannot be covered."""
    weight, own = module.get_parameter("weight"), vars(module).get("forward")
    if Window.of(module) is not None:
        raise ValueError(
            "another optimizer with sampled_backward=True is attached to the model: delete it, or "
            "set its sampled_backward = False"
        )
    plain = getattr(own, "__func__", None) is type(module).forward
    if own is not None and not plain and not isinstance(own, Exchanged):
        return "another forward, which a library put there"
    if parametrize.is_parametrized(module):
        return "a parametrization"
    hooks = getattr(weight, "_backward_hooks", None)
    if hooks or any(map(_reads_gradient, _accumulation_hooks(weight))):
        return "a weight with hooks on its gradient"
    if isinstance(module, nn.Embedding) and (
        module.max_norm is not None or module.scale_grad_by_freq or module.sparse
    ):
        return "max_norm, scale_grad_by_freq or sparse"
    return None


def _accumulation_hooks(weight: Any) -> list[Any]:
    return list((getattr(weight, "_post_accumulate_grad_hooks", None) or {}).values())


def _reads_gradient(hook: Any) -> bool:
    """Whether a hook is not one of ours."""
    return not type(hook).__module__.startswith("sparse_optim.")


class Attachment:
    """The exchanged methods of a model, until `detach`.

    Args:
        model: held weakly.
        layers: from `find_layers`, of the weights that the source covers.
        source: which gives the covers, and whose gradients `model.zero_grad()` discards. Its end
            detaches.
    """

    def __init__(
        self, model: nn.Module, layers: Mapping[int, Sequence[Layer]], source: Owner
    ) -> None:
        self._modules: list[weakref.ref[nn.Module]] = []
        numbers: list[int] = []
        for index, each in layers.items():
            numbers.append(next(_numbers))
            COVERS[numbers[-1]] = source.covers[index]
            for layer in each:
                function = layer.build(numbers[-1], type(layer.module).forward)
                self._exchange(layer.module, "forward", function, source.window)
        own = vars(model).get("zero_grad")
        if own is None or isinstance(own, Exchanged):
            self._exchange(model, "zero_grad", _zero_grad(source), source.window)
        self._finalizer = weakref.finalize(source, _detach, self._modules, numbers, source.window)

    def _exchange(
        self, module: nn.Module, name: str, function: Callable[..., Any], window: Window
    ) -> None:
        object.__setattr__(module, name, Exchanged(module, name, function, window))
        self._modules.append(weakref.ref(module))

    def detach(self) -> None:
        """Give every layer and the model their own methods back."""
        self._finalizer()


def _zero_grad(source: Owner) -> Callable[..., None]:
    reference = weakref.ref(source)

    def zero_grad(self: nn.Module, set_to_none: bool = True) -> None:
        type(self).zero_grad(self, set_to_none)
        if (taken := reference()) is not None:
            taken.discard()

    return zero_grad


def _detach(
    modules: Sequence[weakref.ref[nn.Module]], numbers: Sequence[int], window: Window
) -> None:
    window.closed, window.stamp = True, CLOSED
    for number in numbers:
        del COVERS[number]
    for reference in modules:
        module = reference()
        for name in ("forward", "zero_grad") if module is not None else ():
            own = vars(module).get(name)
            if isinstance(own, Exchanged) and own.window is window:
                object.__delattr__(module, name)

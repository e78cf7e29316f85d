"""DPS Mix: DPS with mixout in the dense windows."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from sparse_optim.methods._dps import (
    DynamicParameterSelection,
    build_dps,
    linear_weights,
    sum_dtype,
)
from sparse_optim.methods._request import MethodRequest

# 1 - the share of 0.3 in the authors' script. Their code has one number for both; at a share of 1%
# it would multiply the changes of a weight by 100.
MIX_PROBABILITY = 0.7
LEAST_PENALIZED = 50  # steps of a window: shorter ones have no penalty in the authors' code


class DPSMix(DynamicParameterSelection):
    """DPS whose dense windows train under mixout (DPS Mix).

    In a dense window and in training mode, each Linear of `modules` computes with

        mixed = (kept * weight + (1 - kept) * pretrained - p * pretrained) / (1 - p)

    where kept, 0 or 1, is drawn with probability 1 - p for each input feature: all weights out of a
    neuron are replaced together. The expectation of `mixed` is `weight`. The window then ranks
    the entries by

        mean of g^2 over the steps that kept them * exp(-number of these steps / window)

    without the second factor in windows of fewer than 50 steps. Sparse windows and evaluation
    compute with `weight` itself.

    `kept` depends on seed, step and module alone, so that micro batches, processes and recomputed
    activations of one step have the same. g is the derivative with respect to `weight`; the
    authors' code leaves out its factor 1 / (1 - p). Their sparse windows also scale
    by 1 / (1 - p) what the window has changed, which the paper's description does not have.

    State beside that of DPS: the pretrained weights, and a counter for each input feature.

    Args:
        params, share, window, options: as for `DynamicParameterSelection`.
        modules: the Linear modules whose weights sparse windows restrict.
        p: probability of the pretrained value, at least 0 and below 1.
        seed: of the draws.

    Raises:
        ValueError: if a number is out of range.

    Reference: Lee et al. 2020, Mixout, ICLR, and github.com/bloodwass/mixout (the formula, a draw
        for each input feature); Zhang et al. 2022, NeurIPS 35, DPS Mix, and
        github.com/ZhangHaojie077/DPS (the score, its penalty, and p, which the paper leaves open).
    """

    def __init__(
        self,
        params: Any,
        modules: Iterable[nn.Linear],
        share: float,
        window: int,
        *,
        p: float = MIX_PROBABILITY,
        seed: int = 0,
        **options: Any,
    ) -> None:
        if not 0 <= p < 1:
            raise ValueError(f"p must be at least 0 and below 1, got {p}")
        held = tuple(modules)
        weights: dict[int, nn.Parameter] = {}
        for module in held:  # tied ones once
            weights[id(module.weight)] = cast(nn.Parameter, module.weight)
        super().__init__(params, weights.values(), share, window, **options)
        self.p, self.seed = p, seed
        self._pretrained = [weight.detach().clone() for weight in self.linear]
        self._mixed_in: set[int] = set()  # weights that a mixed forward pass of this step has used
        places = {key: index for index, key in enumerate(weights)}
        for module in held:
            _Mixout(self, places[id(module.weight)]).attach(module)

    @property
    def mixes(self) -> bool:
        """Whether the next step is of a dense window."""
        return bool(self.param_groups[0]["steps_taken"] % (2 * self.window) < self.window)

    def pretrained(self, index: int) -> Tensor:
        """The weight before training; a resumed run has it from its checkpoint."""
        found: Tensor = self.state[self.linear[index]].get("pretrained", self._pretrained[index])
        return found

    def kept(self, index: int) -> Tensor:
        """Which input features of a weight the next step keeps, (in_features,), bool."""
        weight = self.linear[index]
        draw = np.random.default_rng([self.seed, self.param_groups[0]["steps_taken"], index])
        return torch.from_numpy(draw.random(weight.shape[1]) >= self.p).to(weight.device)

    def _accumulate(self) -> None:
        super()._accumulate()
        for index, param in enumerate(self.linear):
            state = self.state[param]
            if not state:  # it has had no gradient yet
                continue
            state.setdefault("pretrained", self._pretrained[index])
            if "fisher" in state and param.grad is not None:
                zeros = param.new_zeros(param.shape[1], dtype=sum_dtype(param))
                counted = state.setdefault("kept_steps", zeros)
                counted += self.kept(index) if index in self._mixed_in else 1
        self._mixed_in.clear()

    def _score(self, param: nn.Parameter) -> Tensor:
        state = self.state[param]
        steps = state["kept_steps"]
        score: Tensor = state["fisher"] / steps.clamp(min=1)
        if self.window >= LEAST_PENALIZED:
            score = score * torch.exp(-steps / self.window)
        state["kept_steps"] = torch.zeros_like(steps)
        return score

    def note_mixed(self, index: int) -> None:
        """Note that a forward pass has used mixed values of a weight."""
        self._mixed_in.add(index)


class _Mixout:
    """Hooks of one Linear.

    With a column scale s = kept / (1 - p):  x mixed^T = (x s) weight^T + (x - x s) pretrained^T,
    so that the module computes the first product from x s, and the second one is added to its
    output. The module keeps its parameters and their names.
    """

    def __init__(self, optimizer: DPSMix, index: int) -> None:
        # Weakly: without its optimizer a model is the plain one again.
        self._optimizer: Callable[[], DPSMix | None] = weakref.ref(optimizer)
        self._index = index
        self._rest: Tensor | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Copied or pickled with its module it has no optimizer, which trains the original."""
        return {"_optimizer": _no_optimizer, "_index": self._index, "_rest": None}

    def attach(self, module: nn.Linear) -> None:
        """Register the hooks."""
        module.register_forward_pre_hook(self._scale_input, with_kwargs=True)
        module.register_forward_hook(self._add_pretrained)

    def _scale_input(
        self, module: nn.Module, inputs: tuple[Tensor, ...], named: dict[str, Tensor]
    ) -> Any:
        optimizer, self._rest = self._optimizer(), None
        if optimizer is None or not (module.training and optimizer.mixes):
            return None
        x = inputs[0] if inputs else named["input"]
        scale = optimizer.kept(self._index) / (1 - optimizer.p)
        scaled = x * scale.to(x.dtype)
        self._rest = x - scaled
        optimizer.note_mixed(self._index)
        return (scaled,), {}

    def _add_pretrained(self, module: nn.Module, inputs: Any, output: Tensor) -> Any:
        optimizer, rest = self._optimizer(), self._rest
        if rest is None or optimizer is None:
            return None
        self._rest = None
        return output + functional.linear(rest, optimizer.pretrained(self._index))


def _no_optimizer() -> DPSMix | None:
    return None


def dps_mix(request: MethodRequest) -> DPSMix:
    """`dps` with mixout in the dense windows, p = 0.7.

    Raises:
        ValueError: as `dps`.
    """
    weights = linear_weights(request)
    modules = [
        module
        for module in request.model.modules()
        if isinstance(module, nn.Linear) and id(module.weight) in weights
    ]
    return build_dps(request, DPSMix, modules, seed=request.seed)

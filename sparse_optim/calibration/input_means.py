"""The mean input of each connection: mu in the importance of Stochastic Tuning."""

from __future__ import annotations

import inspect
import sys
from typing import Any

import torch
from torch import Tensor, distributed, nn

# Of each weight: sum of its inputs, how many, and the weight's dimension that counts them.
Sums = dict[nn.Parameter, tuple[Tensor, Tensor, int]]


class InputMeans:
    """Record, for each weight of a linear layer, the mean of each input feature over a step.

        mean[j] = 1 / rows * sum_rows input[row, j]        float32, (in_features,)

    Rows are all positions of all inputs since the last `reset`: every sample, token and micro
    batch, and every call if a layer or a weight is used more than once. Padded positions do not
    count if the model is called with an `attention_mask` of shape (batch, length) and the layer's
    input is (batch, length, in_features); otherwise every row counts.

    The inputs of `nn.Linear` and transformers' `Conv1D` are recorded if the weight requires a
    gradient, while the model trains with gradients enabled and inside its forward (so that a
    recomputation by activation checkpointing counts no row twice). A weight that is also an
    embedding table is recorded as a linear layer's. Everything else (biases, norms, embeddings,
    layers that are not called as modules) has no entry: its factor is 1.

    Each process of a data-parallel run sees different rows. If torch.distributed runs, sums and
    counts are added up over all processes when they are first read after a forward pass (a
    collective: every process must read them), so that all processes rank alike.

    Args:
        model: the module that the training loop calls.

    Examples:
        >>> model = torch.nn.Linear(2, 3)
        >>> with InputMeans(model) as inputs:
        ...     _ = model(torch.tensor([[1.0, 2.0], [3.0, 6.0]]))
        ...     print(inputs.means["weight"])
        (tensor([2., 4.]), 1)

    Reference: Akbar-Tajari and Pilehvar, Stochastic Tuning, section 2.2 and footnote 4.
    """

    def __repr__(self) -> str:  # part of a delta's note, which must not name an address
        return "InputMeans()"

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._arguments = list(inspect.signature(model.forward).parameters)
        self._recording = False
        self._mask: Tensor | None = None
        self._sums: Sums = {}
        self._totals: Sums | None = None  # of all processes; None until they are read
        self._handles = [
            model.register_forward_pre_hook(self._enter, with_kwargs=True, prepend=True),
            model.register_forward_hook(self._leave, always_call=True),
        ]
        for module in model.modules():
            if input_dim(module) is not None:
                self._handles.append(module.register_forward_pre_hook(self._record))

    @property
    def means(self) -> dict[str, tuple[Tensor, int]]:
        """Parameter name -> (mean input, float32 (in_features,); the weight's dimension of it)."""
        found = {name: self.get(name) for name, _ in self._model.named_parameters()}
        return {name: mean for name, mean in found.items() if mean is not None}

    def get(self, name: str) -> tuple[Tensor, int] | None:
        """The entry of `means` for one parameter; None if the factor is 1."""
        if self._totals is None:
            self._totals = self._added_up()
        param = self._model.get_parameter(name)
        if param not in self._totals:
            return None
        total, count, dim = self._totals[param]
        return total / count.clamp(min=1), dim

    def reset(self) -> None:
        """Discard what was recorded, for a new step."""
        self._sums.clear()
        self._totals = None

    def remove(self) -> None:
        """Remove all hooks from the model; the means stay readable."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def __enter__(self) -> InputMeans:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def _enter(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # Decided here, once: reentrant checkpointing runs its layers without gradients at first.
        self._recording = model.training and torch.is_grad_enabled()
        given = {**dict(zip(self._arguments, args, strict=False)), **kwargs}
        mask = given.get("attention_mask")
        self._mask = mask != 0 if isinstance(mask, Tensor) and mask.ndim == 2 else None

    @torch.no_grad()
    def _added_up(self) -> Sums:
        """Sums and counts of all processes, in the model's order."""
        started = distributed.is_available() and distributed.is_initialized()
        if not started or distributed.get_world_size() == 1:
            return self._sums
        dims = {
            module.weight: dim
            for module in self._model.modules()
            if (dim := input_dim(module)) is not None and isinstance(module.weight, nn.Parameter)
        }
        own = (
            self._sums.get(weight, (weight.new_zeros(weight.size(dim)), weight.new_zeros(()), dim))
            for weight, dim in dims.items()
        )
        # float64: counts stay exact.
        flat = torch.cat(
            [torch.hstack((total.double(), count.double())) for total, count, _ in own]
        )
        distributed.all_reduce(flat)
        ends = flat.split([weight.size(dim) + 1 for weight, dim in dims.items()])
        return {
            weight: (end[:-1].float(), end[-1], dim)
            for (weight, dim), end in zip(dims.items(), ends, strict=True)
            if bool(end[-1] > 0)
        }

    def _leave(self, *_: object) -> None:
        self._recording, self._mask = False, None

    @torch.no_grad()
    def _record(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        weight, dim = module.weight, input_dim(module)
        if not isinstance(weight, nn.Parameter) or dim is None or not args:
            return
        if not (self._recording and weight.requires_grad):
            return
        inputs = args[0].detach()
        rows = inputs.shape[:-1]
        if self._mask is not None and rows == self._mask.shape:
            count = self._mask.sum()
            inputs = inputs.masked_fill(~self._mask.unsqueeze(-1), 0)
        else:
            count = torch.full((), rows.numel(), device=inputs.device)
        total = inputs.reshape(-1, inputs.shape[-1]).sum(0, dtype=torch.float32)
        self._totals = None
        if weight in self._sums:
            past_total, past_count, _ = self._sums[weight]
            total, count = total + past_total, count + past_count
        self._sums[weight] = total, count, dim


def input_dim(module: nn.Module) -> int | None:
    """The dimension of a linear layer's weight that belongs to its input; None for other modules.

    1 for `nn.Linear` (out, in), 0 for transformers' `Conv1D` (in, out).
    """
    if isinstance(module, nn.Linear):
        return 1
    loaded = sys.modules.get("transformers.pytorch_utils")  # a model with a Conv1D has loaded it
    return 0 if loaded is not None and isinstance(module, loaded.Conv1D) else None

"""Wanda: how much flows through a connection, from forward passes alone."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from sparse_optim.calibration._batches import on_device
from sparse_optim.calibration._session import calibrating, check_finite
from sparse_optim.calibration.input_means import input_dim


def wanda(
    model: nn.Module, batches: Iterable[Any], *, params: Collection[str] | None = None
) -> dict[str, Tensor]:
    """Size of a connection times the norm of what enters it.

        score = |theta| * sqrt(sum_rows input^2)

    Rows are all tokens of all batches, without those that the batch's `attention_mask` of shape
    (batch, length) leaves out. Only weights of Linear and Conv1D modules have a score.

    Args:
        model: called as `model(**batch)`, in evaluation mode and without gradients.
        batches: dicts of arguments.
        params: names of weights to score; default all weights of such modules that require
            gradients.

    Returns:
        As `fisher`.

    Raises:
        ValueError: a name in `params` that is no such weight, or a module that was not called.

    Reference: Sun et al. 2023, A Simple and Effective Pruning Approach for Large Language Models
    (arXiv:2306.11695), equation 1.
    """
    with calibrating(model, params) as chosen, torch.no_grad():
        inputs = SquaredInputs(model, {id(param) for param in chosen.values()})
        try:
            for batch in on_device(batches, next(iter(chosen.values())).device):
                inputs.call(batch)
        finally:
            inputs.remove()
        if params is None:
            chosen = {name: param for name, param in chosen.items() if id(param) in inputs.found}
        scores = {}
        for name, param in chosen.items():
            if id(param) not in inputs.found:
                raise ValueError(
                    f"wanda: {name} is not the weight of a Linear module that was called"
                )
            total, dim = inputs.found[id(param)]
            norms = total.sqrt()
            scores[name] = param.float().abs() * (norms if dim == 1 else norms.unsqueeze(1))
    return check_finite(scores)


class SquaredInputs:
    """Sums of squares of the inputs of linear modules, by the `id` of the weight."""

    def __init__(self, model: nn.Module, weights: Collection[int]) -> None:
        self.model = model
        self.found: dict[int, tuple[Tensor, int]] = {}
        self._mask: Tensor | None = None
        self._handles = [
            module.register_forward_pre_hook(self._add)
            for module in model.modules()
            if input_dim(module) is not None and id(module.weight) in weights
        ]

    def call(self, batch: dict[str, Tensor]) -> None:
        """Call the model with a batch."""
        mask = batch.get("attention_mask")
        self._mask = mask.bool() if mask is not None and mask.ndim == 2 else None
        self.model(**batch)

    def remove(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()

    def _add(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        weight, dim, rows = module.weight, input_dim(module), args[0].detach()
        if self._mask is not None and rows.shape[:-1] == self._mask.shape:
            rows = rows[self._mask]
        total = rows.reshape(-1, rows.shape[-1]).float().square().sum(0)
        if id(weight) in self.found:
            total = total + self.found[id(weight)][0]
        assert dim is not None
        self.found[id(weight)] = total, dim

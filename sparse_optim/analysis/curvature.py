"""How steep the loss is along the entries of a mask, and the learning rate that follows."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from sparse_optim.calibration._batches import on_device
from sparse_optim.calibration._scores import loss_of
from sparse_optim.calibration._session import calibrating

Loss = Callable[[nn.Module, Any], Tensor]
Vector = dict[str, Tensor]  # one value for each entry of the mask
Derive = Callable[[Sequence[Tensor | None]], Sequence[Tensor | None]]


@dataclass(frozen=True)
class Curvature:
    """The loss near the present parameters, as a function of the entries of a mask.

    Attributes:
        entries: size of the mask.
        slope: sum |g|, of the gradient g of a batch's loss: the mean over the batches.
        sign_curvature: s^T H s, s = sign(g) on the mask, H the Hessian of the same batch's loss:
            the mean over the batches.
        sharpness: largest eigenvalue, by magnitude, of the Hessian of the mean loss, restricted to
            the mask.
    """

    entries: int
    slope: float
    sign_curvature: float
    sharpness: float

    @property
    def lr(self) -> float | None:
        """The rate of AdamW at which a first step goes farthest down; None where none is known.

            loss(theta - lr s) = loss - lr slope + lr^2 / 2 sign_curvature,  lowest at
            lr = slope / sign_curvature

        AdamW's first step moves every entry by lr against the sign of the batch's gradient. Signs
        of a mean gradient over batches would tell less: along them the curvature of some batches
        is negative. Without an upward curvature there is no lowest point.
        """
        return self.slope / self.sign_curvature if self.sign_curvature > 0 else None


@dataclass(frozen=True)
class Crowding:
    """How many entries of a mask share a row, or a column, with one of them: means over entries.

    In a random mask they are few. A mask that fills a block has many, so that its update is nearly
    of low rank, and steep.
    """

    row: float
    column: float
    empty_rows: int
    empty_columns: int


def curvature(
    model: nn.Module,
    batches: Iterable[Any],
    mask: Mapping[str, Tensor],
    *,
    loss: Loss | None = None,
    iterations: int = 10,
) -> Curvature:
    """Measure slope and curvature on the entries of a mask, before training.

    Takes (iterations + 1) products of the Hessian with a vector for each batch, each about two
    forward and backward passes, in evaluation mode. The model is left unchanged.

    Args:
        model: any module; for transformers models, batches are dicts that hold `labels`.
        batches: kept, and read again for each product: a few are enough.
        mask: parameter name -> (number of entries,), int64 flat positions, as
            `MaskedAdamW.active_entries` returns them.
        loss: loss(model, batch) -> 0-dim tensor; default `model(**batch).loss`.
        iterations: of the power method, which finds `sharpness`; 0: it is NaN.

    Raises:
        ValueError: no data, an empty mask, a name that the model does not have, no loss.

    Reference: rates and curvature of random masks: Xu and Zhang 2024, ICML (arXiv:2405.02596).
    """
    with calibrating(model, list(mask)) as params, sdpa_kernel(SDPBackend.MATH):
        kept = list(on_device(batches, next(iter(params.values())).device))
        entries = {name: mask[name].to(param.device) for name, param in params.items()}
        problem = _Restricted(model, params, entries, kept, loss)
        if problem.size == 0:
            raise ValueError("mask: it has no entry")
        slopes, curvatures = [], []
        for batch in kept:
            grad = problem.gradient([batch])
            signs = {name: part.sign() for name, part in grad.items()}
            slopes.append(_dot(grad, signs))
            curvatures.append(_dot(signs, problem.product(signs, [batch])))
        sharpness = problem.largest_eigenvalue(iterations)
    return Curvature(problem.size, fmean(slopes), fmean(curvatures), sharpness)


class _Restricted:
    """The mean loss over batches as a function of the entries of a mask."""

    def __init__(
        self,
        model: nn.Module,
        params: dict[str, nn.Parameter],
        entries: dict[str, Tensor],
        batches: list[Any],
        loss: Loss | None,
    ) -> None:
        self.model, self.params, self.entries = model, params, entries
        self.batches, self.loss = batches, loss
        self.size = sum(positions.numel() for positions in entries.values())

    def gradient(self, batches: list[Any]) -> Vector:
        return self._mean(batches, lambda grads: grads)

    def product(self, vector: Vector, batches: list[Any]) -> Vector:
        """H v, restricted to the mask."""

        def derive(grads: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
            terms = [
                (self._taken(name, grad) * vector[name]).sum()
                for name, grad in zip(self.params, grads, strict=True)
                if grad is not None and grad.requires_grad  # else its Hessian is 0
            ]
            if not terms:
                return [None] * len(self.params)
            along = torch.stack(terms).sum()
            return torch.autograd.grad(along, list(self.params.values()), allow_unused=True)

        return self._mean(batches, derive, create_graph=True)

    def largest_eigenvalue(self, iterations: int) -> float:
        """The power method, from a fixed random vector."""
        generator = torch.Generator().manual_seed(0)
        vector = {
            name: torch.randn(positions.numel(), generator=generator).to(positions.device)
            for name, positions in self.entries.items()
        }
        found = math.nan
        for _ in range(iterations):
            length = math.sqrt(_dot(vector, vector))
            if length == 0:
                return 0.0
            vector = {name: part / length for name, part in vector.items()}
            image = self.product(vector, self.batches)
            found, vector = _dot(vector, image), image
        return found

    def _mean(self, batches: list[Any], derive: Derive, create_graph: bool = False) -> Vector:
        """The mean over batches of what `derive` makes of the gradients, on the mask."""
        total = {
            name: torch.zeros(positions.numel(), device=positions.device)
            for name, positions in self.entries.items()
        }
        for batch in batches:
            value = loss_of(self.model, batch, self.loss)
            grads = torch.autograd.grad(
                value, list(self.params.values()), create_graph=create_graph, allow_unused=True
            )
            for name, found in zip(self.params, derive(grads), strict=True):
                if found is not None:
                    total[name] += self._taken(name, found).detach()
        return {name: part / len(batches) for name, part in total.items()}

    def _taken(self, name: str, grad: Tensor) -> Tensor:
        return grad.reshape(-1)[self.entries[name]].float()


def _dot(first: Vector, second: Vector) -> float:
    return sum(
        float((part * second[name]).sum(dtype=torch.float64)) for name, part in first.items()
    )


def crowding(shapes: Mapping[str, tuple[int, int]], mask: Mapping[str, Tensor]) -> Crowding:
    """How a mask crowds into rows and columns of the matrices.

    Args:
        shapes: (rows, columns) of the matrices to look at, by name.
        mask: as for `curvature`; other names are left out.

    Example:
        >>> block = torch.tensor([0, 1, 4, 5])  # a corner of 2 x 2
        >>> crowding({"weight": (3, 4)}, {"weight": block})
        Crowding(row=2.0, column=2.0, empty_rows=1, empty_columns=2)
    """
    entries = empty_rows = empty_columns = 0
    in_rows = in_columns = 0.0
    for name, (rows, columns) in shapes.items():
        positions = mask.get(name, torch.empty(0, dtype=torch.int64))
        per_row = torch.bincount(positions // columns, minlength=rows).double()
        per_column = torch.bincount(positions % columns, minlength=columns).double()
        entries += positions.numel()
        in_rows += float(per_row.square().sum())  # each entry of a row counts all of them
        in_columns += float(per_column.square().sum())
        empty_rows += int((per_row == 0).sum())
        empty_columns += int((per_column == 0).sum())
    if entries == 0:
        return Crowding(0.0, 0.0, empty_rows, empty_columns)
    return Crowding(in_rows / entries, in_columns / entries, empty_rows, empty_columns)

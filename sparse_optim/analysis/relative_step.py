"""How far a first step moves the weights of a mask, in spectral norms, and the rate that follows.

AdamW's first step moves every active entry by lr against the sign of its gradient: a weight W
changes by lr S, S = sign(g) on the mask, 0 elsewhere. What that does to the features behind W is
bounded by the largest singular value of S, relative to that of W. In a random mask the signs hardly
add up; entries that crowd into rows and columns, as those of the largest gradients do, add up to a
large singular value, and so do the signs of a whole gradient, which is nearly of low rank.

The tuned rates of dense training, random masks, PaFi and ID3 on MiniLM differ by a factor of a
hundred; the relative step at them differs by a factor of 2.5 on three tasks of 300 steps. A LoRA
needs twice that step. Longer runs need smaller ones: from 300 to 1,000 steps the best rates of
dense training, a random mask and ID3 halve, as 1 / sqrt(steps) has it: see docs/learning-rates.md.

References: the spectral norm of updates relative to that of weights as what should stay constant:
Yang, Simon and Bernstein 2023 (arXiv:2310.17813); larger rates of random masks: Xu and Zhang 2024,
ICML (arXiv:2405.02596).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn

from sparse_optim.calibration._batches import on_device
from sparse_optim.calibration._scores import Loss, loss_of
from sparse_optim.calibration._session import calibrating
from sparse_optim.optim.param_groups import linear_weights

# The relative step at the tuned rates: 0.7% to 1.7% (15 pairs of a method and a task), and 1.4% to
# 2.7% of weights that a LoRA of rank 3 adapts (3 tasks).
BEST_STEP, BEST_LORA_STEP = 0.0105, 0.0215

USUAL_STEPS = 300  # of those runs

ITERATIONS = 15  # of the power method: within a few per cent, from below


@dataclass(frozen=True)
class RelativeStep:
    """A first step of AdamW at a rate of 1.

    Attributes:
        matrices: number of weights that move.
        size: |S| / |W| in spectral norms, the mean over matrices and batches.
        lr: the rate at which the step has the size that it has at tuned rates, in runs of up to 300
            steps.
    """

    matrices: int
    size: float
    lr: float

    def lr_for(self, steps: int) -> float:
        """The rate for a run of as many optimizer steps."""
        return self.lr * length_factor(steps)


def length_factor(steps: int) -> float:
    """What a run of as many steps multiplies the rate of a run of 300 by: min(1, sqrt(300/steps)).

    Examples:
        >>> length_factor(100), length_factor(1200)
        (1.0, 0.5)
    """
    return math.sqrt(USUAL_STEPS / max(steps, USUAL_STEPS))


def relative_step(
    model: nn.Module,
    batches: Iterable[Any],
    mask: Mapping[str, Tensor],
    *,
    loss: Loss | None = None,
) -> RelativeStep | None:
    """Measure a first step on the entries of a mask, before training.

    Takes a forward and a backward pass for each batch, in evaluation mode. The model is left
    unchanged. Weights of Linear modules count, as `linear_weights` finds them; of a LoRA the weight
    that it adapts, which changes by scale (S_B A + B S_A).

    Args:
        model: any module; for transformers models, batches are dicts that hold `labels`.
        batches: a few are enough.
        mask: parameter name -> (number of entries,), int64 flat positions, as
            `MaskedAdamW.active_entries` returns them.
        loss: loss(model, batch) -> 0-dim tensor; default `model(**batch).loss`.

    Returns:
        None if no such weight moves: a mask of biases or of embeddings alone.
    """
    found: list[float] = []
    to_best: list[float] = []  # the same, relative to the step of tuned rates
    sizes: dict[str, float] = {}  # of the weights, which do not change
    with calibrating(model, list(mask)) as params:
        for batch in on_device(batches, next(iter(params.values())).device):
            value = loss_of(model, batch, loss)
            grads = torch.autograd.grad(value, list(params.values()), allow_unused=True)
            signs = {
                name: _signs(grad, mask[name])
                for name, grad in zip(params, grads, strict=True)
                if grad is not None and mask[name].numel()
            }
            for name, (step, weight) in _steps(model, params, signs).items():
                if name not in sizes:
                    sizes[name] = spectral_norm(weight)
                if sizes[name] > 0:
                    found.append(spectral_norm(step) / sizes[name])
                    best = BEST_STEP if name in params else BEST_LORA_STEP
                    to_best.append(found[-1] / best)
    if not found or not fmean(found):
        return None
    matrices = sum(size > 0 for size in sizes.values())
    return RelativeStep(matrices, fmean(found), 1 / fmean(to_best))


def spectral_norm(matrix: Tensor) -> float:
    """The largest singular value, by the power method from a fixed vector."""
    matrix = matrix.detach().float()
    generator = torch.Generator().manual_seed(0)
    vector = torch.randn(matrix.shape[1], generator=generator).to(matrix.device)
    size = 0.0
    for _ in range(ITERATIONS):
        image = matrix @ (vector / vector.norm().clamp_min(1e-30))
        vector = matrix.T @ (image / image.norm().clamp_min(1e-30))
        size = float(vector.norm())
    return size


def _signs(grad: Tensor, positions: Tensor) -> Tensor:
    chosen = positions.to(grad.device)
    signs = torch.zeros(grad.numel(), dtype=grad.dtype, device=grad.device)
    signs[chosen] = grad.reshape(-1)[chosen].sign()
    return signs.view(grad.shape)  # whatever the strides of the gradient are


def _steps(
    model: nn.Module, params: Mapping[str, nn.Parameter], signs: Mapping[str, Tensor]
) -> dict[str, tuple[Tensor, Tensor]]:
    """By name of a weight: the step of rate 1, and the weight."""
    by_id = {id(params[name]): sign for name, sign in signs.items()}
    steps: dict[str, tuple[Tensor, Tensor]] = {}
    factors: set[int] = set()
    for name, module in model.named_modules():
        of_peft: Any = module
        if not isinstance(getattr(of_peft, "lora_A", None), nn.ModuleDict):
            continue
        for key in of_peft.lora_A:
            factors |= {id(of_peft.lora_A[key].weight), id(of_peft.lora_B[key].weight)}
            step = _adapted(of_peft, key, by_id)
            if step is not None:
                steps[f"{name}.{key}"] = step, of_peft.get_base_layer().weight
    weights = linear_weights(model) - factors
    for name, sign in signs.items():
        if id(params[name]) in weights:
            steps[name] = sign, params[name]
    return steps


def _adapted(module: Any, key: str, signs: Mapping[int, Tensor]) -> Tensor | None:
    """The step of the weight that one LoRA of peft adapts; None if neither factor moves."""
    a, b = module.lora_A[key].weight.detach().float(), module.lora_B[key].weight.detach().float()
    of_a = signs.get(id(module.lora_A[key].weight))
    of_b = signs.get(id(module.lora_B[key].weight))
    if of_a is None and of_b is None:
        return None
    step = torch.zeros(b.shape[0], a.shape[1], device=a.device)
    if of_b is not None:
        step += of_b.float() @ a
    if of_a is not None:
        step += b @ of_a.float()
    return step * float(module.scaling[key])

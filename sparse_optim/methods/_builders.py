"""One function for each method: a request becomes an optimizer.

What the sources leave open, and what is done here, stands in each docstring.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from sparse_optim.activations import InputMeans
from sparse_optim.calibration import child_tuning_d, fisher
from sparse_optim.importance import D3, ActivationWeightGradient, Magnitude, Random, Scores, Snip
from sparse_optim.methods._request import (
    MethodRequest,
    dense_adamw,
    masked_adamw,
)
from sparse_optim.optimizer import MaskedAdamW
from sparse_optim.selection import Increment, Repeat, Selection, Static, Stochastic, resolve_budget

FISHER_SAMPLES = 1024  # of the Fish mask paper


def id3(request: MethodRequest) -> MaskedAdamW:
    """D3 importance, the budget unmasked step by step (Agarwal et al. 2025, Algorithm 1)."""
    steps = request.total_steps
    unmask_steps = max(1, round(steps * request.unmask_share))
    selection = Increment(_budget(request), steps, request.schedule, unmask_steps)
    return masked_adamw(request, D3(request.d3_exp, request.d3_eps), selection)


def static_d3(request: MethodRequest) -> MaskedAdamW:
    """D3 importance, the whole budget at the first step (Agarwal et al. 2025, section 3)."""
    return masked_adamw(request, D3(request.d3_exp, request.d3_eps), Static(_budget(request)))


def repeat_d3(request: MethodRequest) -> MaskedAdamW:
    """D3 importance, a fresh set at each step (Agarwal et al. 2025, section 6).

    The paper does not say what becomes of the moments of entries that leave: here they are lost.
    """
    return masked_adamw(request, D3(request.d3_exp, request.d3_eps), Repeat(_budget(request)))


def r_mask(request: MethodRequest) -> MaskedAdamW:
    """A random mask, drawn once (Agarwal et al. 2025, section 4)."""
    return masked_adamw(request, Random(request.seed), Static(_budget(request)))


def random_tuning(request: MethodRequest) -> MaskedAdamW:
    """A random mask, drawn anew at each step (the baseline of Stochastic Tuning)."""
    return masked_adamw(request, Random(request.seed), Repeat(_bias_budget(request)))


def pafi(request: MethodRequest) -> MaskedAdamW:
    """The entries of smallest magnitude, data-free (PaFi, Liao et al. 2023)."""
    return masked_adamw(request, Magnitude(), Static(_budget(request)))


def fish(request: MethodRequest) -> MaskedAdamW:
    """The entries of greatest empirical Fisher information (Fish mask, Sung et al. 2021).

    True labels, batch size 1, 1024 samples, as in the paper's runs.
    """
    names = [name for name, _ in request.ranked]
    scores = fisher(request.model, _calibration(request), samples=FISHER_SAMPLES, params=names)
    return masked_adamw(request, _some(scores, request), Static(_budget(request)))


def child_tuning(request: MethodRequest) -> MaskedAdamW:
    """Fisher information of batch gradients, one mask (Child-Tuning-D, Xu et al. 2021).

    Batches of the calibration data, all of them, once.
    """
    names = [name for name, _ in request.ranked]
    scores = child_tuning_d(request.model, _calibration(request), params=names)
    return masked_adamw(request, _some(scores, request), Static(_budget(request)))


def sparse_adapter(request: MethodRequest) -> MaskedAdamW:
    """SNIP on an adapter's entries (SparseAdapter, He et al. 2022): |grad * param|, one mask.

    Scored by the first training step's gradient. Pruned entries keep their value; in the paper
    they are set to zero. Not for a fresh LoRA: B is zero, hence A's gradient, hence every score.
    """
    return masked_adamw(request, Snip(), Static(_budget(request)))


def stochastic_tuning(request: MethodRequest) -> MaskedAdamW:
    """A fresh sample of connections at each step (Akbar-Tajari and Pilehvar, Algorithm 1).

    Budget of its own: as many entries as BitFit would train. AdamW eps 1e-6. Left open there and
    decided here: mu is 1 for biases and embeddings, padding does not count, and entries that are
    not drawn lose their moments.
    """
    return _connections(request, Stochastic(_bias_budget(request), request.seed))


def top_tuning(request: MethodRequest) -> MaskedAdamW:
    """The deterministic top of Stochastic Tuning's score, anew at each step (its ablation)."""
    return _connections(request, Repeat(_bias_budget(request)))


def bitfit(request: MethodRequest) -> torch.optim.Optimizer:
    """Bias terms alone (BitFit, Ben Zaken et al. 2022): names that end in "bias".

    Raises:
        ValueError: the model has none.
    """
    return _structural(request, _biases(request), "BitFit", "no parameter's name ends in 'bias'")


def multi_head(request: MethodRequest) -> torch.optim.Optimizer:
    """Attention modules alone: names with a part that contains "attention" or is "attn".

    Raises:
        ValueError: the model has none.
    """
    chosen = [item for item in request.ranked if _in_attention(item[0])]
    return _structural(request, chosen, "multi-head", "no parameter's name speaks of attention")


def full(request: MethodRequest) -> torch.optim.Optimizer:
    """torch's fused AdamW on every entry."""
    return dense_adamw(request, request.named)


def frozen(request: MethodRequest) -> torch.optim.Optimizer:
    """torch's fused AdamW on the fresh head alone.

    Raises:
        ValueError: the model has no fresh parameters.
    """
    if not request.fresh:
        raise ValueError(
            "method 'frozen' trains only a fresh head, and this model has none; use id3 or full"
        )
    return dense_adamw(request, [item for item in request.named if item[0] in request.fresh])


def _budget(request: MethodRequest) -> int | float:
    if request.budget is None:
        raise ValueError("this method needs a budget: entries (int) or a share (float)")
    return request.budget


def _biases(request: MethodRequest) -> list[tuple[str, nn.Parameter]]:
    return [(name, param) for name, param in request.ranked if name.endswith("bias")]


def _bias_budget(request: MethodRequest) -> int | float:
    """The budget given, else as many entries as BitFit trains."""
    if request.budget is not None:
        return request.budget
    entries = sum(param.numel() for _, param in _biases(request))
    if entries == 0:
        raise ValueError("the model has no biases to size the budget by: give a budget")
    return entries


def _in_attention(name: str) -> bool:
    return any("attention" in part or part in ("attn", "self_attn") for part in name.split("."))


def _structural(
    request: MethodRequest, chosen: list[tuple[str, nn.Parameter]], who: str, why: str
) -> torch.optim.Optimizer:
    if not chosen:
        raise ValueError(f"{who} has nothing to train: {why}; use id3, or full")
    fresh = [item for item in request.named if item[0] in request.fresh]
    return dense_adamw(request, chosen + fresh)


def _connections(request: MethodRequest, selection: Selection) -> MaskedAdamW:
    inputs = InputMeans(request.model)
    optimizer = masked_adamw(request, ActivationWeightGradient(inputs), selection)
    optimizer.register_step_post_hook(lambda *_: inputs.reset())
    return optimizer


def _calibration(request: MethodRequest) -> Iterable[Any]:
    if request.calibration is None:
        raise ValueError(
            "this method scores entries before the first step: give calibration=, a function that "
            "returns batches with labels (lambda: dataloader)"
        )
    return request.calibration()


def _some(scores: dict[str, Tensor], request: MethodRequest) -> Scores:
    """The scores, with a warning where fewer entries than the budget score above zero."""
    found = sum(int((score > 0).sum()) for score in scores.values())
    wanted = resolve_budget(_budget(request), sum(score.numel() for score in scores.values()))
    if found < wanted:
        warnings.warn(
            f"only {found} entries score above zero, the budget is {wanted}: give more "
            "calibration data, or a smaller budget",
            UserWarning,
            stacklevel=3,
        )
    return Scores(scores)

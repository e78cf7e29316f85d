"""One function for each method (see also `_calibrated`): a request becomes an optimizer.

Each docstring says what its source leaves open and what we chose.
"""

from __future__ import annotations

import torch
from torch import nn

from sparse_optim.calibration.input_means import InputMeans
from sparse_optim.methods._request import MethodRequest, dense_adamw, masked_adamw, samples
from sparse_optim.optim.masked_adamw import MaskedAdamW
from sparse_optim.policy.defaults import default_every
from sparse_optim.policy.importance import D3, ActivationWeightGradient, Magnitude, Random
from sparse_optim.policy.selection import Increment, Repeat, Selection, Static, Stochastic, steps_of


def id3(request: MethodRequest) -> MaskedAdamW:
    """D3 importance, the budget unmasked step by step (Agarwal et al. 2025, Algorithm 1)."""
    share = float(request.unmask_share)
    unmask_steps = steps_of(share, request.total_steps)
    selection = Increment(
        request.given_budget,
        request.total_steps,
        request.schedule,
        share,
        request.every or default_every(unmask_steps, samples(request)),
    )
    return masked_adamw(request, D3(request.d3_exp, request.d3_eps), selection)


def static_d3(request: MethodRequest) -> MaskedAdamW:
    """D3 importance, the whole budget at the first step (Agarwal et al. 2025, section 3)."""
    return masked_adamw(request, D3(request.d3_exp, request.d3_eps), Static(request.given_budget))


def repeat_d3(request: MethodRequest) -> MaskedAdamW:
    """D3 importance, a new set at each step (Agarwal et al. 2025, section 6).

    The paper does not say what happens to the moments of entries that leave: here they are lost.
    """
    return masked_adamw(request, D3(request.d3_exp, request.d3_eps), Repeat(request.given_budget))


def r_mask(request: MethodRequest) -> MaskedAdamW:
    """A random mask, drawn once (Agarwal et al. 2025, section 4)."""
    return masked_adamw(request, Random(request.seed), Static(request.given_budget))


def random_tuning(request: MethodRequest) -> MaskedAdamW:
    """A new random mask at each step (the baseline of Stochastic Tuning)."""
    return masked_adamw(request, Random(request.seed), Repeat(_bias_budget(request)))


def pafi(request: MethodRequest) -> MaskedAdamW:
    """The entries of smallest magnitude, data-free (PaFi, Liao et al. 2023)."""
    return masked_adamw(request, Magnitude(), Static(request.given_budget))


def stochastic_tuning(request: MethodRequest) -> MaskedAdamW:
    """A new sample of connections at each step (Akbar-Tajari and Pilehvar, Algorithm 1).

    Default budget: the number of entries that BitFit would train. AdamW eps 1e-6. Left open there,
    decided here: mu is 1 for biases and embeddings, padding does not count, and entries that are
    not drawn lose their moments.
    """
    return _connections(request, Stochastic(_bias_budget(request), request.seed))


def top_tuning(request: MethodRequest) -> MaskedAdamW:
    """The entries with the highest score of Stochastic Tuning at each step (its ablation)."""
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
    chosen = [
        item for item in request.named if _in_attention(item[0]) and item[0] not in request.fresh
    ]
    return _structural(request, chosen, "multi-head", "no parameter's name contains 'attention'")


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


def _biases(request: MethodRequest) -> list[tuple[str, nn.Parameter]]:
    fresh = request.fresh
    return [item for item in request.named if item[0].endswith("bias") and item[0] not in fresh]


def _bias_budget(request: MethodRequest) -> int | float:
    """The given budget, else the number of entries that BitFit trains."""
    if request.budget is not None:
        return request.budget
    entries = sum(param.numel() for _, param in _biases(request))
    if entries == 0:
        raise ValueError("the model has no biases, which set the default budget: give a budget")
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

"""Methods that choose a mask once, by scores of a calibration pass or a pruning method."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from sparse_optim.calibration import child_tuning_d, fisher, grasp, synflow
from sparse_optim.integrations.adapters import adapter_parameters
from sparse_optim.methods._request import MethodRequest, masked_adamw
from sparse_optim.optim.masked_adamw import MaskedAdamW
from sparse_optim.policy.importance import Importance, Random, Scores, Snip, zero_matrices
from sparse_optim.policy.selection import Static, resolve_budget
from sparse_optim.warn import warn_user

FISHER_SAMPLES = 1024  # as in the Fish mask paper

# Number of tokens in SynFlow's input of ones: with a single token, attention has nothing to weigh,
# and queries and keys would score 0.
SYNFLOW_TOKENS = 8


def fish(request: MethodRequest) -> MaskedAdamW:
    """The entries with the largest empirical Fisher information (Fish mask, Sung et al. 2021).

    True labels, batch size 1, 1024 samples, as in the paper's runs.
    """
    scores = fisher(
        request.model, calibration_of(request), samples=FISHER_SAMPLES, params=_names(request)
    )
    return masked_adamw(request, _some(scores, request), Static(request.given_budget))


def child_tuning(request: MethodRequest) -> MaskedAdamW:
    """Fisher information of batch gradients, one mask (Child-Tuning-D, Xu et al. 2021).

    Batches of the calibration data, all of them, once.
    """
    scores = child_tuning_d(request.model, calibration_of(request), params=_names(request))
    return masked_adamw(request, _some(scores, request), Static(request.given_budget))


def sparse_adapter(request: MethodRequest) -> MaskedAdamW:
    """A pruning score of a fresh adapter's entries, one mask (SparseAdapter, He et al. 2022).

        rand      random
        mag       |theta|, the largest are kept: the opposite of PaFi
        snip      |g theta|, of the first training step's gradient
        grasp     max((H g) theta, 0), of the first batch of the calibration data
        synflow   |theta dR/d|theta||, R = sum(logits for an input of ones, under |theta|)

    All entries of the adapter compete (the paper's global scope). Pruned entries keep their value;
    the paper sets them to zero, as `integrations.zero_inactive_` does.

    Raises:
        ValueError: an unknown score; a freshly initialised LoRA with any score but rand, because B
            is all zeros: no score takes its entries, and while it is zero A has no gradient;
            synflow with a model that is not called like a transformers model.
    """
    if request.sparse_score not in SPARSE_SCORES:
        known = ", ".join(SPARSE_SCORES)
        raise ValueError(f"unknown sparse_score {request.sparse_score!r}; known: {known}")
    adapter = adapter_parameters(request.model)
    zero = zero_matrices([item for item in request.ranked if item[0] in adapter])
    if zero and request.sparse_score != "rand":
        raise ValueError(
            f"{zero[0]} is all zeros (a fresh LoRA B): {request.sparse_score} is a multiple of the "
            "parameter, so it would never take its entries, and A would get no gradient: use a "
            "bottleneck (Pfeiffer) adapter, the score rand, or a method that ranks by the gradient "
            "(id3)"
        )
    importance = SPARSE_SCORES[request.sparse_score](request)
    return masked_adamw(request, importance, Static(request.given_budget))


def _magnitude(request: MethodRequest) -> Importance:
    return _some({name: param.detach().float().abs() for name, param in request.ranked}, request)


def _grasp(request: MethodRequest) -> Importance:
    batch = islice(calibration_of(request), 1)
    return _some(grasp(request.model, batch, params=_names(request)), request)


def _synflow(request: MethodRequest) -> Importance:
    return _some(synflow(request.model, _logits_of_ones, params=_names(request)), request)


SPARSE_SCORES: dict[str, Callable[[MethodRequest], Importance]] = {
    "rand": lambda request: Random(request.seed),
    "mag": _magnitude,
    "snip": lambda request: Snip(),
    "grasp": _grasp,
    "synflow": _synflow,
}


def _logits_of_ones(model: nn.Module) -> Tensor:
    """The logits of a transformers model for embeddings that are all ones."""
    find: Any = getattr(model, "get_input_embeddings", None)
    if find is None:
        raise ValueError(
            "synflow puts ones in the place of a transformers model's embeddings, and "
            f"{type(model).__name__} has no get_input_embeddings: give "
            "Scores(calibration.synflow(model, forward)) to MaskedAdamW"
        )
    embeddings = find()
    # Not inputs_embeds: not every model takes it.
    hook = embeddings.register_forward_hook(lambda module, inputs, output: torch.ones_like(output))
    tokens = torch.zeros(1, SYNFLOW_TOKENS, dtype=torch.int64, device=embeddings.weight.device)
    try:
        logits: Tensor = model(input_ids=tokens, attention_mask=torch.ones_like(tokens)).logits
        return logits
    finally:
        hook.remove()


def _names(request: MethodRequest) -> list[str]:
    return [name for name, _ in request.ranked]


def calibration_of(request: MethodRequest) -> Iterable[Any]:
    if request.calibration is None:
        raise ValueError(
            "this method scores entries before the first step: give calibration=, a function that "
            "returns batches with labels (lambda: dataloader)"
        )
    return request.calibration()


def _some(scores: dict[str, Tensor], request: MethodRequest) -> Scores:
    """The scores; warn if fewer entries than the budget score above zero."""
    found = sum(int((score > 0).sum()) for score in scores.values())
    wanted = resolve_budget(request.given_budget, sum(score.numel() for score in scores.values()))
    if found < wanted:
        warn_user(
            f"only {found} entries score above zero, the budget is {wanted}: give more "
            "calibration data, or a smaller budget"
        )
    return Scores(scores)

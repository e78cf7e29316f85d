"""The methods by name."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from sparse_optim.methods import _builders as builders
from sparse_optim.methods import _calibrated as calibrated
from sparse_optim.methods import _dps
from sparse_optim.methods._request import MethodRequest


@dataclass(frozen=True)
class Method:
    """A way to fine-tune.

    Args:
        build: makes the optimizer.
        lr: learning rate that suits it, for a user who gives none.
        about: for the help.
        budget: "given", "biases" (as many entries as BitFit trains, unless given) or "none".
        clips: whether the optimizer clips by itself (else the training loop does).
        adam_eps: AdamW's eps in the source, where it is not 1e-8.
    """

    build: Callable[[MethodRequest], torch.optim.Optimizer]
    lr: float
    about: str
    budget: str = "given"
    clips: bool = True
    adam_eps: float = 1e-8

    @property
    def has_budget(self) -> bool:
        """Whether a budget means anything to it."""
        return self.budget != "none"


def _dense(build: Callable[[MethodRequest], Any], lr: float, about: str) -> Method:
    return Method(build, lr, about, budget="none", clips=False)


def _fresh_each_step(build: Callable[[MethodRequest], Any], about: str) -> Method:
    return Method(build, 1e-3, about, budget="biases", adam_eps=1e-6)


METHODS = {
    "id3": Method(builders.id3, 5e-4, "ID3: budget unmasked step by step"),
    "static-d3": Method(builders.static_d3, 5e-4, "top budget of D3 at step 1, then fixed"),
    "repeat-d3": Method(builders.repeat_d3, 5e-4, "top budget of D3, anew at each step"),
    "pafi": Method(builders.pafi, 5e-4, "smallest magnitudes, fixed"),
    "fish": Method(calibrated.fish, 5e-4, "largest Fisher information, fixed"),
    "child-tuning-d": Method(calibrated.child_tuning, 5e-4, "squared batch gradients, fixed"),
    "r-mask": Method(builders.r_mask, 5e-4, "random entries, fixed"),
    "sparse-adapter": Method(
        calibrated.sparse_adapter, 5e-4, "SNIP or another pruning score of an adapter, fixed"
    ),
    "stochastic-tuning": _fresh_each_step(
        builders.stochastic_tuning, "a sample by |mu param grad| a step"
    ),
    "top-tuning": _fresh_each_step(
        builders.top_tuning, "top of |mu param grad|, anew at each step"
    ),
    "random-tuning": _fresh_each_step(builders.random_tuning, "random entries, anew at each step"),
    "dps": Method(_dps.dps, 1e-4, "dense windows choose what the next may move", clips=False),
    "bitfit": _dense(builders.bitfit, 1e-3, "bias terms only"),
    "multi-head": _dense(builders.multi_head, 1e-4, "attention modules only"),
    "full": _dense(builders.full, 5e-5, "every entry, torch.optim.AdamW"),
    "frozen": _dense(builders.frozen, 1e-2, "fresh head only"),
}


def build(
    name: str,
    model: nn.Module,
    *,
    fresh: Collection[str] = (),
    lr: float | None = None,
    **options: Any,
) -> torch.optim.Optimizer:
    """Build the optimizer of a method.

    Args:
        name: a key of `METHODS`.
        model: whose parameters that require gradients are trained, or ranked.
        fresh: names, or beginnings of names, of parameters trained densely.
        lr: default: the method's.
        options: further fields of `MethodRequest`: budget, total_steps, calibration, ...

    Raises:
        ValueError: an unknown method, or what the method cannot work with.

    Example:
        >>> model = nn.Linear(8, 2)
        >>> build("bitfit", model).param_groups[0]["lr"]
        0.001
    """
    if name not in METHODS:
        raise ValueError(f"unknown method {name!r}; known: {', '.join(METHODS)}")
    method = METHODS[name]
    named = [(key, param) for key, param in model.named_parameters() if param.requires_grad]
    if not named:
        raise ValueError("no parameter of the model requires a gradient: set requires_grad on some")
    lr = method.lr if lr is None else lr
    request = MethodRequest(
        model=model,
        named=named,
        fresh=frozenset(key for key, _ in named if key.startswith(tuple(fresh))),
        lr=lr,
        head_lr=options.pop("head_lr", lr),
        adam_eps=options.pop("adam_eps", method.adam_eps),
        **options,
    )
    return method.build(request)

"""Sort a model's parameters into the groups that the optimizers take."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

from torch import nn


def param_groups(
    model: nn.Module,
    *,
    rank: Literal["all"] | Callable[[str, nn.Parameter], bool] = "all",
    dense: str | Sequence[str] = (),
) -> list[dict[str, Any]]:
    """Param groups for `IncrementalMaskedAdamW` and `MaskedAdamW`, by name.

    Args:
        model: its parameters that require a gradient are sorted; tied ones count once.
        rank: which parameters compete for the budget: all that are not dense, or those for which
            this function of name and parameter is true. The others stay frozen.
        dense: beginnings of names of parameters to train whole, outside the budget (a fresh head):
            whole parts of a name, as "classifier" in "classifier.weight".

    Returns:
        Up to three groups, `unmask` "rank", "all" and "none"; add "lr" and other options as you
        like.

    Raises:
        ValueError: another `rank`, no parameter's name begins so, or none competes.

    Examples:
        >>> model = nn.ModuleDict({"body": nn.Linear(4, 4), "head": nn.Linear(4, 2)})
        >>> [(group["unmask"], len(group["params"])) for group in param_groups(model, dense="head")]
        [('rank', 2), ('all', 2)]
    """
    if isinstance(rank, str) and rank != "all":
        raise ValueError(f"rank: expected 'all' or a function of name and parameter, got {rank!r}")
    begins = (dense,) if isinstance(dense, str) else tuple(dense)
    named = [(name, param) for name, param in model.named_parameters() if param.requires_grad]
    for begin in begins:
        if not any(_begins(name, begin) for name, _ in named):
            known = ", ".join(dict.fromkeys(name.partition(".")[0] for name, _ in named))
            raise ValueError(
                f"dense: no trainable parameter's name begins with {begin!r}, but with {known}"
            )
    groups: dict[str, list[tuple[str, nn.Parameter]]] = {"rank": [], "all": [], "none": []}
    for name, param in named:
        if any(_begins(name, begin) for begin in begins):
            groups["all"].append((name, param))
        else:
            ranked = isinstance(rank, str) or rank(name, param)
            groups["rank" if ranked else "none"].append((name, param))
    if not groups["rank"]:
        raise ValueError("no parameter competes for the budget: `rank` and `dense` leave none")
    return [{"params": params, "unmask": kind} for kind, params in groups.items() if params]


def _begins(name: str, begin: str) -> bool:
    return f"{name}.".startswith(f"{begin.removesuffix('.')}.")

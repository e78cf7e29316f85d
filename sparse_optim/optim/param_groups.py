"""Sort a model's parameters into the groups that the optimizers take."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from sparse_optim.policy.defaults import RANK

Competes = Callable[[str, nn.Parameter], bool]


def param_groups(
    model: nn.Module,
    *,
    rank: str | Competes = RANK,
    dense: str | Sequence[str] = (),
    weight_decay: float = 0.0,
) -> list[dict[str, Any]]:
    """Param groups for `IncrementalMaskedAdamW` and `MaskedAdamW`, by name.

    Args:
        model: its parameters that require a gradient are sorted; tied ones count once.
        rank: which parameters compete for the budget, of those that are not dense: "linear", the
            weights that `linear_weights` finds; "all"; those with names in which this regular
            expression is found; or those for which this function of name and parameter is true.
            The others stay frozen.
        dense: beginnings of names of parameters to train whole, outside the budget (a fresh head):
            whole parts of a name, as "classifier" in "classifier.weight".
        weight_decay: of parameters with two or more dimensions; biases and norms have none.

    Returns:
        Groups without empty ones, `unmask` "rank", "all" or "none"; add "lr" and other options as
        you like. Parameters with and without weight decay are in different groups, if it is not 0.

    Raises:
        ValueError: `rank` is no regular expression, no parameter's name begins as `dense` says, or
            none competes.

    Examples:
        >>> model = nn.ModuleDict({"body": nn.Linear(4, 4), "head": nn.Linear(4, 2)})
        >>> [(group["unmask"], len(group["params"])) for group in param_groups(model, dense="head")]
        [('rank', 1), ('all', 2), ('none', 1)]
        >>> groups = param_groups(model, rank="all", dense="head")
        >>> [(group["unmask"], len(group["params"])) for group in groups]
        [('rank', 2), ('all', 2)]
    """
    begins = (dense,) if isinstance(dense, str) else tuple(dense)
    named = [(name, param) for name, param in model.named_parameters() if param.requires_grad]
    for begin in begins:
        if not any(_begins(name, begin) for name, _ in named):
            known = ", ".join(dict.fromkeys(name.partition(".")[0] for name, _ in named))
            raise ValueError(
                f"dense: no trainable parameter's name begins with {begin!r}, but with {known}"
            )
    competes = competing(model, rank)
    groups: dict[tuple[str, float], list[tuple[str, nn.Parameter]]] = {}
    for name, param in named:
        if any(_begins(name, begin) for begin in begins):
            unmask = "all"
        else:
            unmask = "rank" if competes(name, param) else "none"
        decay = weight_decay if param.ndim > 1 and unmask != "none" else 0.0
        groups.setdefault((unmask, decay), []).append((name, param))
    if not any(unmask == "rank" for unmask, _ in groups):
        raise ValueError(
            f"no parameter competes for the budget: rank={rank!r} and dense={dense!r} leave none; "
            'rank="all" takes all that are not dense'
        )
    order = {"rank": 0, "all": 1, "none": 2}
    return [
        {"params": groups[key], "unmask": key[0]}
        | ({"weight_decay": key[1]} if weight_decay else {})
        for key in sorted(groups, key=lambda key: (order[key[0]], -key[1]))
    ]


def competing(model: nn.Module, rank: str | Competes) -> Competes:
    """The function that says whether a parameter competes for the budget; see `param_groups`.

    Raises:
        ValueError: `rank` is neither a name, a regular expression nor a function.
    """
    if callable(rank):
        return rank
    if rank == "all":
        return lambda name, param: True
    if rank == "linear":
        weights = linear_weights(model)
        return lambda name, param: id(param) in weights
    try:
        pattern = re.compile(rank)
    except (re.error, TypeError) as error:
        raise ValueError(
            "rank: expected 'all', 'linear', a regular expression for names, or a function of name "
            f"and parameter, got {rank!r} ({error})"
        ) from None
    return lambda name, param: pattern.search(name) is not None


def linear_weights(model: nn.Module) -> set[int]:
    """The `id` of every weight that multiplies features: of Linear, Conv1D and attention modules.

    Weights that are also embeddings are left out, and so is the output layer of a language model,
    as in peft's "all-linear": a row of them has a gradient only where its token occurs.
    """
    embeddings = {
        id(param)
        for module in model.modules()
        if isinstance(module, nn.Embedding)
        for param in module.parameters(recurse=False)
    }
    output = getattr(model, "get_output_embeddings", lambda: None)()
    if output is not None:
        embeddings |= {id(param) for param in output.parameters(recurse=False)}
    weights = {
        id(param)
        for module in model.modules()
        for name, param in module.named_parameters(recurse=False)
        if name in _WEIGHTS.get(_kind(module), ())
    }
    return weights - embeddings


_WEIGHTS = {
    "Linear": ("weight",),
    "Conv1D": ("weight",),  # of transformers: a Linear with its weight transposed
    "MultiheadAttention": ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight"),
}


def _kind(module: nn.Module) -> str:
    if isinstance(module, nn.Linear):
        return "Linear"
    return (
        "MultiheadAttention" if isinstance(module, nn.MultiheadAttention) else type(module).__name__
    )


def _begins(name: str, begin: str) -> bool:
    return f"{name}.".startswith(f"{begin.removesuffix('.')}.")

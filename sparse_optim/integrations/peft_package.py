"""Import peft, which is optional, and say in its terms how a base model is loaded."""

from __future__ import annotations

from types import ModuleType

from torch import nn


def import_peft() -> ModuleType:
    """The `peft` package.

    Raises:
        ModuleNotFoundError: it is not installed; the message says how to install it.
    """
    try:
        import peft
    except ModuleNotFoundError as error:
        if error.name != "peft":
            raise
        raise ModuleNotFoundError(
            "this needs the package peft: pip install 'sparse-optim[peft]'", name="peft"
        ) from None
    return peft


def base_class(model: nn.Module) -> dict[str, str]:
    """`auto_mapping` of a peft config: the class that peft's `AutoPeftModel` loads as the base."""
    kind = type(model)
    return {"base_model_class": kind.__name__, "parent_library": kind.__module__}


def in_transformers(model: nn.Module) -> bool:
    """Whether the class of a model is one of transformers."""
    return type(model).__module__.startswith("transformers.")

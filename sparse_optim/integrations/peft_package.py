"""Import peft, which is optional, or raise an error that says how to install it."""

from __future__ import annotations

from types import ModuleType


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

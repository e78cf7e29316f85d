"""peft is optional: imported where it is needed, or asked for in one line."""

from __future__ import annotations

from types import ModuleType


def import_peft() -> ModuleType:
    """The `peft` package.

    Raises:
        ModuleNotFoundError: it is not installed; the message tells how to install it.
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

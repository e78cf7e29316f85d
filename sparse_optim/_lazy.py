"""Import on use, so that names and help texts do not wait for torch. It imports nothing of ours."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any


def on_call(module: str, name: str) -> Callable[..., Any]:
    """A function that imports `module` when it is called, and calls its function `name`."""

    def call(*arguments: Any, **options: Any) -> Any:
        return getattr(import_module(module), name)(*arguments, **options)

    return call


def on_access(package: str, homes: Mapping[str, str]) -> Callable[[str], Any]:
    """A `__getattr__` for `package` (PEP 562): import a name from its home when it is first read.

    Args:
        package: name of the package.
        homes: name -> the module to take it from; a submodule is its own home.
    """

    def read(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        module = import_module(homes[name])
        return module if homes[name] == f"{package}.{name}" else getattr(module, name)

    return read

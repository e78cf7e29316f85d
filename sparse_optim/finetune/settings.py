"""Describe a field of a configuration once: its default, help, and how it is written as text."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

KEY = "setting"  # in the metadata of a field


@dataclass(frozen=True)
class Setting:
    """Describes a field to the command line and the configuration file.

    Args:
        help: description, for `--help`.
        panel: heading in the help.
        short: one-letter flag, such as "-m".
        written: type of the value as a user writes it, if it is not the type of the field.
        read: converts what the user wrote to the value of the field.
    """

    help: str
    panel: str | None = None
    short: str | None = None
    written: type | None = None
    read: Callable[[Any], Any] | None = None


def setting(
    default: Any,
    help: str,
    panel: str | None = None,
    *,
    short: str | None = None,
    written: type | None = None,
    read: Callable[[Any], Any] | None = None,
) -> Any:
    """A dataclass field with a `Setting`; `dataclasses.MISSING` as default makes it required."""
    about = Setting(help, panel, short, written, read)
    return dataclasses.field(default=default, metadata={KEY: about})


def choices(hint: Any) -> tuple[str, ...]:
    """The strings that a type admits: those of a Literal, or of one in a union.

    Examples:
        >>> choices(Literal["a", "b"] | None)
        ('a', 'b')
    """
    for part in members(hint):
        if typing.get_origin(part) is Literal:
            return typing.get_args(part)
    return ()


def members(hint: Any) -> tuple[Any, ...]:
    """The types of a union; a type that is no union by itself."""
    is_union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    return typing.get_args(hint) if is_union else (hint,)


def convert(value: Any, hint: Any) -> Any:
    """A value from a configuration file as the type of its field.

    Text that spells a number is accepted for a float: YAML reads 5e-4, without a point, as text.

    Args:
        value: None, a bool, an int, a float, a str or a list.
        hint: None, bool, int, float, str, Path, tuple[str, ...], a Literal, or a union of them.

    Raises:
        TypeError: the value has another type; the message says what was expected.

    Examples:
        >>> convert("5e-4", float | None), convert(["a"], tuple[str, ...])
        (0.0005, ('a',))
    """
    for part in members(hint):
        if isinstance(value, str) and part is float:
            try:
                return float(value)
            except ValueError:
                continue
        if fits(value, part):
            if part is Path or part is float:
                return part(value)
            return tuple(value) if isinstance(value, list) else value
    expected = " or ".join(dict.fromkeys(describe(part) for part in members(hint)))
    raise TypeError(f"expected {expected}, got {value!r}")


def fits(value: Any, kind: Any) -> bool:
    """Whether a value from a file has this type."""
    if kind in (None, types.NoneType):
        return value is None
    if typing.get_origin(kind) is Literal:
        return value in typing.get_args(kind)
    if typing.get_origin(kind) is tuple:
        return isinstance(value, list) and all(isinstance(item, str) for item in value)
    if isinstance(value, bool) or kind is bool:
        return isinstance(value, bool) and kind is bool
    written = {float: (int, float), Path: (str,)}.get(kind, (kind,))
    return isinstance(value, written)


def describe(kind: Any) -> str:
    """The name of a kind, for messages."""
    if typing.get_origin(kind) is Literal:
        return ", ".join(typing.get_args(kind))
    if typing.get_origin(kind) is tuple:
        return "a list of text"
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
    return names.get(kind, "a path" if kind is Path else "null")

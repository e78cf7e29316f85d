"""An interrupt at any line of some functions."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from types import CodeType, FrameType
from typing import Any


def code_of(*owners: Any) -> set[CodeType]:
    """The code of the functions, properties and decorated functions in classes or modules."""
    found = set()
    for owner in owners:
        for member in vars(owner).values():
            function = inspect.unwrap(member.fget if isinstance(member, property) else member)
            if inspect.isfunction(function):
                found.add(function.__code__)
    return found


def at_every_line(code: set[CodeType], run: Callable[[], Callable[[], None]]) -> Iterator[bool]:
    """Yield after each interrupted call, and at last after one that came to its end.

    Args:
        code: an interrupt comes in the n-th line that runs of these, n = 1, 2, ...
        run: prepares a call, and returns it.

    Yields:
        Whether the call came to its end.
    """
    number, left = 0, 0

    def tracer(frame: FrameType, event: str, _: object) -> Any:
        nonlocal left
        if event == "line":
            left -= 1
            if left == 0:
                raise KeyboardInterrupt
        return tracer if frame.f_code in code else None

    while left <= 0:
        number += 1
        call, left, before = run(), number, sys.gettrace()
        sys.settrace(tracer)
        try:
            call()
        except KeyboardInterrupt:
            pass
        finally:
            sys.settrace(before)
        yield left > 0

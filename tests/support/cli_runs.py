"""Run commands of the package in a test."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import typer
from typer.testing import CliRunner


def invoker(*registers: Callable[[typer.Typer], None]) -> Callable[..., str]:
    """A function that runs a command; an error (code 1) must be one line on stderr."""
    app = typer.Typer()
    for register in registers:
        register(app)

    def invoke(*arguments: Any, code: int = 0) -> str:
        result = CliRunner().invoke(app, [str(argument) for argument in arguments])
        assert result.exit_code == code, result.output
        if code == 1:
            assert result.stdout == ""
            assert result.stderr.startswith("Error: ")
            assert result.stderr.count("\n") == 1
            return result.stderr
        return result.stdout

    return invoke

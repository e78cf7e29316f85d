"""The `sparse-optim` command.

The modules of the commands import torch, transformers and matplotlib only when a command runs: help
and shell completion answer at once.
"""

from __future__ import annotations

import os
import sys
from typing import Annotated

from sparse_optim.version import __version__

try:
    import typer

    from sparse_optim.cli import (
        analyse,
        compare,
        delta,
        delta_merge,
        estimate,
        experiment,
        finetune,
        peft,
        use,
    )
    from sparse_optim.cli.console import print_line
except ModuleNotFoundError as error:
    if (error.name or "").startswith("sparse_optim"):
        raise
    sys.exit(f"sparse-optim needs {error.name}: pip install 'sparse-optim[finetune]'")


def print_version(wanted: bool) -> None:
    """Print the version and exit."""
    if wanted:
        print_line(f"sparse-optim {__version__}")
        raise typer.Exit


app = typer.Typer(
    name="sparse-optim",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)


@app.callback(
    help="Selective fine-tuning: train few entries of a model, save them as a small delta."
)
def root(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=print_version, is_eager=True, help="Print the version and exit."
        ),
    ] = False,
) -> None:
    """Options of the command itself."""


for command in (finetune, use, compare, delta, delta_merge, analyse, peft, estimate, experiment):
    command.register(app)


def main() -> None:
    """Entry point of the console script."""
    os.environ.setdefault("TQDM_DISABLE", "1")  # the libraries' bars run into our own lines
    app(prog_name="sparse-optim")


if __name__ == "__main__":
    main()

"""The `sparse-optim` command.

The modules of the commands import torch, transformers and matplotlib only when a command runs: help
and shell completion answer at once.
"""

from __future__ import annotations

import sys

try:
    import typer

    from sparse_optim.cli import analyse, compare, delta, estimate, experiment, finetune, peft
except ModuleNotFoundError as error:
    if (error.name or "").startswith("sparse_optim"):
        raise
    sys.exit(f"sparse-optim needs {error.name}: pip install 'sparse-optim[finetune]'")

app = typer.Typer(
    name="sparse-optim",
    help="Selective fine-tuning: train few entries of a model, save them as a small delta.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)
for command in (finetune, experiment, delta, analyse, compare, peft, estimate):
    command.register(app)


def main() -> None:
    """Entry point of the console script."""
    app(prog_name="sparse-optim")


if __name__ == "__main__":
    main()

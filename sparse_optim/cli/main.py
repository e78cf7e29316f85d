"""The `sparse-optim` command."""

from __future__ import annotations

import sys

try:
    import typer

    from sparse_optim.cli import analyse as analysis_command
    from sparse_optim.cli import delta as delta_cli
    from sparse_optim.cli import estimate as estimate_cli
    from sparse_optim.cli import experiment as experiments
    from sparse_optim.cli import finetune as command
    from sparse_optim.cli import peft as peft_cli
except ModuleNotFoundError as error:
    if (error.name or "").startswith("sparse_optim"):
        raise
    sys.exit(f"sparse-optim needs {error.name}: pip install 'sparse-optim[finetune]'")

app = typer.Typer(
    help="Selective fine-tuning: train few entries of a model, keep them as a small delta.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)
command.register(app)
experiments.register(app)
delta_cli.register(app)
analysis_command.register(app)
peft_cli.register(app)
estimate_cli.register(app)


def main() -> None:
    """Entry point of the console script."""
    app()


if __name__ == "__main__":
    main()

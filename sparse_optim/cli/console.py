"""Shared by all commands: errors in one line, and lines that are not wrapped."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.text import Text

from sparse_optim.errors import SparseOptimError
from sparse_optim.files import strict_json
from sparse_optim.finetune.errors import FinetuneError
from sparse_optim.finetune.processes import is_first_here
from sparse_optim.finetune.summary import plain as plain

PICTURES = (".png", ".pdf", ".svg")


@contextmanager
def one_line_errors(
    *, debug: bool = False, interrupted: str = "Nothing was written."
) -> Iterator[None]:
    """Turn an error that the user can fix into one line on stderr, and exit.

    Exit code 1 for SparseOptimError (or its `exit_code`), OSError and a missing optional package;
    130 for Ctrl-C. Other exceptions are defects: they keep their traceback.

    Args:
        debug: raise these errors with their traceback.
        interrupted: printed after Ctrl-C.
    """
    try:
        yield
    except BrokenPipeError:  # `| head`: typer ends quietly
        raise
    except (SparseOptimError, OSError, ModuleNotFoundError) as error:
        if debug or _is_ours(error):
            raise
        print_error(describe(error))
        raise typer.Exit(getattr(error, "exit_code", 1)) from None
    except KeyboardInterrupt:
        if debug:
            raise
        Console(stderr=True).print(Text(f"Interrupted. {interrupted}"), soft_wrap=True)
        raise typer.Exit(130) from None


def _is_ours(error: Exception) -> bool:
    """Whether a module of this package is missing: a defect, not a missing extra."""
    return isinstance(error, ModuleNotFoundError) and (error.name or "").startswith("sparse_optim")


def describe(error: Exception) -> str:
    """The message of an error, on one line."""
    message = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, ModuleNotFoundError) and "pip install" not in message:
        message += "; install it with: pip install 'sparse-optim[finetune]'"
    return message


def print_error(message: str) -> None:
    """Print an error to stderr, not wrapped; of several processes of torchrun, one of each machine.

    Each machine, because its own files may be what is wrong.
    """
    if not is_first_here():
        return
    Console(stderr=True).print(Text("Error: ", "bold red") + plain(message), soft_wrap=True)


def print_line(line: str, *, err: bool = False) -> None:
    """Print a line to stdout, or to stderr, not wrapped."""
    Console(stderr=err).print(plain(line), soft_wrap=True)


def print_json(value: Any) -> None:
    """Print strict JSON to stdout, and nothing else: for options `--json`."""
    typer.echo(strict_json(value, indent=2))


def check_picture(path: Path) -> None:
    """Check the name of a picture to write.

    Raises:
        FinetuneError: its suffix is none of PICTURES.
    """
    if path.suffix not in PICTURES:
        raise FinetuneError(f"{path}: a picture's name ends in {', '.join(PICTURES)}")


def quiet_libraries() -> None:
    """Silence progress bars, reports and hints of the libraries."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    quiet_datasets()


def quiet_datasets() -> None:
    """Silence the library `datasets` alone, which needs no torch."""
    import datasets

    datasets.utils.logging.set_verbosity_error()
    datasets.disable_progress_bars()

"""The command `export-peft`: write a delta as a SHiRA adapter."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sparse_optim.cli.console import one_line_errors, print_line, quiet_libraries

if TYPE_CHECKING:
    from torch import nn

    from sparse_optim.delta import Delta


def register(app: typer.Typer) -> None:
    """Add the command `export-peft` to `app`."""
    app.command("export-peft")(export_peft)


def export_peft(
    delta_file: Annotated[Path, typer.Argument(help="A delta file.")],
    base: Annotated[
        str,
        typer.Option("--base", help="Model that was fine-tuned: built-in name, folder or hub id."),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write: new or empty.")],
    r: Annotated[
        int | None, typer.Option(help="r of the ShiraConfig (default: the smallest that fits).")
    ] = None,
    whole: Annotated[
        bool,
        typer.Option("--whole", help="Store the whole of each module that SHiRA cannot express."),
    ] = False,
    task: Annotated[
        str | None,
        typer.Option(help="Task that the model was built for (default: see the delta)."),
    ] = None,
) -> None:
    """Write a delta as an adapter folder for peft (SHiRA)."""
    with one_line_errors():
        from sparse_optim.delta import load_delta
        from sparse_optim.integrations.shira import export_shira

        delta = load_delta(delta_file)
        written = export_shira(delta, _load_base(base, delta, task), output, r=r, allow_whole=whole)
        print_line(
            f"{output}: {written.entries:,} entries in {len(written.layers)} layers, r={written.r} "
            f"({written.stored:,} stored, zeros included)"
        )
        if written.whole:
            print_line(f"stored whole: {', '.join(written.whole)}")
        print_line(
            "load it with peft.PeftModel.from_pretrained(model, folder); the model needs the class "
            "and the number of labels that were fine-tuned"
        )


def _load_base(name: str, delta: Delta, task: str | None) -> nn.Module:
    """Load the base model as the class that `finetune` used, or the class in its config.json."""
    from sparse_optim.finetune.models import DTYPES, find_model, load_bare_model

    quiet_libraries()
    dtypes = {str(values.dtype).removeprefix("torch.") for values in delta.sparse.values()}
    dtype = next((name for name in DTYPES if dtypes == {name}), "float32")
    noted = delta.method.get("task")
    return load_bare_model(find_model(name), task or (str(noted) if noted else None), dtype)

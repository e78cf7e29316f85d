"""The command `export-peft`: a delta as a SHiRA adapter. `register` puts it on an app."""

from pathlib import Path
from typing import Annotated

import typer
from torch import nn

from sparse_optim.cli.delta import one_line_errors, say
from sparse_optim.delta import Delta, load_delta
from sparse_optim.finetune.errors import FinetuneError
from sparse_optim.integrations.shira import export_shira


def register(app: typer.Typer) -> None:
    """Add the command `export-peft` to `app`."""
    app.command("export-peft")(export_peft)


def export_peft(
    delta_file: Annotated[Path, typer.Argument(help="A delta file.")],
    base: Annotated[
        str,
        typer.Option("--base", help="The model that was fine-tuned: built-in, folder or hub id."),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write; new or empty.")],
    r: Annotated[
        int | None, typer.Option(help="Of the ShiraConfig (default: the least that fits).")
    ] = None,
    whole: Annotated[
        bool,
        typer.Option("--whole", help="Store modules that SHiRA cannot express whole."),
    ] = False,
    task: Annotated[
        str | None, typer.Option(help="Task that the model was built for (default: the delta's).")
    ] = None,
) -> None:
    """Write a delta as an adapter folder for peft (SHiRA)."""
    with one_line_errors(FinetuneError, ModuleNotFoundError):
        delta = load_delta(delta_file)
        written = export_shira(delta, _load_base(base, delta, task), output, r=r, allow_whole=whole)
        say(
            f"{output}: {written.entries:,} entries in {len(written.layers)} layers, r={written.r} "
            f"({written.stored:,} stored, zeros included)"
        )
        if written.whole:
            say(f"stored whole: {', '.join(written.whole)}")
        say(
            "load it with peft.PeftModel.from_pretrained(model, folder), where model is of the "
            "class that was fine-tuned (and has as many labels)"
        )


def _load_base(name: str, delta: Delta, task: str | None) -> nn.Module:
    """The base model, of the class that `finetune` used, or the one in its config.json."""
    from sparse_optim.cli.finetune import quiet_libraries
    from sparse_optim.finetune.models import DTYPES, find_model, load_bare_model

    quiet_libraries()
    dtypes = {str(values.dtype).removeprefix("torch.") for values in delta.sparse.values()}
    dtype = next((name for name in DTYPES if dtypes == {name}), "float32")
    noted = delta.method.get("task")
    return load_bare_model(find_model(name), task or (str(noted) if noted else None), dtype)

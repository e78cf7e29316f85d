"""The commands `export-peft` (a delta as a SHiRA adapter) and `import-summary` (what the package
`selective_optimizers` saved, as a delta)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sparse_optim.cli.console import one_line_errors, print_line, quiet_libraries
from sparse_optim.finetune.summary import counted_things

SHOWN = 3  # names of modules

if TYPE_CHECKING:
    from torch import nn

    from sparse_optim.delta import Delta


def register(app: typer.Typer) -> None:
    """Add the commands `export-peft` and `import-summary` to `app`."""
    app.command("export-peft")(export_peft)
    app.command("import-summary")(import_summary)


def export_peft(
    delta_file: Annotated[Path, typer.Argument(help="A delta file.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write: new or empty.")],
    base: Annotated[
        str | None,
        typer.Option(
            help="Model that was fine-tuned: built-in name, folder, hub id (default: the delta's)."
        ),
    ] = None,
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
        quiet_libraries()
        from sparse_optim.delta import load_delta
        from sparse_optim.finetune.reuse import find_delta
        from sparse_optim.integrations.shira import export_shira

        delta = load_delta(find_delta(delta_file))
        model = _load_base(base, delta, task)
        written = export_shira(delta, model, output, r=r, allow_whole=whole)
        print_line(
            f"{output}: {written.entries:,} entries in {len(written.layers)} layers, r={written.r} "
            f"({written.stored:,} stored, zeros included)"
        )
        if written.whole:
            print_line(f"stored whole: {_listed(written.whole)}")
        print_line(f"load it so: {_loading(delta, model, output)}")


def import_summary(
    summary: Annotated[
        Path, typer.Argument(help="A file of selective_optimizers (write_summary_to_disk).")
    ],
    model: Annotated[
        str,
        typer.Option(
            "--model", "-m", help="Model that was fine-tuned: built-in name, folder or hub id."
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Delta file to write.")],
    task: Annotated[
        str | None,
        typer.Option(help="Task whose head the model has (default: the class in its config.json)."),
    ] = None,
    dtype: Annotated[
        str, typer.Option(help="dtype in which it was fine-tuned: float32, bfloat16 or float16.")
    ] = "float32",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the output.")] = False,
) -> None:
    """Convert what the package selective_optimizers saved to a delta file.

    Only tensors and numbers of the file are read: none of its code runs. Give the model exactly as
    it was before training, with its head (`model.save_pretrained` before the first step): the file
    does not say which model it belongs to.
    """
    with one_line_errors():
        quiet_libraries()
        from sparse_optim.delta import DeltaError, save_delta
        from sparse_optim.finetune.errors import FinetuneError
        from sparse_optim.finetune.models import DTYPES, find_model, load_bare_model
        from sparse_optim.integrations.selective_optimizers import read_summary

        if dtype not in DTYPES:
            raise FinetuneError(f"--dtype {dtype}: expected one of {', '.join(DTYPES)}")
        if not summary.is_file():  # before a model is loaded
            raise DeltaError(f"{summary}: no such file")
        if output.exists() and not overwrite:
            raise DeltaError(f"--output: {output} exists; add --overwrite or name another file")
        base = load_bare_model(find_model(model), task, dtype, allow_fresh=False)
        delta = read_summary(summary, base)
        save_delta(delta, output)
        print_line(
            f"{output}: {counted_things(delta.num_entries, 'entry', 'entries')} in "
            f"{counted_things(len(delta.sparse), 'parameter')}, "
            f"{output.stat().st_size:,} bytes"
        )


def _listed(names: Sequence[str]) -> str:
    """How many modules, and the first few.

    Example:
        >>> _listed(["a", "b", "c", "d"])
        '4 modules: a, b, c, ...'
    """
    more = ", ..." if len(names) > SHOWN else ""
    return f"{counted_things(len(names), 'module')}: {', '.join(names[:SHOWN])}{more}"


def _loading(delta: Delta, model: nn.Module, folder: Path) -> str:
    """Python that loads the adapter, in one line."""
    from sparse_optim.finetune.card import load_adapter
    from sparse_optim.finetune.spec import read_spec

    spec = read_spec(delta)
    if spec is None:
        return (
            f"peft.PeftModel.from_pretrained(model, {str(folder)!r}); the model needs the class "
            "and the number of labels that were fine-tuned"
        )
    return load_adapter(str(folder), spec, model).replace("\n\n", "; ")


def _load_base(name: str | None, delta: Delta, task: str | None) -> nn.Module:
    """Build the base model that the delta's note describes, or the class in its config.json."""
    from sparse_optim.finetune.build import build
    from sparse_optim.finetune.errors import FinetuneError
    from sparse_optim.finetune.models import DTYPES, find_model, load_bare_model, load_tokenizer
    from sparse_optim.finetune.spec import read_spec

    spec = read_spec(delta)
    if spec is not None:
        if task not in (None, spec.task):
            raise FinetuneError(f"--task {task}: the delta was trained for {spec.task}")
        source = find_model(name or spec.base)
        return build(source, spec, load_tokenizer(source)).model
    if name is None:
        raise FinetuneError(
            "the delta does not say which model was fine-tuned: name it with --base"
        )
    dtypes = {str(values.dtype).removeprefix("torch.") for values in delta.sparse.values()}
    dtype = next((name for name in DTYPES if dtypes == {name}), "float32")
    return load_bare_model(find_model(name), task, dtype)

"""The commands on delta files: `inspect`, `apply`, `diff`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from sparse_optim.cli.console import one_line_errors, plain, print_line, quiet_libraries

if TYPE_CHECKING:
    from sparse_optim.delta import Delta  # torch: the commands import it, --help does not


def register(app: typer.Typer) -> None:
    """Add the commands `inspect`, `apply` and `diff` to `app`."""
    app.command("inspect")(inspect)
    app.command("apply")(apply)
    app.command("diff")(diff)


def inspect(delta_file: Annotated[Path, typer.Argument(help="A delta file.")]) -> None:
    """Show the contents of a delta file."""
    with one_line_errors():
        from sparse_optim.delta import load_delta

        delta = load_delta(delta_file)
        console = Console()
        console.print(_summary(delta_file, delta))
        if delta.num_entries:
            console.print(_sparse_table(delta))
        if delta.dense:
            console.print(_dense_table(delta))


def apply(
    base: Annotated[
        str,
        typer.Argument(help="Model that was fine-tuned: built-in name, folder or hub id."),
    ],
    delta_file: Annotated[Path, typer.Argument(help="A delta file, or a folder of finetune.")],
    out_folder: Annotated[Path, typer.Argument(help="Folder to write: new or empty.")],
) -> None:
    """Write base + delta as a model folder that transformers loads.

    A delta that finetune wrote becomes the class that was trained, with its labels and tokenizer.
    Any other delta is merged into a copy of the base's files.
    """
    with one_line_errors():
        quiet_libraries()
        from sparse_optim.delta import load_delta, merge_folder
        from sparse_optim.finetune.models import find_model, local_folder
        from sparse_optim.finetune.reuse import find_delta, rebuild, write_model
        from sparse_optim.finetune.spec import read_spec

        delta = load_delta(find_delta(delta_file))
        entries = f"{delta.num_entries:,} entries and {len(delta.dense)} dense tensors"
        spec = read_spec(delta)
        if spec is not None:
            tuned = rebuild(delta, spec, base)
            write_model(tuned, out_folder)
            print_line(f"{out_folder}: {entries} merged into {type(tuned.model).__name__}")
            return
        folder = Path(base) if Path(base).is_dir() else local_folder(find_model(base))
        merged = merge_folder(folder, delta, out_folder)
        print_line(f"{out_folder}: {entries} merged into {', '.join(merged.files)}")
        if merged.prefix:
            print_line(f"names matched across the prefix {merged.prefix!r}")
        if merged.added:
            print_line(
                f"added {', '.join(merged.added)}; config.json is the base's: set its number of "
                "labels and architecture to match"
            )


def diff(
    a: Annotated[Path, typer.Argument(help="A delta file, or the folder of the base model.")],
    b: Annotated[Path, typer.Argument(help="A delta file, or the folder of the tuned model.")],
    out: Annotated[
        Path | None, typer.Option(help="Two folders: write the changes from A to B to this file.")
    ] = None,
    originals: Annotated[
        bool, typer.Option(help="Two folders: also store the base's values, for reverting.")
    ] = False,
) -> None:
    """Compare two deltas, or make a delta from two model folders."""
    with one_line_errors():
        from sparse_optim.delta import Delta, DeltaError, folder_tensors, load_delta, save_delta

        if a.is_dir() != b.is_dir():
            raise DeltaError("expected two delta files or two model folders, got one of each")
        if not a.is_dir():
            if out is not None or originals:
                raise DeltaError("--out and --originals are for two model folders")
            _show_overlap(load_delta(a), load_delta(b))
            return
        delta = Delta.from_models(folder_tensors(a), folder_tensors(b), store_original=originals)
        if out is not None:
            save_delta(delta, out)
        Console().print(_summary(b, delta))
        if out is not None:
            print_line(f"{out}: {out.stat().st_size:,} bytes")


def _facts(title: str) -> Table:
    table = Table(title=plain(title), show_header=False, title_justify="left")
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    return table


def _summary(path: Path, delta: Delta) -> Table:
    from sparse_optim.delta import content_fingerprint

    table = _facts(str(path))
    arguments = {key: value for key, value in delta.method.items() if key != "name"}
    table.add_row("method", plain(str(delta.method.get("name", "unknown"))))
    for key, value in arguments.items():
        table.add_row(plain(f"  {key}"), plain(str(value)))
    numel = sum(values.numel for values in delta.sparse.values())
    share = f" ({delta.num_entries / numel:.4%} of {numel:,})" if numel else ""
    table.add_row("sparse entries", f"{delta.num_entries:,}{share}")
    table.add_row("sparse parameters", f"{len(delta.sparse):,}")
    table.add_row("dense tensors", f"{len(delta.dense):,}")
    table.add_row("tensor bytes", f"{delta.nbytes:,}")
    steps = [
        values.unmask_step
        for values in delta.sparse.values()
        if values.unmask_step is not None and values.num_entries
    ]
    if steps:
        first, last = min(int(step.min()) for step in steps), max(int(step.max()) for step in steps)
        table.add_row("unmask steps", f"{first:,} to {last:,}")
    originals = any(values.original is not None for values in delta.sparse.values())
    table.add_row("originals", "stored" if originals or delta.dense_original else "not stored")
    table.add_row("fingerprint", content_fingerprint(delta))
    if delta.parent is not None:
        removed = sum(position.numel() for position in delta.removed.values())
        table.add_row("increment over", f"{delta.parent} ({removed:,} entries removed)")
    return table


def _sparse_table(delta: Delta) -> Table:
    with_entries = {name: part for name, part in delta.sparse.items() if part.num_entries}
    without = len(delta.sparse) - len(with_entries)
    table = Table(caption=f"{without:,} parameters without entries" if without else None)
    table.add_column("parameter", overflow="fold")
    for heading in ("shape", "dtype"):
        table.add_column(heading)
    for heading in ("entries", "share", "bytes"):
        table.add_column(heading, justify="right")
    for name, values in with_entries.items():
        table.add_row(
            plain(name),
            "x".join(map(str, values.shape)) or "scalar",
            str(values.dtype).removeprefix("torch."),
            f"{values.num_entries:,}",
            f"{values.num_entries / values.numel:.4%}",
            f"{values.nbytes:,}",
        )
    return table


def _dense_table(delta: Delta) -> Table:
    table = Table()
    table.add_column("dense tensor", overflow="fold")
    for heading in ("shape", "dtype"):
        table.add_column(heading)
    table.add_column("bytes", justify="right")
    for name, tensor in delta.dense.items():
        shape = "x".join(map(str, tensor.shape)) or "scalar"
        dtype = str(tensor.dtype).removeprefix("torch.")
        table.add_row(plain(name), shape, dtype, f"{tensor.nbytes:,}")
    return table


def _show_overlap(delta_a: Delta, delta_b: Delta) -> None:
    from sparse_optim.delta import overlap

    found = overlap(delta_a, delta_b)
    table = _facts("A and B")
    table.add_row("entries in both", f"{found.both:,}")
    table.add_row("only in A", f"{found.only_a:,}")
    table.add_row("only in B", f"{found.only_b:,}")
    table.add_row("Jaccard", f"{found.jaccard:.4f}")
    table.add_row("in both, equal bits", f"{found.equal:,}")
    table.add_row("largest |a - b|", f"{found.max_difference:.6g}")
    table.add_row("mean |a - b|", f"{found.mean_difference:.6g}")
    table.add_row("dense in both", f"{len(delta_a.dense.keys() & delta_b.dense.keys()):,}")
    table.add_row("same base", "yes" if found.same_base else "no, where they overlap")
    Console().print(table)

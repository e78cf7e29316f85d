"""The commands on delta files: `inspect`, `apply`, `diff`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from sparse_optim.cli.change_tables import show_changes
from sparse_optim.cli.console import (
    check_picture,
    one_line_errors,
    plain,
    print_json,
    print_line,
    quiet_libraries,
)
from sparse_optim.cli.delta_diff import diff_summary, diff_table
from sparse_optim.cli.delta_facts import (
    change_facts,
    check_related,
    check_related_models,
    facts_of,
    overlap_facts,
)
from sparse_optim.cli.delta_merge import BaseModel, base_folder
from sparse_optim.cli.delta_tables import dense_table, fact_table, in_words, sparse_table

if TYPE_CHECKING:
    from sparse_optim.delta import Delta  # torch: the commands import it, --help does not

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]


def register(app: typer.Typer) -> None:
    """Add the commands `inspect`, `apply` and `diff` to `app`."""
    app.command("inspect")(inspect)
    app.command("apply")(apply)
    app.command("diff")(diff)


def inspect(
    delta_file: Annotated[
        Path, typer.Argument(help="A delta file, a folder of finetune, or its folder series/.")
    ],
    every: Annotated[
        bool, typer.Option("--all", help="Show all tensors, not the ten largest of each table.")
    ] = False,
    plot: Annotated[
        Path | None,
        typer.Option(help="Draw the map of layers and modules to this file: .png, .pdf or .svg."),
    ] = None,
    size: Annotated[
        bool,
        typer.Option(
            "--size",
            help="Map the size of the changes beside the base's values (needs --base, or stored "
            "originals), not the share of the entries that changed.",
        ),
    ] = False,
    base: BaseModel = None,
    as_json: AsJson = False,
) -> None:
    """Show the contents of a delta file, and where it changes the model: a map of layers and
    modules. Of a series, show its models.

    --json prints {"method", "sparse_entries", "sparse_numel", "tensor_bytes", "unmask_steps" (first
    and last, or null), "originals", "fingerprint", "parent", "removed_entries", "sparse": a list of
    {"name", "shape", "dtype", "entries", "bytes"}, "dense": a list of {"name", "shape", "dtype",
    "bytes"}}; of a series {"members": a list of {"file", "share" (of the budget), "step",
    "entries", "bytes", "metric", "value"}}. With --size it also has "changes": by tensor
    {"entries", "numel", "share", "relative" (null: not known, or infinite)}.
    """
    with one_line_errors():
        from sparse_optim.delta import load_delta, tensor_changes

        if plot is not None:
            check_picture(plot)
        path = _delta_path(delta_file)
        if path.is_dir() and _inspect_series(path, as_json):
            return
        delta = load_delta(path)
        if size or base is not None:
            quiet_libraries()
        changes = tensor_changes(delta, base_folder(base), sizes=size)
        if plot is not None:
            from sparse_optim.analysis.change_plot import draw_changes

            draw_changes(changes, f"Where {delta_file} changes the model", plot, size=size)
        if as_json:
            print_json(facts_of(delta) | ({"changes": change_facts(changes)} if size else {}))
            return
        console = Console()
        console.print(_summary(delta_file, delta))
        show_changes(console, changes, size=size, every=every)
        if delta.num_entries:
            console.print()
            console.print(sparse_table(delta, every, console.width))
        if delta.dense:
            console.print(dense_table(delta, every, console.width))
        if plot is not None:
            print_line(f"{plot}: the picture")


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
    a: Annotated[
        Path,
        typer.Argument(help="A delta file or folder of finetune, or a base model's folder."),
    ],
    b: Annotated[
        Path,
        typer.Argument(help="A delta file or folder of finetune, or a tuned model's folder."),
    ],
    out: Annotated[
        Path | None, typer.Option(help="Two models: write the changes from A to B to this file.")
    ] = None,
    originals: Annotated[
        bool, typer.Option(help="Two models: also store the base's values, for reverting.")
    ] = False,
    base: BaseModel = None,
    every: Annotated[
        bool, typer.Option("--all", help="Two deltas: compare each parameter, not each module.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Compare two deltas, or make a delta from two model folders.

    Of two deltas: the entries that they share, in all and by module, beside what two random choices
    in the same tensors would share. With --base, or where both store originals, also how their
    changes agree: signs, and cosines over all entries and over those in both. Deltas that share no
    parameter or no base, and models that share no tensor, are an error.

    --json prints, for two deltas, {"both", "only_a", "only_b", "equal" (entries), "max_difference",
    "mean_difference", "same_base", "jaccard", "dense_in_both", "total", "modules": by name (with
    --all by parameter)}, the last two with "entries_a", "entries_b", "both", "expected" (entries in
    both by chance), "jaccard", "share_a", "share_b" and (each null where the base's values are not
    known) "opposite" (entries in both that move in opposite directions), "cosine" and
    "cosine_both"; for two models what `inspect --json` prints of their delta.
    """
    with one_line_errors():
        from sparse_optim.delta import DeltaError, load_delta

        first, second = _delta_path(a), _delta_path(b)
        if first.is_dir() != second.is_dir():
            raise DeltaError("expected two delta files or two model folders, got one of each")
        if first.is_dir():
            if base is not None or every:
                raise DeltaError("--base and --all are for two deltas")
            _diff_models(first, second, out, originals, as_json)
            return
        if out is not None or originals:
            raise DeltaError("--out and --originals are for two model folders")
        if base is not None:
            quiet_libraries()
        _diff_deltas(load_delta(first), load_delta(second), base_folder(base), every, as_json)


def _inspect_series(folder: Path, as_json: bool) -> bool:
    """Show the members of a series; False: the folder has none."""
    from sparse_optim.finetune.series import read_series

    rows = read_series(folder)
    if not rows:
        return False
    if as_json:
        print_json({"members": rows})
        return True
    table = Table(title=plain(str(folder)), title_justify="left")
    table.add_column("file")
    for heading in ("budget", "step", "entries", "bytes", rows[0]["metric"]):
        table.add_column(plain(heading), justify="right")
    for row in rows:
        table.add_row(
            plain(row["file"]),
            f"{100 * row['share']:.3g}%",
            f"{row['step']:,}",
            f"{row['entries']:,}",
            f"{row['bytes']:,}",
            f"{row['value']:.4f}",
        )
    Console().print(table)
    return True


def _delta_path(path: Path) -> Path:
    """The delta in a folder that finetune wrote; any other path as it is."""
    if not path.is_dir():
        return path
    from sparse_optim.finetune.errors import FinetuneError
    from sparse_optim.finetune.output import DELTA_FILE, is_unfinished

    if is_unfinished(path):
        raise FinetuneError(f"{path} has no {DELTA_FILE} (an unfinished run)")
    return path / DELTA_FILE if (path / DELTA_FILE).is_file() else path


def _diff_deltas(a: Delta, b: Delta, base: Path | None, every: bool, as_json: bool) -> None:
    from sparse_optim.analysis.change_map import module_name
    from sparse_optim.delta import compare_deltas, overlap

    check_related(a, b)
    found = compare_deltas(a, b, base, group=str if every else module_name)
    facts = overlap_facts(a, b, overlap(a, b), found)
    if as_json:
        print_json(facts)
        return
    console = Console()
    console.print(diff_summary(facts))
    if found.parameters:
        console.print()
        console.print(diff_table(found, every, console.width))
    if facts["total"]["cosine"] is None:
        print_line(
            "Signs and cosines need the base's values: give --base, the model that was fine-tuned."
        )


def _diff_models(a: Path, b: Path, out: Path | None, originals: bool, as_json: bool) -> None:
    from sparse_optim.delta import Delta, folder_tensors, save_delta

    base, tuned = folder_tensors(a), folder_tensors(b)
    lines = check_related_models(base, tuned)
    delta = Delta.from_models(base, tuned, store_original=originals)
    if out is not None:
        save_delta(delta, out)
        lines.append(f"{out}: {out.stat().st_size:,} bytes")
    if as_json:
        print_json(facts_of(delta))
    else:
        Console().print(_summary(b, delta))
    for line in lines:
        print_line(line, err=as_json)


def _summary(path: Path, delta: Delta) -> Table:
    facts, table = facts_of(delta), fact_table(str(path))
    arguments = {key: value for key, value in delta.method.items() if key != "name"}
    table.add_row("method", plain(str(delta.method.get("name", "unknown"))))
    for key, value in arguments.items():
        parts = (
            {f"{key} {part}": item for part, item in value.items()}
            if isinstance(value, dict)
            else {key: value}
        )
        for name, item in parts.items():
            table.add_row(plain(f"  {name}"), plain(in_words(item)))
    entries, numel = facts["sparse_entries"], facts["sparse_numel"]
    share = f" ({entries / numel:.4%} of {numel:,})" if numel else ""
    table.add_row("sparse entries", f"{entries:,}{share}")
    table.add_row("sparse parameters", f"{len(delta.sparse):,}")
    table.add_row("dense tensors", f"{len(delta.dense):,}")
    table.add_row("tensor bytes", f"{facts['tensor_bytes']:,}")
    if facts["unmask_steps"]:
        first, last = facts["unmask_steps"]
        table.add_row("unmask steps", f"{first:,} to {last:,}")
    table.add_row("originals", "stored" if facts["originals"] else "not stored")
    table.add_row("fingerprint", facts["fingerprint"])
    if facts["parent"] is not None:
        removed = facts["removed_entries"]
        table.add_row("increment over", f"{facts['parent']} ({removed:,} entries removed)")
    return table

"""The commands that combine delta files: `merge`, `unmerge`."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from sparse_optim.cli.console import (
    one_line_errors,
    print_json,
    print_line,
    quiet_libraries,
)
from sparse_optim.cli.delta_tables import build_table
from sparse_optim.errors import SparseOptimError

if TYPE_CHECKING:
    from sparse_optim.delta import Agreement, Conflict, Delta  # torch: --help does without

BaseModel = Annotated[
    str | None,
    typer.Option(
        "--base",
        help="Model that was fine-tuned: built-in name, folder or hub id. Not needed if the deltas "
        "store originals.",
    ),
]
OutFile = Annotated[Path | None, typer.Option("--out", "-o", help="Delta file to write.")]


def register(app: typer.Typer) -> None:
    """Add the commands `merge` and `unmerge` to `app`."""
    app.command("merge")(merge)
    app.command("unmerge")(unmerge)


def merge(
    delta_files: Annotated[
        list[Path], typer.Argument(help="Delta files or folders of finetune, over one base.")
    ],
    base: BaseModel = None,
    out: OutFile = None,
    method: Annotated[str, typer.Option(help="sum, ties, dare or dare-ties.")] = "sum",
    weights: Annotated[
        str | None,
        typer.Option(help="A number for each delta, 1,0.5; a negative one takes a task away."),
    ] = None,
    density: Annotated[
        float | None,
        typer.Option(
            help="Share of each delta's entries that stays: ties, the largest; dare, at random."
        ),
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of dare.")] = None,
    dense: Annotated[
        Path | None,
        typer.Option(
            help="The delta, as named before, whose head and note of the model to keep where "
            "several have different ones."
        ),
    ] = None,
    originals: Annotated[
        bool, typer.Option(help="Also store the base's values, for reverting.")
    ] = False,
    report: Annotated[
        bool, typer.Option(help="Show where the deltas conflict: overlap, signs, cosines.")
    ] = False,
    every: Annotated[
        bool, typer.Option("--all", help="Show all parameters, not the ten of largest overlap.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Merge deltas over one base into one delta (--out), or show how they conflict (--report).

    sum adds the weighted changes (task arithmetic); ties keeps the largest, elects a sign for each
    entry and takes the mean of those that agree; dare drops changes at random and scales up the
    rest; dare-ties does both. `apply` writes base + merged delta as a model folder.

    --json prints {"out", "entries", "bytes" (each null without --out), "conflicts" (null without
    --report): a list of {"a", "b" (paths), "total", "parameters": by name}, each with "entries_a",
    "entries_b", "both", "expected" (entries in both by chance), "overlap" (both / the fewer
    entries), "opposite" (entries in both that move in opposite directions), "opposite_share",
    "cosine" and "cosine_both" (over the entries in both)}.
    """
    names = [str(path) for path in delta_files]
    with one_line_errors(), _by_file_name({f"deltas[{i}]": name for i, name in enumerate(names)}):
        quiet_libraries()
        from sparse_optim.delta import DeltaError, conflicts, merge_deltas, save_delta

        if out is None and not report:
            raise DeltaError("nothing to do: give --out FILE, --report, or both")
        _check_out(out, delta_files)
        if dense is not None and names.count(str(dense)) != 1:
            raise DeltaError(f"--dense {dense}: expected one of the deltas to merge, named once")
        numbers = None if weights is None else _numbers(weights)
        deltas, folder = [_load(path) for path in delta_files], base_folder(base)
        found = conflicts(deltas, folder) if report else []
        merged = None
        if out is not None:
            merged = merge_deltas(
                deltas,
                folder,
                method=method,
                weights=numbers,
                density=density,
                seed=seed,
                dense=None if dense is None else names.index(str(dense)),
                store_original=originals,
            )
            save_delta(merged, out)
        if as_json:
            print_json(
                {
                    "out": None if out is None else str(out),
                    "entries": None if merged is None else merged.num_entries,
                    "bytes": None if out is None else out.stat().st_size,
                    "conflicts": [_facts(each, names) for each in found] if report else None,
                }
            )
            return
        console = Console()
        if report:
            _print_conflicts(console, found, names, every)
        if merged is not None and out is not None:
            _say_written(out, merged)


def unmerge(
    merged_file: Annotated[Path, typer.Argument(help="A delta file that `merge` wrote.")],
    delta_file: Annotated[Path, typer.Argument(help="The delta to take out.")],
    rest: Annotated[list[Path], typer.Argument(help="All other deltas that were merged.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Delta file to write.")],
    base: BaseModel = None,
) -> None:
    """Take one delta out of a merged one: the result is that of merging the others, bit for bit.

    Weights and settings are those that the merged file records.
    """
    names = {"merged": str(merged_file), "delta": str(delta_file), "rest": "the other deltas"}
    for number, path in enumerate(rest):
        names |= {f"rest[{number}]": str(path), f"deltas[{number}]": str(path)}
    with one_line_errors(), _by_file_name(names):
        quiet_libraries()
        from sparse_optim import delta as deltas

        _check_out(out, [merged_file, delta_file, *rest])
        result = deltas.unmerge(
            _load(merged_file),
            _load(delta_file),
            [_load(path) for path in rest],
            base_folder(base),
        )
        deltas.save_delta(result, out)
        _say_written(out, result)


@contextmanager
def _by_file_name(names: Mapping[str, str]) -> Iterator[None]:
    """Let errors say the files' names instead of those of arguments, such as "deltas[0]"."""
    try:
        yield
    except SparseOptimError as error:
        told = re.sub(
            r"\bdeltas\[\d+\]|^(merged|delta|rest)(\[\d+\])?(?=:)",
            lambda found: names.get(found[0], found[0]),
            str(error),
        )
        if told == str(error):
            raise
        raise type(error)(told) from error


def _check_out(out: Path | None, inputs: Sequence[Path]) -> None:
    """Raise DeltaError for a place to which nothing can be written, or that would be lost."""
    from sparse_optim.delta import DeltaError
    from sparse_optim.finetune.reuse import find_delta

    if out is None:
        return
    if out.is_dir():
        raise DeltaError(f"--out {out}: it is a folder, name a file in it")
    if not out.parent.is_dir():
        raise DeltaError(f"--out {out}: there is no folder {out.parent}")
    for path in inputs:
        if out.exists() and out.samefile(find_delta(path)):
            raise DeltaError(f"--out {out}: it is one of the deltas, which would be lost")


def _say_written(out: Path, delta: Delta) -> None:
    whole = f" and {len(delta.dense)} dense tensors" if delta.dense else ""
    print_line(f"{out}: {delta.num_entries:,} entries{whole}, {out.stat().st_size:,} bytes")


def _numbers(text: str) -> list[float]:
    from sparse_optim.delta import DeltaError

    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise DeltaError(f"--weights: expected numbers such as 1,0.5, got {text!r}") from None


def _load(path: Path) -> Delta:
    from sparse_optim.delta import load_delta
    from sparse_optim.finetune.reuse import find_delta

    return load_delta(find_delta(path))


def base_folder(base: str | None) -> Path | None:
    """The folder of a model that is given by built-in name, folder or hub id; None of None."""
    from sparse_optim.finetune.models import find_model, local_folder

    if base is None or Path(base).is_dir():
        return None if base is None else Path(base)
    if Path(base).is_file():
        from sparse_optim.delta import DeltaError

        raise DeltaError(f"--base {base}: it is a file, name the folder of the model")
    return local_folder(find_model(base))


def _facts(found: Conflict, names: list[str]) -> dict[str, Any]:
    return {
        "a": names[found.a],
        "b": names[found.b],
        "total": _agreement_facts(found.total),
        "parameters": {name: _agreement_facts(part) for name, part in found.parameters.items()},
    }


def _agreement_facts(part: Agreement) -> dict[str, Any]:
    return {**asdict(part), "overlap": part.overlap, "opposite_share": part.opposite_share}


HEADINGS = ("in A", "in B", "in both", "overlap", "opposite", "cosine")


def _cells(part: Agreement) -> list[str]:
    return [
        f"{part.entries_a:,}",
        f"{part.entries_b:,}",
        f"{part.both:,}",
        f"{part.overlap:.2%}",
        f"{part.opposite_share:.2%}",
        f"{part.cosine:.4f}",
    ]


def _print_conflicts(
    console: Console, found: list[Conflict], names: list[str], every: bool
) -> None:
    for pair in found:
        print_line(f"A = {names[pair.a]}, B = {names[pair.b]}")
        parts = sorted(pair.parameters.items(), key=lambda item: -item[1].both)
        rows = [["all parameters", *_cells(pair.total)]]
        rows += [[name, *_cells(part)] for name, part in parts]
        console.print(build_table(("parameter", *HEADINGS), rows, every, console.width))

"""`sparse-optim compare`: one table and one picture of several runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from sparse_optim.cli.console import check_picture, one_line_errors, plain, print_json, print_line

if TYPE_CHECKING:
    from sparse_optim.analysis.compare import Run

NAME_WIDTH = 16  # columns of a name before it is folded


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""
    app.command("compare")(compare)


def compare(
    runs: Annotated[
        list[Path], typer.Argument(help="Output folders of finished `sparse-optim finetune` runs.")
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="File of the picture: .png, .pdf or .svg.")
    ] = Path("comparison.png"),
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Compare finished runs: quality, step time, optimizer state and delta size.

    Prints a table and draws a picture. Runs on different data, or with different metrics, get a
    table and a panel each. Settings that differ between runs are shown.

    --json prints {"runs": [...], "picture": path}. Each run has name, folder, method, data
    (dataset, dataset_config, split, examples, metric, tokens), settings, value (the metric of the
    model that was kept: with --best of the best evaluation, else of the last), active_entries,
    parameters, state_bytes, step_ms, update_ms, delta_bytes, verified and evaluations (pairs of
    step and value).
    """
    with one_line_errors():
        from sparse_optim.analysis.compare import load_runs
        from sparse_optim.analysis.comparison_plot import draw_comparison

        check_picture(output)
        found = load_runs(runs)
        draw_comparison(found, output)
        if as_json:
            print_json({"runs": [run.as_json() for run in found], "picture": str(output)})
            return
        show(found, Console())
        print_line(f"{output}: the picture")


def show(runs: Sequence[Run], console: Console) -> None:
    """Print a table for each group of comparable runs."""
    from sparse_optim.analysis.compare import groups_of, table_of

    for data, group in groups_of(runs).items():
        headings, rows = table_of(group)
        table = Table(box=box.SIMPLE_HEAD, title=plain(data.title), title_justify="left",
                      collapse_padding=True, pad_edge=False)  # fmt: skip
        for at, heading in enumerate(headings):
            longest = max(len(cells[at]) for cells in rows)
            left = heading in ("run", "method", "model", "device", "dtype")
            table.add_column(
                Text("\n").join(map(plain, heading.split(" ", 1))),
                justify="left" if left else "right",
                overflow="fold",
                no_wrap=not left,
                min_width=min(longest, NAME_WIDTH),
            )
        for cells in rows:
            table.add_row(*map(plain, cells))
        least = console.measure(table, options=console.options.update(max_width=1000)).minimum
        # A narrower console would lose columns without a word.
        Console(file=console.file, width=max(console.width, least)).print(table)
    console.print(
        "state: optimizer state. update: the part of a step that clips and updates. exact: base + "
        "delta is the trained model, bit for bit (-: not checked).",
        highlight=False,
    )

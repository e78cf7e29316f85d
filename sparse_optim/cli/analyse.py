"""`sparse-optim analyse`: draw and tabulate what runs recorded."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from sparse_optim.cli.console import one_line_errors, print_line

if TYPE_CHECKING:
    from sparse_optim.analysis.record import AllocationRecord

Runs = Annotated[list[Path], typer.Argument(help="Output folders of `sparse-optim finetune`.")]
Output = Annotated[
    Path | None,
    typer.Option(
        "--output", "-o", help="Write the pictures to this folder (default: RUN/analysis)."
    ),
]
MetricName = Annotated[
    str | None,
    typer.Option(help="Draw this evaluation metric (default: the metric of the first run)."),
]


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""
    app.command("analyse")(analyse)


def analyse(runs: Runs, output: Output = None, metric: MetricName = None) -> None:
    """Show where runs spent their budget: by tensor, layer and module, step by step.

    Draws several runs (increment and repeat, or several budgets) together, into the folder of the
    first run.
    """
    with one_line_errors():
        records = load_records(runs)
        metric = check_metric(records, metric)
        folder = runs[0] / "analysis" if output is None else output
        folder.mkdir(parents=True, exist_ok=True)
        written = draw(records, metric, folder)
        Console().print(summary(records, metric))
        for name, record in records.items():
            print_line(f"{name}: most entries in {', '.join(top_modules(record))}")
        print_line(f"{folder}: {', '.join(written)}")


def load_records(runs: Sequence[Path]) -> dict[str, AllocationRecord]:
    """The records by the names of their folders, or by path where two names are equal."""
    from sparse_optim.analysis.record import RecordError, load_record

    found = {}
    names = Counter(run.resolve().name for run in runs)
    for run in runs:
        name = run.resolve().name
        found[name if names[name] == 1 else str(run)] = load_record(run)
    for name, record in found.items():
        if not any(record.snapshots[-1].active):
            raise RecordError(f"{name}: no entry was ever active; nothing to draw")
    return found


def check_metric(records: dict[str, AllocationRecord], metric: str | None) -> str:
    """The metric to draw.

    Raises:
        RecordError: no run recorded it.
    """
    from sparse_optim.analysis.record import RecordError

    chosen = metric or next(iter(records.values())).metric
    known = {
        name
        for record in records.values()
        for snapshot in record.snapshots
        for name in snapshot.metrics
    }
    if known and chosen not in known:
        raise RecordError(
            f"--metric: no run recorded {chosen!r}; known: {', '.join(sorted(known))}"
        )
    return chosen


def draw(records: dict[str, AllocationRecord], metric: str, folder: Path) -> list[str]:
    """Draw all pictures; return the names of the files."""
    from sparse_optim.analysis import plots  # matplotlib: not needed for --help

    written = ["sparsity.png"]
    plots.draw_sparsity(records, folder / "sparsity.png")
    if any(record.evaluations(metric) for record in records.values()):
        plots.draw_metric(records, metric, folder / "metric.png")
        written.append("metric.png")
    for number, (name, record) in enumerate(records.items(), start=1):
        suffix = f"-{number}" if len(records) > 1 else ""
        title = f"{name} ({record.method}, budget {record.budget:,})"
        for kind, function in (
            ("allocation", plots.draw_allocation),
            ("growth", plots.draw_growth),
        ):
            function(record, title, folder / f"{kind}{suffix}.png")
            written.append(f"{kind}{suffix}.png")
    return written


def summary(records: dict[str, AllocationRecord], metric: str) -> Table:
    """One row for each run: its state at the end."""
    table = Table(box=None, pad_edge=False)
    for heading in ("run", "method"):
        table.add_column(heading, overflow="fold")
    for heading in ("step", "active", "tensors\nreached", "entropy\n(maximum)", metric):
        table.add_column(heading, justify="right")
    for name, record in records.items():
        last = record.snapshots[-1]
        reached = sum(count > 0 for count in last.active)
        entropy, maximum = record.sparsity_entropy()[-1], math.log(len(record.tensors))
        values = [value for _, _, value in record.evaluations(metric)]
        table.add_row(
            escape(name),
            escape(record.method),
            str(last.step),
            f"{sum(last.active):,}",
            f"{reached} of {len(record.tensors)}",
            f"{entropy:.2f} ({maximum:.2f})",
            f"{values[-1]:.4f}" if values else "-",
        )
    return table


def top_modules(record: AllocationRecord, number: int = 3) -> list[str]:
    """The modules with the most active entries at the end, each with its share of all of them."""
    from sparse_optim.analysis.measures import allocation_grid

    last = record.snapshots[-1]
    grid = allocation_grid(record.counts(last), record.sizes)
    totals = [
        (float(row[row > 0].sum()), name)
        for row, name in zip(grid.active, grid.modules, strict=True)
    ]
    best = sorted(totals, key=lambda item: -item[0])[:number]
    return [f"{name} {total / sum(last.active):.0%}" for total, name in best if total]

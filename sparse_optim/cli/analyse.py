"""`sparse-optim analyse`: pictures and a table of what runs recorded."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from sparse_optim.analysis.measures import allocation_grid
from sparse_optim.analysis.record import AllocationRecord, RecordError, load_record

Runs = Annotated[list[Path], typer.Argument(help="Output folders of `sparse-optim finetune`.")]
Output = Annotated[
    Path | None,
    typer.Option("--output", "-o", help="Folder for the pictures. Default: RUN/analysis."),
]
MetricName = Annotated[
    str | None, typer.Option(help="Evaluation metric to draw. Default: the first run's own.")
]


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""
    app.command("analyse")(analyse)


def analyse(runs: Runs, output: Output = None, metric: MetricName = None) -> None:
    """Show where runs spent their budget: by tensor, layer and module, step by step.

    Several runs (increment and repeat, or budgets) are drawn together, into the first one's folder.
    """
    try:
        records = load_records(runs)
        metric = check_metric(records, metric)
        folder = runs[0] / "analysis" if output is None else output
        folder.mkdir(parents=True, exist_ok=True)
        written = draw(records, metric, folder)
    except (RecordError, OSError) as error:
        Console(stderr=True).print(f"[bold red]Error:[/] {escape(str(error))}", soft_wrap=True)
        raise typer.Exit(1) from None
    console = Console()
    console.print(summary(records, metric))
    for name, record in records.items():
        line = f"{name}: most entries in {', '.join(top_modules(record))}"
        console.print(escape(line), highlight=False, soft_wrap=True)
    console.print(f"{folder}: {', '.join(written)}", highlight=False, soft_wrap=True)


def load_records(runs: Sequence[Path]) -> dict[str, AllocationRecord]:
    """The records by the folders' names; by their paths where names are the same."""
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
        RecordError: no run has it.
    """
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
    """Draw all pictures; return their names."""
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
    """A row for each run, as it ended."""
    table = Table(box=None, pad_edge=False)
    for heading in ("run", "method"):
        table.add_column(heading, overflow="fold")
    for heading in ("step", "active", "tensors\nreached", "entropy\n(greatest)", metric):
        table.add_column(heading, justify="right")
    for name, record in records.items():
        last = record.snapshots[-1]
        reached = sum(count > 0 for count in last.active)
        entropy, greatest = record.sparsity_entropy()[-1], math.log(len(record.tensors))
        values = [value for _, _, value in record.evaluations(metric)]
        table.add_row(
            escape(name),
            escape(record.method),
            str(last.step),
            f"{sum(last.active):,}",
            f"{reached} of {len(record.tensors)}",
            f"{entropy:.2f} ({greatest:.2f})",
            f"{values[-1]:.4f}" if values else "-",
        )
    return table


def top_modules(record: AllocationRecord, number: int = 3) -> list[str]:
    """The modules with most active entries at the end, each with its share of them."""
    last = record.snapshots[-1]
    grid = allocation_grid(record.counts(last), record.sizes)
    totals = [
        (float(row[row > 0].sum()), name)
        for row, name in zip(grid.active, grid.modules, strict=True)
    ]
    best = sorted(totals, key=lambda item: -item[0])[:number]
    return [f"{name} {total / sum(last.active):.0%}" for total, name in best if total]

"""`sparse-optim analyse`: draw and tabulate what runs recorded."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from sparse_optim.cli.console import one_line_errors, plain, print_json, print_line

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
    typer.Option(help="Draw this evaluation metric (default: the metric of each run)."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""
    app.command("analyse")(analyse)


def analyse(
    runs: Runs, output: Output = None, metric: MetricName = None, as_json: AsJson = False
) -> None:
    r"""Show where runs spent their budget: by tensor, layer and module, step by step.

    Draws several runs (increment and repeat, or several budgets) together, into the folder of the
    first run. metric.png has a panel for each data set: runs on other data are not joined.

    --json prints {"runs": [...], "pictures": \[paths]}. Each run has name, folder, method, budget,
    data (null without a metrics.json), step, active, tensors, tensors_reached, entropy,
    maximum_entropy (nats), metric ({name, value, step}, or null) and modules ({name: active
    entries}, largest first). All are of the last step, but metric is of the model that was kept:
    with --best of the best evaluation, else of the last.
    """
    with one_line_errors():
        found = load_analysed(runs, metric)
        folder = runs[0] / "analysis" if output is None else output
        folder.mkdir(parents=True, exist_ok=True)
        written = draw(found, folder)
        if as_json:
            pictures = [str(folder / name) for name in written]
            print_json({"runs": [as_row(run) for run in found], "pictures": pictures})
            return
        Console().print(summary(found))
        for run in found:
            print_line(f"{run.name}: most entries in {', '.join(top_modules(run.record))}")
        for run in found:
            if not run.evaluations:
                print_line(f"{run.name}: not in metric.png, because it was never evaluated")
        print_line(f"{folder}: {', '.join(written)}")


@dataclass(frozen=True)
class Analysed:
    """A run: its record, the metric to draw, and what its metrics.json says.

    Attributes:
        data: that it was evaluated on; "" without a metrics.json.
        kept: step of the evaluation whose model was kept; None: the last one.
    """

    name: str
    folder: Path
    record: AllocationRecord
    metric: str
    data: str
    kept: int | None

    @property
    def evaluations(self) -> list[tuple[int, int, float]]:
        """(step, active entries, value) of the metric."""
        return self.record.evaluations(self.metric)

    @property
    def result(self) -> dict[str, Any] | None:
        """Name, value and step of the metric of the model that was kept; None: not evaluated."""
        values = {step: value for step, _, value in self.evaluations}
        if not values:
            return None
        step = self.kept if self.kept in values else max(values)
        return {"name": self.metric, "value": values[step], "step": step}


def load_analysed(folders: Sequence[Path], metric: str | None) -> list[Analysed]:
    """Read the runs.

    Raises:
        RecordError: a record is missing or empty, or an evaluated run lacks the metric.
    """
    from sparse_optim.analysis.compare import run_names
    from sparse_optim.analysis.record import RecordError, load_record

    found = []
    for name, folder in run_names(folders).items():
        record = load_record(folder)
        if not any(record.snapshots[-1].active):
            raise RecordError(f"{name}: no entry was ever active; nothing to draw")
        known = {key for snapshot in record.snapshots for key in snapshot.metrics}
        chosen = metric or record.metric
        if known and chosen not in known:
            raise RecordError(
                f"--metric: {name} has no {chosen!r}; it recorded {', '.join(sorted(known))}"
            )
        found.append(Analysed(name, folder, record, chosen, *kept_of(name, folder)))
    return found


def kept_of(name: str, folder: Path) -> tuple[str, int | None]:
    """The data that a run was evaluated on, and the step of the model that was kept.

    ("", None) for a folder that `finetune` did not write; no step if an earlier version wrote it.
    """
    from sparse_optim.analysis.compare import METRICS_FILE, read_metrics, run_of

    if not (folder / METRICS_FILE).exists():
        return "", None
    metrics = read_metrics(folder)
    return run_of(name, folder, metrics).data.place, metrics["metric"].get("step")


def draw(runs: Sequence[Analysed], folder: Path) -> list[str]:
    """Draw all pictures; return the names of the files."""
    from sparse_optim.analysis import metric_plot, plots  # matplotlib: not needed for --help

    written = ["sparsity.png"]
    plots.draw_sparsity({run.name: run.record for run in runs}, folder / "sparsity.png")
    panels: dict[tuple[str, str], dict[str, AllocationRecord]] = {}
    for run in runs:
        if run.evaluations:
            panels.setdefault((run.data, run.metric), {})[run.name] = run.record
    if panels:
        metric_plot.draw_metric(
            [metric_plot.MetricPanel(*key, records) for key, records in panels.items()],
            folder / "metric.png",
        )
        written.append("metric.png")
    for number, run in enumerate(runs, start=1):
        suffix = f"-{number}" if len(runs) > 1 else ""
        title = f"{run.name} ({run.record.method}, budget {run.record.budget:,})"
        for kind, function in (
            ("allocation", plots.draw_allocation),
            ("growth", plots.draw_growth),
        ):
            function(run.record, title, folder / f"{kind}{suffix}.png")
            written.append(f"{kind}{suffix}.png")
    return written


def as_row(run: Analysed) -> dict[str, Any]:
    """The state of a run at its last step, and its result, as JSON values."""
    record, last = run.record, run.record.snapshots[-1]
    return {
        "name": run.name,
        "folder": str(run.folder),
        "method": record.method,
        "budget": record.budget,
        "data": run.data or None,
        "step": last.step,
        "active": sum(last.active),
        "tensors": len(record.tensors),
        "tensors_reached": sum(count > 0 for count in last.active),
        "entropy": record.sparsity_entropy()[-1],
        "maximum_entropy": math.log(len(record.tensors)),
        "metric": run.result,
        "modules": module_totals(record),
    }


def summary(runs: Sequence[Analysed]) -> Table:
    """One row for each run: its state at the end."""
    table = Table(box=None, pad_edge=False)
    several = len({(run.data, run.metric) for run in runs}) > 1
    for heading in ("run", "method", *(["data"] if several else [])):
        table.add_column(heading, overflow="fold")
    value_heading = "metric" if several else escape(runs[0].metric)
    for heading in ("step", "active", "tensors\nreached", "entropy\n(maximum)", value_heading):
        table.add_column(heading, justify="right")
    for run in runs:
        row = as_row(run)
        value = "-" if run.result is None else f"{run.result['value']:.4f}"
        if run.result is not None and run.result["step"] != row["step"]:
            value += f" (step {run.result['step']})"
        table.add_row(
            plain(run.name),
            plain(run.record.method),
            *([plain(run.data or "unknown")] if several else []),
            str(row["step"]),
            f"{row['active']:,}",
            f"{row['tensors_reached']} of {row['tensors']}",
            f"{row['entropy']:.2f} ({row['maximum_entropy']:.2f})",
            plain(f"{run.metric} {value}" if several else value),
        )
    return table


def module_totals(record: AllocationRecord) -> dict[str, int]:
    """Active entries of each module at the end, largest first; modules without any are left out."""
    from sparse_optim.analysis.measures import allocation_grid

    grid = allocation_grid(record.counts(record.snapshots[-1]), record.sizes)
    totals = {
        name: int(row[row > 0].sum()) for row, name in zip(grid.active, grid.modules, strict=True)
    }
    return {
        name: total for name, total in sorted(totals.items(), key=lambda item: -item[1]) if total
    }


def top_modules(record: AllocationRecord, number: int = 3) -> list[str]:
    """The modules with the most active entries at the end, each with its share of all of them."""
    totals = module_totals(record)
    active = sum(totals.values())
    return [f"{name} {total / active:.0%}" for name, total in list(totals.items())[:number]]

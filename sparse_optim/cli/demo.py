"""The demo: one encoder, one task, three ways to fine-tune it.

    python -m sparse_optim.cli.demo --output demo-output

Fine-tunes the built-in MiniLM encoder on the built-in TREC questions with ID3, with full AdamW and
with the encoder frozen, and prints the quality and the cost of each.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from sparse_optim.cli.console import one_line_errors, print_line, quiet_libraries
from sparse_optim.finetune.config import FinetuneConfig

MODEL, DATASET = "minilm", "trec6"
COLUMNS = (
    "method",
    "test\naccuracy",
    "entries\ntrained",
    "state\nMB",
    "step\nms",
    "update\nms",
    "delta\nMB",
    "exact",
)
KEPT = (
    *("metric", "active_entries", "state_bytes", "step_ms", "update_ms", "delta_bytes"),
    *("verified", "train_seconds", "versions", "device"),
)


@dataclass(frozen=True)
class Contender:
    """A row of the table; its settings were chosen on a part of train, never on test."""

    title: str
    method: str
    lr: float
    head_lr: float


CONTENDERS = (
    Contender("ID3, 1%", "id3", lr=7e-4, head_lr=5e-3),
    Contender("full AdamW", "full", lr=3e-4, head_lr=5e-3),
    Contender("head only", "frozen", lr=5e-2, head_lr=5e-2),
)


def configuration(contender: Contender, output: Path, steps: int) -> FinetuneConfig:
    """The job of one row."""
    return FinetuneConfig(
        model=MODEL,
        dataset=DATASET,
        output=output / contender.method,
        method=contender.method,
        budget=0.01,
        lr=contender.lr,
        head_lr=contender.head_lr,
        steps=steps,
        batch_size=32,
        max_length=32,
        eval_every=max(1, steps // 3),
        overwrite=True,
    )


def announce(output: Path, steps: int, console: Console) -> None:
    """Print what will happen and how long it takes."""
    titles = ", ".join(contender.title for contender in CONTENDERS)
    minutes = max(1, round(steps / 50))  # 3 minutes for 150 steps on 2 idle cores
    lines = (
        f"Fine-tunes MiniLM (22.7M parameters) on TREC questions (six kinds), {len(CONTENDERS)} "
        f"times: {titles}; {steps} steps of 32 questions each, then a test on 881 others.",
        f"Takes about {minutes} min on two CPU cores, less on a GPU. Results go to {output}/.",
    )
    for line in lines:
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def row(title: str, metrics: Mapping[str, Any]) -> tuple[str, ...]:
    """The cells of one run."""
    return (
        title,
        f"{metrics['metric']['value']:.3f}",
        f"{metrics['active_entries']:,}",
        f"{metrics['state_bytes'] / 1e6:.2f}",
        f"{metrics['step_ms']:.0f}",
        f"{metrics['update_ms']:.1f}",
        f"{metrics['delta_bytes'] / 1e6:.2f}",
        "yes" if metrics["verified"] else "NO",
    )


def show(rows: list[tuple[str, ...]], console: Console) -> None:
    """The table on the console."""
    table = Table(box=box.SIMPLE_HEAD, title=f"{MODEL} on {DATASET}", title_justify="left")
    for index, column in enumerate(COLUMNS):
        table.add_column(column, justify="left" if index == 0 else "right")
    for cells in rows:
        table.add_row(*cells)
    console.print(table)


def write(results: Mapping[str, Any], rows: list[tuple[str, ...]], output: Path) -> None:
    """The results as JSON, and the table as Markdown."""
    (output / "demo.json").write_text(json.dumps(results, indent=2) + "\n")
    headings = tuple(column.replace("\n", " ") for column in COLUMNS)
    lines = [headings, tuple("---" for _ in COLUMNS), *rows]
    (output / "demo.md").write_text("".join(f"| {' | '.join(cells)} |\n" for cells in lines))


def main(
    output: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("demo-output"),
    steps: Annotated[int, typer.Option(help="Optimizer steps of each run.")] = 150,
) -> None:
    """Fine-tune MiniLM on TREC questions three ways and compare."""
    with one_line_errors(interrupted=f"Finished runs are in {output}/."):
        quiet_libraries()
        from sparse_optim.finetune.job import run

        console = Console()
        announce(output, steps, console)
        results: dict[str, Any] = {}
        rows = []
        for contender in CONTENDERS:
            metrics = run(configuration(contender, output, steps), console).metrics
            results[contender.method] = {name: metrics[name] for name in KEPT}
            rows.append(row(contender.title, metrics))
        show(rows, console)
        write(results, rows, output)
        console.print(
            "state: optimizer state. update: the part of a step that clips and updates. exact: "
            "base + delta == trained model, bit for bit, from the file and a newly loaded base.",
        )
        print_line(f"Deltas, metrics and curves are in {output}/.")


if __name__ == "__main__":
    typer.run(main)

"""The demo: one encoder, one task, three ways to fine-tune it.

    python -m sparse_optim.cli.demo --output demo-output

Fine-tunes the built-in MiniLM encoder on the built-in TREC questions with ID3, with full AdamW and
with the encoder frozen, and prints the quality and the cost of each.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from sparse_optim.analysis.compare import Run, run_of, table_of
from sparse_optim.analysis.comparison_plot import draw_comparison
from sparse_optim.cli.compare import show
from sparse_optim.cli.console import one_line_errors, print_line, quiet_libraries
from sparse_optim.finetune.config import FinetuneConfig

MODEL, DATASET = "minilm", "trec6"
PICTURE = "comparison.png"
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
    Contender("ID3, 1%", "id3", lr=2e-3, head_lr=5e-3),
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


def write(results: Mapping[str, Any], runs: Sequence[Run], output: Path) -> None:
    """The results as JSON, the table as Markdown, and the picture."""
    (output / "demo.json").write_text(json.dumps(results, indent=2) + "\n")
    headings, rows = table_of(runs)
    lines = [headings, ["---" for _ in headings], *rows]
    (output / "demo.md").write_text("".join(f"| {' | '.join(cells)} |\n" for cells in lines))
    draw_comparison(runs, output / PICTURE)


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
        runs = []
        for contender in CONTENDERS:
            config = configuration(contender, output, steps)
            metrics = run(config, console).metrics
            results[contender.method] = {name: metrics[name] for name in KEPT}
            runs.append(run_of(contender.title, config.output, metrics))
        show(runs, console)
        write(results, runs, output)
        print_line(f"Deltas, metrics and curves are in {output}/, the comparison in {PICTURE}.")


if __name__ == "__main__":
    typer.run(main)

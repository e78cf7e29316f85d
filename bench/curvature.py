"""Measure curvature for the rows of the quality experiment, and draw tuned rates against it.

    python -m bench.curvature --data-folder GLUE_FOLDER [--tasks trec50,cola] [--draw]

For each task and row one line in bench/results/curvature/rates.jsonl: the loss along AdamW's first
step on the entries that the row trains, as `finetune --lr auto` measures it. Lines that are there
are not measured again. The picture and the table stand beside them; tuned rates come from
bench/results/quality/cells.jsonl.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench import quality
from bench.environment import RESULTS
from bench.pictures import draw_rates
from bench.tables import table

FOLDER = RESULTS / "curvature"
FACTOR = 2.0  # the goal: within this factor of the best rate
CLOSE = 0.01  # a rate with a score as near to the best is as good


@dataclass(frozen=True)
class Tuned:
    """Rates that were tried for a row on a task, with their scores."""

    scores: Mapping[float, float]

    @property
    def best(self) -> float:
        """The rate that tuning chose."""
        return max(sorted(self.scores), key=self.scores.__getitem__)

    @property
    def good(self) -> tuple[float, float]:
        """The lowest and highest of the rates that score within a point of the best."""
        least = self.scores[self.best] - CLOSE
        close = [lr for lr, value in self.scores.items() if value >= least]
        return min(close), max(close)

    def misses(self, lr: float) -> float:
        """The factor between a rate and the best."""
        return max(lr / self.best, self.best / lr)


def tuned(folder: Path = quality.FOLDER) -> dict[tuple[str, str], Tuned]:
    """(task, row) -> the rates that tuning tried."""
    found: dict[tuple[str, str], dict[float, float]] = {}
    for line in (folder / "cells.jsonl").read_text().splitlines():
        outcome = json.loads(line)
        cell = outcome["cell"]
        if cell["stage"] == "tune":
            value = outcome["values"][cell["task"]]
            scores = found.setdefault((cell["task"], cell["row"]), {})
            scores[cell["lr"]] = -math.inf if value is None else value
    return {key: Tuned(scores) for key, scores in found.items()}


def measured(folder: Path = FOLDER) -> list[dict[str, Any]]:
    """The lines of rates.jsonl."""
    path = folder / "rates.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def pairs(
    folder: Path = FOLDER, cells: Path = quality.FOLDER
) -> Iterator[tuple[dict[str, Any], Tuned]]:
    """Each measured line with the tuned rates of its row and task."""
    rates = tuned(cells)
    for line in measured(folder):
        if (line["task"], line["row"]) in rates:
            yield line, rates[line["task"], line["row"]]


def comparison(folder: Path = FOLDER, cells: Path = quality.FOLDER) -> str:
    """Show suggested and tuned rates, and how many are near."""
    names = {label: row.name for row in quality.ROWS for label in row.labels.values()}
    lines, factors, close = [], [], 0
    for line, tried in pairs(folder, cells):
        lr = line["lr"]
        low, high = tried.good
        factor = tried.misses(lr) if lr else math.inf
        factors.append(factor)
        close += bool(lr and low / FACTOR <= lr <= high * FACTOR)
        span = f"{low:.2g}" if low == high else f"{low:.2g} to {high:.2g}"
        shown = f"{lr:.2g}" if lr else "none"
        lines.append(
            [names.get(line["row"], line["row"]), line["task"], f"{line['sign_curvature']:.2g}",
             shown, f"{tried.best:.2g}", span, f"{factor:.1f}"]
        )  # fmt: skip
    near = sum(factor <= FACTOR for factor in factors)
    heads = ["", "task", "curvature", "suggested", "best tuned", "within a point", "factor"]
    return (
        f"{near} of {len(factors)} suggested rates are within a factor of {FACTOR:g} of the best "
        f"tuned one (median {statistics.median(factors):.1f}, at most {max(factors):.1f}), {close} "
        f"within that factor of a rate that scores within a point of the best.\n\n"
        + table(heads, lines)
    )


def draw(folder: Path = FOLDER, cells: Path = quality.FOLDER) -> None:
    """Draw tuned rates against curvature and against suggested rates."""
    names = {label: row.name for row in quality.ROWS for label in row.labels.values()}
    drawn = [
        (names.get(line["row"], line["row"]), line, tried.best, tried.good)
        for line, tried in pairs(folder, cells)
        if line["lr"]
    ]
    draw_rates(drawn, FACTOR, folder / "rates.png")


def measure(data_folder: Path | None, tasks: set[str], rows: set[str], threads: int | None) -> None:
    """Add the missing lines."""
    # transformers: not needed to draw
    from rich.console import Console

    from sparse_optim.experiments.cells import Cell
    from sparse_optim.experiments.quality import QUALITY
    from sparse_optim.experiments.runner import Runner, RunOptions
    from sparse_optim.finetune.auto_rate import curvature_of
    from sparse_optim.finetune.models import set_threads

    set_threads(threads)
    done = {(line["task"], line["row"]) for line in measured()}
    runner = Runner(QUALITY, RunOptions(FOLDER, data_folder), Console())
    for block in QUALITY.blocks:
        for task in block.tasks:
            for row in block.rows:
                wanted = (not tasks or task.name in tasks) and (not rows or row.label in rows)
                if not wanted or (task.name, row.label) in done:
                    continue
                done.add((task.name, row.label))
                config = runner.config(Cell(task, row, 1e-3, 0, "tune"))
                found = curvature_of(config, runner.inputs_of(config))
                line = {"task": task.name, "row": row.label, **vars(found), "lr": found.lr}
                del line["sharpness"]  # not measured
                print(line, flush=True)
                with (FOLDER / "rates.jsonl").open("a") as file:
                    file.write(json.dumps(line) + "\n")


def main() -> None:
    """Measure, print the comparison and draw."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--data-folder", type=Path, help="as for sparse-optim experiment")
    parser.add_argument("--tasks", default="", help="only these, separated by commas")
    parser.add_argument("--rows", default="", help="only these, separated by commas")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--draw", action="store_true", help="measure nothing")
    arguments = parser.parse_args()
    if not arguments.draw:
        tasks, rows = (
            set(filter(None, text.split(","))) for text in (arguments.tasks, arguments.rows)
        )
        measure(arguments.data_folder, tasks, rows, arguments.threads)
    if not measured():
        sys.exit("nothing is measured")
    draw()
    print(comparison())


if __name__ == "__main__":
    main()

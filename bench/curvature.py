"""Measure curvature for the rows of the quality experiment, and compare tuned rates with it.

    python -m bench.curvature --data-folder GLUE_FOLDER [--tasks trec50,cola]
    python -m bench.curvature --data-folder GLUE_FOLDER --tasks trec50 --sharpness

For each task and row one line in bench/results/curvature/rates.jsonl: the size of AdamW's first
step relative to the weights, from which `finetune --lr auto` takes its rate, and slope and
curvature of the loss along it. Lines that are there are not measured again. Tuned rates come from
bench/results/quality/cells.jsonl; `bench.report` writes table and picture into
docs/learning-rates.md. With --sharpness, sharpness.jsonl gets the largest eigenvalue of the Hessian
on the entries of a mask, which takes a minute a row, and how they crowd in rows and columns.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench import quality
from bench.environment import RESULTS
from bench.pictures import draw_rates
from bench.tables import table
from sparse_optim.analysis.relative_step import BEST_LORA_STEP, BEST_STEP, length_factor
from sparse_optim.experiments.quality import QUALITY

FOLDER = RESULTS / "curvature"
PICTURE = RESULTS / "learning-rates.png"
FACTOR = 2.0  # the goal: within this factor of the best rate
STEPS = {task.name: task.steps or 0 for block in QUALITY.blocks for task in block.tasks}
ITERATIONS = 10  # of the power method
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
    """The lines of rates.jsonl, and the rate that follows from each."""
    return [line | {"lr": suggested(line)} for line in _lines(folder / "rates.jsonl")]


def suggested(line: Mapping[str, Any]) -> float:
    """The rate that follows from a relative step, for runs of the task's length."""
    rate = best_step(line["row"]) / float(line["relative_step"])
    return rate * length_factor(STEPS[line["task"]])


def best_step(row: str) -> float:
    """The relative step of the rates that were tuned for a kind of rows."""
    return BEST_LORA_STEP if row.startswith("lora") else BEST_STEP


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
    lines, factors, close = [], [], 0
    of_method: dict[str, list[float]] = {}
    for line, tried in pairs(folder, cells):
        lr = line["lr"]
        low, high = tried.good
        factor = tried.misses(lr)
        factors.append(factor)
        of_method.setdefault(line["row"], []).append(lr / tried.best)
        close += low / FACTOR <= lr <= high * FACTOR
        span = f"{low:.2g}" if low == high else f"{low:.2g} to {high:.2g}"
        figures = [f"{line['relative_step']:.3g}", f"{line['sign_curvature']:.2g}", f"{lr:.2g}"]
        name = quality.NAMES.get(line["row"], line["row"])
        lines.append([name, line["task"], *figures, f"{tried.best:.2g}", span, f"{factor:.1f}"])
    near = sum(factor <= FACTOR for factor in factors)
    means = [statistics.geometric_mean(quotients) for quotients in of_method.values()]
    misses = [max(mean, 1 / mean) for mean in means]
    right = sum(miss <= FACTOR for miss in misses)
    measures = ["relative step", "curvature", "suggested"]
    heads = ["", "task", *measures, "best tuned", "within a point", "factor"]
    return (
        f"{near} of {len(factors)} suggested rates are within a factor of {FACTOR:g} of the best "
        f"tuned one, which was the goal for all (median {statistics.median(factors):.1f}, at most "
        f"{max(factors):.1f}); {close} are within that factor of a rate that scores within a point "
        "of the best. Averaged over tasks (geometric mean), the rates of "
        f"{right} of {len(misses)} methods are (at most {max(misses):.1f}).\n\n"
        + table(heads, lines)
    )


def section() -> str:
    """The picture and the comparison, for docs/learning-rates.md."""
    return (
        f"![Learning rates](../bench/results/{PICTURE.name})\n\n{comparison()}\n\n"
        f"Before training, of the masks at 0.5%:\n\n{sharpness_table()}"
    )


def draw(folder: Path = FOLDER, cells: Path = quality.FOLDER, path: Path = PICTURE) -> None:
    """Draw tuned rates against curvature and against suggested rates."""
    drawn = [
        (quality.NAMES.get(line["row"], line["row"]), line, tried.best, tried.good)
        for line, tried in pairs(folder, cells)
    ]
    draw_rates(drawn, FACTOR, path)


def sharpness_table(folder: Path = FOLDER, cells: Path = quality.FOLDER) -> str:
    """Show the largest eigenvalues and the crowding beside the best rates."""
    rates, rows = tuned(cells), []
    for line in _lines(folder / "sharpness.jsonl"):
        row = line["row"]
        crowds = [
            "" if line[key] is None else f"{line[key]:.0f}" for key in ("in_row", "in_column")
        ]
        best = rates.get((line["task"], row))
        rows.append([quality.NAMES.get(row, row), line["task"], f"{line['sharpness']:.2g}", *crowds,
                     "" if best is None else f"{best.best:.2g}"])  # fmt: skip
    heads = ["", "task", "largest eigenvalue", "entries in an entry's row", "in its column"]
    return table([*heads, "best tuned rate"], rows)


@dataclass(frozen=True)
class Wanted:
    """What to measure: tasks and rows by name, all if empty."""

    data_folder: Path | None
    tasks: set[str]
    rows: set[str]
    threads: int | None


def prepared(wanted: Wanted, done: set[tuple[str, str]]) -> Iterator[tuple[str, str, Any]]:
    """Task, row, and the model with batches and mask of what is wanted and not `done`."""
    # transformers: not needed to draw
    from rich.console import Console

    from sparse_optim.experiments.cells import Cell
    from sparse_optim.experiments.runner import Runner, RunOptions
    from sparse_optim.finetune.auto_rate import prepare
    from sparse_optim.finetune.models import set_threads

    tasks, rows = wanted.tasks, wanted.rows
    set_threads(wanted.threads)
    FOLDER.mkdir(parents=True, exist_ok=True)
    runner = Runner(QUALITY, RunOptions(FOLDER, wanted.data_folder), Console())
    for block in QUALITY.blocks:
        for task in block.tasks:
            for row in block.rows:
                chosen = (not tasks or task.name in tasks) and (not rows or row.label in rows)
                if not chosen or (task.name, row.label) in done:
                    continue
                done.add((task.name, row.label))
                config = runner.config(Cell(task, row, 1e-3, 0, "tune"))
                yield task.name, row.label, prepare(config, runner.inputs_of(config))


def measure(wanted: Wanted) -> None:
    """Add the missing lines."""
    from sparse_optim.analysis.curvature import curvature
    from sparse_optim.analysis.relative_step import relative_step

    done = {(line["task"], line["row"]) for line in measured()}
    for task, row, found in prepared(wanted, done):
        what = found.model, found.batches, found.mask
        step = None if found.is_head else relative_step(*what)
        if step is None:  # no weight of a Linear module moves
            continue
        bent = curvature(*what, iterations=0)
        line = {"task": task, "row": row, "relative_step": step.size}
        line |= {"entries": bent.entries, "slope": bent.slope}
        _add("rates.jsonl", line | {"sign_curvature": bent.sign_curvature})


def measure_sharpness(wanted: Wanted) -> None:
    """Add the missing lines of largest eigenvalues and crowding."""
    from sparse_optim.analysis.curvature import crowding, curvature
    from sparse_optim.optim.param_groups import linear_weights

    done = {(line["task"], line["row"]) for line in _lines(FOLDER / "sharpness.jsonl")}
    for task, row, found in prepared(wanted, done):
        bent = curvature(found.model, found.batches, found.mask, iterations=ITERATIONS)
        linear = linear_weights(found.model)
        shapes = {
            name: tuple(param.shape)
            for name, param in found.model.named_parameters()
            if id(param) in linear and found.mask.get(name) is not None
        }
        crowd = None if row.startswith("lora") else crowding(shapes, found.mask)
        line = {"task": task, "row": row, "sharpness": bent.sharpness}
        line |= {"in_row": crowd and crowd.row, "in_column": crowd and crowd.column}
        _add("sharpness.jsonl", line)


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def _add(name: str, line: Mapping[str, Any]) -> None:
    print(line, flush=True)
    with (FOLDER / name).open("a") as file:
        file.write(json.dumps(line) + "\n")


def main() -> None:
    """Measure, and print the comparison."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--data-folder", type=Path, help="as for sparse-optim experiment")
    parser.add_argument("--tasks", default="", help="only these, separated by commas")
    parser.add_argument("--rows", default="", help="only these, separated by commas")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--sharpness", action="store_true", help="largest eigenvalues and crowding")
    arguments = parser.parse_args()
    tasks, rows = (set(filter(None, text.split(","))) for text in (arguments.tasks, arguments.rows))
    wanted = Wanted(arguments.data_folder, tasks, rows, arguments.threads)
    if arguments.sharpness:
        measure_sharpness(wanted)
        print(sharpness_table())
    else:
        measure(wanted)
        print(comparison())


if __name__ == "__main__":
    main()

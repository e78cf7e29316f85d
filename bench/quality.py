"""Tables and picture of the recorded quality experiment, for README.md and docs/benchmarks.md."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from bench.environment import RESULTS
from bench.tables import table
from sparse_optim.experiments.table import change, forgotten

FOLDER = RESULTS / "quality"
TASKS = {
    "conll2003": "CoNLL-2003, F1",
    "trec50": "TREC-50, accuracy",
    "stsb": "STS-B, correlation",
    "cola": "CoLA, Matthews",
}
MORE_TASKS = {"mrpc": "MRPC, accuracy", "tweets": "tweets, correlation"}
SMALL_TASKS = ("conll2003", "trec50")  # of the picture: have runs at both budgets
BUDGET, SMALL = "112827", "11282"
TICKS: dict[float, str] = {11_282: "11,282\n0.05%", 112_827: "112,827\n0.5%"}
LABEL = "mean of CoNLL-2003 (F1) and TREC-50 (accuracy), per cent"
FULL, LORA = "full", "lora-r3"
SEEDS = 3


@dataclass(frozen=True, eq=False)
class Row:
    """A row of the tables.

    Attributes:
        labels: of the experiment's rows, by budget.
        name: for readers. pool: which entries compete.
    """

    labels: Mapping[str, str]
    name: str
    pool: str = ""

    def is_ours(self) -> bool:
        """Whether the row runs on this package's engine: it has a budget."""
        return self.labels[BUDGET].endswith(f"-{BUDGET}")


def masked(name: str, label: str, pool: str = "Linear") -> Row:
    """A method with a budget."""
    return Row({budget: f"{label}-{budget}" for budget in (BUDGET, SMALL)}, name, pool)


ROWS = (
    Row({BUDGET: FULL, SMALL: FULL}, "full fine-tuning"),
    Row({BUDGET: LORA, SMALL: "lora-r1@qv"}, "LoRA"),
    masked("random mask", "r-mask@linear"),
    masked("PaFi", "pafi@linear"),
    masked("ID3, budget spent in a fifth of the run", "id3@early"),
    masked("ID3, in half of the run", "id3@half"),
    masked("ID3, in the whole run", "id3@whole"),
    masked("ID3, as in its paper", "id3@paper", "all"),
    masked("ID3, as in its paper, at 5e-4", "id3@paper-rate", "all"),
    masked("PaFi, at 5e-4", "pafi@paper-rate", "all"),
    masked("random mask, at 5e-4", "r-mask@paper-rate", "all"),
    masked("static D3", "static-d3@linear"),
    masked("Fish", "fish@linear"),
    masked("LIFT", "lift@linear"),
    masked("SHiRA, SNIP", "shira-snip@linear"),
    masked("SHiRA, magnitude", "shira@linear"),
    masked("GEM", "gem@linear"),
    masked("Super", "super@linear"),
    masked("random mask, all parameters", "r-mask", "all"),
    Row({BUDGET: "bitfit"}, "BitFit", "biases"),
    Row({BUDGET: "frozen"}, "head only"),
)

NAMES = {label: row.name for row in ROWS for label in row.labels.values()}

Cell = dict[str, Any]


@cache
def runs(folder: Path = FOLDER) -> tuple[Cell, ...]:
    """The finished runs on test sets."""
    lines = (folder / "cells.jsonl").read_text().splitlines()
    return tuple(cell for cell in map(json.loads, lines) if cell["cell"]["stage"] == "run")


def of(cells: Iterable[Cell], label: str, tasks: Iterable[str]) -> list[Cell]:
    """The runs of a row on some tasks."""
    wanted = set(tasks)
    return [c for c in cells if c["cell"]["row"] == label and c["cell"]["task"] in wanted]


@dataclass(frozen=True)
class Score:
    """Mean over seeds in per cent, sample deviation (None for one seed), number of seeds."""

    mean: float
    deviation: float | None
    seeds: int

    def __str__(self) -> str:
        spread = "" if self.deviation is None else f" ± {self.deviation:.1f}"
        return f"{self.mean:.1f}{spread}" + ("" if self.seeds == SEEDS else f" (n = {self.seeds})")


def score(cells: Iterable[Cell], tasks: Sequence[str]) -> Score | None:
    """The score of a row's runs: for each seed that all tasks have, their mean. None without one.

    A run that diverged counts as 0.
    """
    by_seed: dict[int, dict[str, float]] = {}
    for cell in cells:
        task = cell["cell"]["task"]
        by_seed.setdefault(cell["cell"]["seed"], {})[task] = 100 * (cell["values"][task] or 0.0)
    means = [
        statistics.fmean(values[task] for task in tasks)
        for values in by_seed.values()
        if all(task in values for task in tasks)
    ]
    if not means:
        return None
    deviation = statistics.stdev(means) if len(means) > 1 else None
    return Score(statistics.fmean(means), deviation, len(means))


def complete(cells: Iterable[Cell]) -> tuple[str, ...]:
    """The tasks on which the first and the last row to run (full, ID3) have all seeds."""
    core = (FULL, f"id3@early-{BUDGET}")
    seen = {(c["cell"]["task"], c["cell"]["row"], c["cell"]["seed"]) for c in cells}
    return tuple(
        task
        for task in TASKS
        if all((task, label, seed) in seen for label in core for seed in range(SEEDS))
    )


def full_table(folder: Path = FOLDER) -> str:
    """Show scores by task and cost at 0.5%, then scores at 0.05%."""
    cells = runs(folder)
    tasks = complete(cells)
    parts = [
        "0.5% of the entries (112,827; LoRA of rank 3: 124,416), three seeds:",
        scores_table(cells, BUDGET, tasks),
        "What runs cost and lose. Time and size of the delta: float32, two idle CPU threads "
        "(bench/results/costs). Forgetting: how well cosines of the encoder's vectors rank the "
        "pairs of STS-B (Spearman), of the base model and after training on the other tasks:",
        costs_table(cells, tasks, costs()),
    ]
    more = [task for task in MORE_TASKS if of(cells, FULL, [task])]
    if more:
        parts += [
            "Two further tasks at 0.5%, for the rows that were run on them:",
            scores_table(cells, BUDGET, more),
        ]
    if any(of(cells, row.labels.get(SMALL, ""), SMALL_TASKS) for row in ROWS[2:]):
        parts += [
            "0.05% of the entries (11,282; LoRA of rank 1 on query and value: 9,216):",
            scores_table(cells, SMALL, SMALL_TASKS),
        ]
    return "\n\n".join(parts)


def scores_table(cells: Sequence[Cell], budget: str, tasks: Sequence[str]) -> str:
    """Show a line for each row that has runs, the mean over tasks as a share of full's."""
    whole = score(of(cells, FULL, tasks), tasks)
    lines = []
    for row in ROWS:
        mine = of(cells, row.labels.get(budget, ""), tasks)
        if not mine:
            continue
        by_task = [score(of(mine, row.labels[budget], [task]), [task]) for task in tasks]
        mean = score(mine, tasks)
        share = f"{mean.mean / whole.mean:.1%}" if mean and whole else ""
        shown = ["" if one is None else str(one) for one in (*by_task, mean)]
        lines.append([row.name, row.pool, rates(mine, tasks), *shown, share])
    names = [(TASKS | MORE_TASKS)[task] for task in tasks]
    heads = ["", "pool", "learning rates", *names, "mean", "of full"]
    return table(heads, lines)


def rates(cells: Iterable[Cell], tasks: Sequence[str]) -> str:
    """The tuned rates, in the order of the tasks."""
    found = {cell["cell"]["task"]: cell["cell"]["lr"] for cell in cells}
    return ", ".join(f"{found[task]:.2g}" if task in found else "-" for task in tasks)


def costs(folder: Path = RESULTS / "costs") -> dict[str, dict[str, Any]]:
    """What rows cost on an idle machine, as the table of that experiment has it."""
    summaries = json.loads((folder / "table.json").read_text())
    return {summary["row"]: summary for summary in summaries}


def forgetting(cells: Sequence[Cell]) -> str:
    """'0.872 -> 0.788 ± 0.003': the mean over tasks, and its deviation between seeds."""
    by_seed = {seed: [c for c in cells if c["cell"]["seed"] == seed] for seed in range(SEEDS)}
    after = [lost["after"] for mine in by_seed.values() if (lost := forgotten(mine)) is not None]
    shown = change(forgotten(cells))
    if len(after) < 2 or None in after:
        return shown
    return f"{shown} ± {statistics.stdev(after):.3f}"


def costs_table(
    cells: Sequence[Cell], tasks: Sequence[str], measured: Mapping[str, Mapping[str, Any]]
) -> str:
    """Show entries, time of a step, state, delta and forgetting of the rows at 0.5%.

    Args:
        measured: row -> step_ms and delta_bytes.
    """
    lines = []
    for row in ROWS:
        mine = of(cells, row.labels.get(BUDGET, ""), tasks)
        if {cell["cell"]["task"] for cell in mine} != set(tasks):
            continue  # means over other tasks would not compare
        entries = statistics.median(c["active_entries"] - c["fresh_entries"] for c in mine)
        state = statistics.median(cell["state_bytes"] for cell in mine) / 1e6
        found = measured.get(row.labels[BUDGET])
        own = ["", ""]
        if found is not None:
            own = [f"{found['step_ms']:.0f}", f"{found['delta_bytes'] / 1e6:.2f}"]
        time, size = own
        lines.append([row.name, f"{entries:,.0f}", time, f"{state:.2f}", size, forgetting(mine)])
    return table(["", "entries", "ms a step", "state MB", "delta MB", "forgetting"], lines)


def points(folder: Path = FOLDER) -> dict[str, list[tuple[float, Score]]]:
    """For the picture: name -> (entries, mean score over the tasks with both budgets), of the rows
    with all seeds."""
    cells, found = runs(folder), {}
    for row in ROWS:
        line = []
        for label in dict.fromkeys(row.labels.values()):
            mine = of(cells, label, SMALL_TASKS)
            mean = score(mine, SMALL_TASKS)
            if mean is not None and mean.seeds == SEEDS:
                entries = statistics.median(c["active_entries"] - c["fresh_entries"] for c in mine)
                line.append((entries, mean))
        if line and line[0][0] > 0:
            found[row.name] = line
    return found


def headline(folder: Path = FOLDER) -> str:
    """Show the picture, and the best masks beside full fine-tuning and LoRA."""
    cells = runs(folder)
    tasks = complete(cells)
    found = {row: score(of(cells, row.labels[BUDGET], tasks), tasks) for row in ROWS}
    means = {row: one.mean for row, one in found.items() if one is not None}
    best = max((row for row in means if row.is_ours()), key=means.__getitem__)
    by_name = {row.name: mean for row, mean in means.items()}
    whole, lora = by_name["full fine-tuning"], by_name["LoRA"]
    others = ", ".join(
        f"{row.name} ({row.pool}) {mean:.1f}"
        for row, mean in sorted(means.items(), key=lambda each: -each[1])
        if row.is_ours() and row != best
    )
    return (
        "![Score against trained entries](bench/results/quality.png)\n\n"
        "The picture has the two tasks that were run at both budgets; points at the same budget "
        "are shifted sideways. On four tasks: MiniLM (22.7M), 0.5% of its entries, rates tuned for "
        "each method and task, mean of "
        f"{', '.join(TASKS[task].split(',')[0] for task in tasks)} over three seeds: full "
        f"fine-tuning {whole:.1f}, LoRA of the same size {lora:.1f}, {best.name} ({best.pool}) "
        f"{means[best]:.1f}, {means[best] / whole:.1%} of full fine-tuning; {others}."
    )

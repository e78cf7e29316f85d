"""Turn the recorded results into tables and plots: python -m bench.report [--write]

Without --write, prints all tables of the CPU and GPU results. With it, writes

    README.md                   headlines, between the markers bench:begin/end and quality:begin/end
    docs/benchmarks.md          the main tables, between the same markers and deltas:begin/end
    bench/results/tables.md     all tables
    bench/results/*-steps.png   plots of step times
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bench import (
    backward,
    console,
    curvature,
    deltas,
    goals,
    gpu_report,
    quality,
    sampling,
    scale,
    whole_step,
)
from bench.environment import RESULTS, ROOT
from bench.memory import held_bytes
from bench.pictures import draw_scores, draw_whole_steps
from bench.plot import draw, draw_gpu
from bench.results import SYNTHETIC, Results, newest
from bench.tables import count, table

PLOT = "![Step time relative to one read of the gradients]({}bench/results/cpu-steps.png)"
GPU_PLOT = "![GPU: step time relative to one read of the gradients]({}bench/results/gpu-steps.png)"
BASELINES = ("fused", "clip+fused", "foreach", "clip+foreach")
TITLES = {
    "fused": "fused AdamW",
    "clip+fused": "clip + fused",
    "foreach": "foreach AdamW",
    "clip+foreach": "clip + foreach",
}
RATIOS = {"fused": "fused AdamW", "clip+fused": "clip + fused", "read": "read of the gradients"}
# With fewer clean calls than this the machine was busy and ratios mean nothing: threads that share
# their work statically wait for the slower core, ours do not.
LEAST_CLEAN = 0.5


def caption(results: Results) -> str:
    """Describe machine, threads, versions, commit, date, and the share of clean calls."""
    data = results.data
    machine, versions = data["machine"], data["versions"]
    pages = ", huge pages (THP_MEM_ALLOC_ENABLE=1)" if machine.get("huge_pages") else ""
    changed = " with local changes" if data["dirty"] else ""
    settings = data["settings"]
    return (
        f"{machine['cpu']}, {machine['threads']} threads, "
        f"{machine['memory_bytes'] / 2**30:.0f} GiB{pages}; torch {versions['torch']}, "
        f"Python {versions['python']}, sparse_optim {versions['sparse_optim']}, "
        f"commit {data['commit'][:8]}{changed}, {data['date'][:10]}. "
        f"Medians of {settings['rounds']} rounds; median of {settings['runs']} processes; "
        f"{results.clean_share():.0%} of the calls were clean."
    )


def steps_table(results: Results, dtype: str, quotas: Sequence[int]) -> str:
    """Show times of our step by model, B and k (slowest exp), and ratios to the baselines."""
    settings = results.data["settings"]
    rows = []
    for model in settings["models"]:
        for budget in settings["budgets"]:
            for quota in quotas:
                labels = {"budget": budget, "quota": quota}
                exp = results.slowest_exp(model, dtype, **labels)
                rows.append([f"{model}, B = {count(budget)}, k = {quota}",
                             *_step_cells(results, model, dtype, exp=exp, **labels)])  # fmt: skip
    header = ["our step, clipping included", "ms", "quartiles", "/ fused AdamW",
              "/ clip + fused", "/ read"]  # fmt: skip
    return table(header, rows)


def _step_cells(results: Results, model: str, dtype: str, **labels: float) -> list[str]:
    first, third = results.quartiles(model, dtype, "ours", **labels)
    ratios = [results.ratio(model, dtype, baseline, "ours", **labels) for baseline in RATIOS]
    return [
        f"{results.time(model, dtype, 'ours', **labels) / 1e3:.2f}",
        f"{first / 1e3:.2f} to {third / 1e3:.2f}",
        *(f"{ratio:.2f}" for ratio in ratios),
    ]


def grads_table(results: Results) -> str:
    """Show times of our step (slowest exp) and ratios to AdamW, by kind of gradients."""
    settings, rows = results.data["settings"], []
    for grads in results.grads():
        kind = results.of(grads)
        for model, dtype in kind.cases():
            for quota in settings["quotas"]:
                labels = {"budget": min(settings["budgets"]), "quota": quota}
                exp = kind.slowest_exp(model, dtype, **labels)
                stages = kind.stages(model, dtype, exp=exp, **labels)
                rows.append([f"{model} {dtype}, {grads}, k = {quota}", f"{stages['cut'] / 1e3:.2f}",
                             *_step_cells(kind, model, dtype, exp=exp, **labels)])  # fmt: skip
    header = ["our step, clipping included", "cut, ms", "step, ms", "quartiles", "/ fused AdamW",
              "/ clip + fused", "/ read"]  # fmt: skip
    return table(header, rows)


def baselines_table(results: Results) -> str:
    """Show the milliseconds of the baselines, and the scan relative to the read."""
    rows = []
    for model, dtype in results.cases():
        read = results.time(model, dtype, "read")
        size = results.runs(model, dtype)[0]["grad_bytes"]
        smallest = min(results.data["settings"]["budgets"])
        rows.append(
            [
                f"{model} {dtype}",
                f"{read / 1e3:.2f}",
                f"{size / read / 1e3:.1f}",
                f"{results.ratio(model, dtype, 'read', 'scan', budget=smallest):.2f}",
                *(f"{results.time(model, dtype, name) / 1e3:.1f}" for name in BASELINES),
            ]
        )
    header = ["ms", "read gradients", "GB/s", "scan / read", *TITLES.values()]
    return table(header, rows)


def stages_table(results: Results) -> str:
    """Show the milliseconds of each stage of our step."""
    rows, names = [], ["scan", "cut", "append", "clip", "update", "prepare", "python"]
    settings = results.data["settings"]
    for model, dtype in results.cases():
        for budget in settings["budgets"]:
            for quota in settings["quotas"]:
                for exp in settings["exps"]:
                    labels = {"budget": budget, "quota": quota, "exp": exp}
                    stages = results.stages(model, dtype, **labels)
                    title = f"{model} {dtype}, B = {count(budget)}, k = {quota}, exp = {exp:g}"
                    total = results.time(model, dtype, "ours", **labels)
                    names = [name for name in names if name in stages]  # no "clip" in old ones
                    spent = [f"{stages[name] / 1e3:.2f}" for name in names]
                    rows.append([title, f"{total / 1e3:.2f}", *spent])
    return table(["ms", "step", *names], rows)


def memory_table(results: Results, exp: float = 0.0) -> str:
    """Show the bytes held between steps beside the limit and AdamW."""
    rows = []
    for row in results.data["memory"]:
        if row["exp"] == exp:
            held = held_bytes(row)
            rows.append(
                [
                    f"{row['model']} {row['dtype']}, B = {count(row['budget'])}",
                    f"{row['state_bytes'] / 1e6:.1f}",
                    f"{row['work_bytes'] / 1e6:.1f}",
                    f"{held / row['budget']:.1f}",
                    f"{held / row['limit_bytes']:.2f}",
                    f"{row['adamw_bytes'] / 1e6:.0f}",
                    f"{row['adamw_float32_bytes'] / 1e6:.0f}",
                ]
            )
    header = ["MB", "state", "work space", "bytes per budget entry", "/ limit", "AdamW",
              "AdamW, float32 state and master"]  # fmt: skip
    return table(header, rows)


def peaks_table(results: Results) -> str:
    """Show the memory that one step needs in addition to what is held before it."""
    rows = []
    names = ["ours", *BASELINES]
    for model, dtype in results.cases():
        records = results.runs(model, dtype)[0]["subjects"]
        peaks = [
            max(record["peak_bytes"] or 0 for record in records if record["name"] == name)
            for name in names
        ]
        rows.append([f"{model} {dtype}", *(f"{peak / 1e6:.1f}" for peak in peaks)])
    return table(["MB within a step", "ours, at most", *TITLES.values()], rows)


def shown_quota(results: Results) -> int:
    """Return the quota of the short tables: 320, or the middle one of those measured."""
    quotas: list[int] = results.data["settings"]["quotas"]
    return 320 if 320 in quotas else quotas[len(quotas) // 2]


def headline(results: Results) -> str:
    """Show whole training steps, and the optimizer's step alone in a sentence, for README.md."""
    results = results.of(SYNTHETIC)
    budget, quota = min(results.data["settings"]["budgets"]), shown_quota(results)
    ratios = {name: _range(_ratios(results, name, budget, quota)) for name in RATIOS}
    memory = [row for row in results.data["memory"] if row["budget"] == budget]
    held = _range([held_bytes(row) / 1e6 for row in memory], "{:.0f}")
    adamw = _range([row["adamw_bytes"] / 1e6 for row in memory], "{:.0f}")
    return "\n\n".join(
        [
            *whole_step.headline(RESULTS),
            f"The optimizer's step alone, with {count(budget)} active entries: {ratios['fused']} "
            f"of the time of fused AdamW, {ratios['clip+fused']} of clipping and fused AdamW; it "
            f"holds {held} MB where AdamW holds {adamw}.",
        ]
    )


def _ratios(results: Results, baseline: str, budget: int, quota: int) -> list[float]:
    """Divide our step (slowest exp) by a baseline, for every model and dtype."""
    labels = {"budget": budget, "quota": quota}
    return [
        results.ratio(
            model, dtype, baseline, "ours",
            exp=results.slowest_exp(model, dtype, **labels), **labels,
        )
        for model, dtype in results.cases()
    ]  # fmt: skip


def _range(values: Sequence[float], form: str = "{:.2f}") -> str:
    low, high = form.format(min(values)), form.format(max(values))
    return low if low == high else f"{low} to {high}"


def main_tables(results: Results) -> str:
    """Show the plot and the main tables, for docs/benchmarks.md."""
    results = results.of(SYNTHETIC)
    quotas = [shown_quota(results)]
    dtypes = results.data["settings"]["dtypes"]
    parts = [PLOT.format("../")]
    parts += [f"**{dtype}**\n\n{steps_table(results, dtype, quotas)}" for dtype in dtypes]
    parts += [baselines_table(results), memory_table(results), caption(results)]
    parts.append(
        "The tables show the slower of exp = 0 and 2; all tables are in "
        "[bench/results/tables.md](../bench/results/tables.md)."
    )
    parts += whole_step.section(RESULTS) + sampling.section(RESULTS) + backward.section(RESULTS)
    return "\n\n".join([*parts, *gpu_section(_gpu_main)])


def _gpu_main(data: dict[str, Any]) -> str:
    return f"{GPU_PLOT.format('../')}\n\n{gpu_report.short_table(data)}"


def gpu_section(tables: Callable[[dict[str, Any]], str], folder: Path = RESULTS) -> list[str]:
    """Show the GPU part of a report; return [] if no GPU results are recorded."""
    data = newest("gpu-*.json", folder)
    return [] if data is None else [tables(data)]


def draw_gpu_steps(folder: Path) -> None:
    """Draw the newest GPU results, if there are any."""
    data = newest("gpu-*.json", folder)
    if data is not None:
        draw_gpu(data, folder / "gpu-steps.png")


def full_report(every: Results) -> str:
    """Show every table, and the goals; tables without kinds of gradients are of synthetic ones."""
    results = every.of(SYNTHETIC)
    dtypes, quotas = (results.data["settings"][name] for name in ("dtypes", "quotas"))
    parts = ["# Recorded results", caption(every)]
    for dtype in dtypes:
        parts += [f"## Our step, {dtype}", steps_table(results, dtype, quotas)]
    parts += ["## Baselines", baselines_table(results)]
    parts += ["## Where the time goes", stages_table(results)]
    if len(every.grads()) > 1:
        parts += ["## Kinds of gradients", grads_table(every)]
    parts += ["## Memory held", memory_table(results)]
    parts += ["With exp < 0 (4 bytes a tile more):", memory_table(results, exp=-1.0)]
    parts += ["## Memory within a step", peaks_table(results)]
    parts += ["## Goals", f"```text\n{goals.check(every)}\n```"]
    parts += ["## Sampling", *sampling.section(RESULTS)]
    parts += ["## Whole training steps", *whole_step.section(RESULTS), *backward.section(RESULTS)]
    return "\n\n".join([*parts, *gpu_section(gpu_report.full_report)]) + "\n"


def insert(text: str, name: str, block: str) -> str:
    """Replace the text between the markers <!-- name:begin --> and <!-- name:end -->.

    Raises:
        ValueError: unless both markers are there once, in this order.
    """
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    before, *rest = text.split(begin)
    if len(rest) != 1 or rest[0].count(end) != 1:
        raise ValueError(f"expected {begin} before {end}, both once")
    return f"{before}{begin}\n\n{block}\n\n{end}{rest[0].split(end)[1]}"


def blocks(results: Results) -> dict[Path, dict[str, str]]:
    """The generated parts of README.md and docs/: file -> name of a block -> its text."""
    docs = ROOT / "docs"
    return {
        ROOT / "README.md": {"bench": headline(results), "quality": quality.headline()},
        docs / "benchmarks.md": {
            "bench": main_tables(results),
            "deltas": deltas.section(),
            "quality": quality.full_table(),
        },
        docs / "learning-rates.md": {"rates": curvature.section()},
        docs / "scale.md": {"scale": scale.section()},
    }


def write(results: Results) -> None:
    """Write the generated parts of README.md and docs/, tables.md and the plots."""
    for path, parts in blocks(results).items():
        text = path.read_text()
        for name, block in parts.items():
            text = insert(text, name, block)
        path.write_text(text)
    (RESULTS / "tables.md").write_text(full_report(results))
    draw(results.of(SYNTHETIC), RESULTS / "cpu-steps.png")
    draw_whole_steps(whole_step.shown(RESULTS), RESULTS / "whole-step.png")
    draw_scores(quality.points(), quality.TICKS, quality.LABEL, RESULTS / "quality.png")
    curvature.draw()
    scale.draw()
    draw_gpu_steps(RESULTS)


def main() -> None:
    """Print all tables, or write the generated files."""
    parser = console.parser("report", __doc__)
    parser.add_argument("--results", type=Path, help="default: the newest in bench/results")
    parser.add_argument("--write", action="store_true", help="update README.md, docs and results")
    parser.add_argument("--plot", type=Path, help="write only the plot, to this file")
    arguments = parser.parse_args()
    results = Results.load(arguments.results)
    if arguments.plot:
        draw(results.of(SYNTHETIC), arguments.plot)
    elif not arguments.write:
        print(full_report(results))
    elif results.clean_share() < LEAST_CLEAN:
        sys.exit(
            f"not written: only {results.clean_share():.0%} of the calls were clean; measure again "
            "on a quiet machine"
        )
    else:
        write(results)


if __name__ == "__main__":
    main()

"""Show GPU results files (see bench.gpu) as tables: python -m bench.gpu_report FILE ... [--write]

Several files, as those of `bench.gpu_first` and `bench.gpu_second`, are shown as one; --write
records them as one in bench/results/gpu-<card>-<date>.json, which `bench.report` then shows.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable, Sequence
from datetime import date
from pathlib import Path
from typing import Any

from bench import console, environment, gpu_goals, training
from bench.gpu_times import (
    OUR_MODE,
    Record,
    bandwidths,
    median_ms,
    over_read,
    select,
    share,
    speed,
    times_faster,
)
from bench.tables import count, table

MODES = {"alone": "alone", "clip": "clipped", "scaler": "scaler + clipped", "graph": "CUDA graph"}


def caption(data: dict[str, Any]) -> str:
    """Describe card, versions, commit and date."""
    machine, versions = data["machine"], data["versions"]
    where = machine.get("gpu", f"dry run on {machine['cpu']}")
    changed = " with local changes" if data["dirty"] else ""
    clock = "CUDA events" if "gpu" in machine else "the CPU's clock"
    stand_in = (
        " *: bfloat16, for which CUDA has no `unscale_`: a multiplication of all gradients instead."
        if any("unscale" in record for record in data["records"])
        else ""
    )
    return (
        f"{where}; torch {versions['torch']}, Python {versions['python']}, sparse_optim "
        f"{versions['sparse_optim']}, commit {data['commit'][:8]}{changed}, {data['date'][:10]}. "
        f"Medians by {clock}, caches flushed before each call. Clipped: `clip_grad_norm_` before "
        "AdamW, `max_grad_norm` in our step. Scaler: `unscale_` and `clip_grad_norm_` before "
        f"AdamW, `sparse_optim.amp.GradScaler` with our step.{stand_in}"
    )


def bandwidth_line(data: dict[str, Any]) -> str:
    """Show the bandwidth of the memory: the fastest copy and read."""
    return ", ".join(f"{name} {best:,.0f} GB/s" for name, best in bandwidths(data).items())


def cells(data: dict[str, Any], kind: str) -> list[tuple[str, str]]:
    """Return each (model, dtype) of a phase kind, in the order measured."""
    return list(dict.fromkeys((each["model"], each["dtype"]) for each in select(data, kind)))


def steps_table(data: dict[str, Any]) -> str:
    """Show the milliseconds of every subject by mode, and the host's for the clipped step."""
    rows = []
    for model, dtype in cells(data, "steps"):
        found = select(data, "steps", model=model, dtype=dtype)
        for name, exp in dict.fromkeys((each["name"], each.get("exp")) for each in found):
            own = [each for each in found if (each["name"], each.get("exp")) == (name, exp)]
            by_mode = {each.get("mode", "alone"): each for each in own}
            title = f"{model} {dtype}, {name}" + ("" if exp is None else f", exp = {exp:g}")
            rows.append([title, *(_ms(by_mode.get(mode)) for mode in MODES),
                         _host_ms(by_mode.get("clip"))])  # fmt: skip
    return table(["ms", *MODES.values(), "host, clipped"], rows)


def _ms(record: Record | None) -> str:
    if record is None:
        return ""
    return f"{median_ms(record):.3f}" + ("*" if "unscale" in record else "")


def _host_ms(record: Record | None) -> str:
    if record is None or "host_us" not in record:
        return ""
    return f"{statistics.median(record['host_us']) / 1e3:.3f}"


def ratios_table(data: dict[str, Any]) -> str:
    """Show our clipped step over one read of the gradients, and fused AdamW over our step."""
    rows = []
    for own in select(data, "steps", mode="clip"):
        if "exp" not in own:
            continue
        labels = {key: own[key] for key in ("model", "dtype", "name", "exp")}
        title = f"{own['model']} {own['dtype']}, {own['name']}, exp = {own['exp']:g}"
        row = [title, _number(over_read, data, own)]
        row += [_number(times_faster, data, mode, **labels) for mode in OUR_MODE]
        marks = select(data, "steps", model=own["model"], dtype=own["dtype"], unscale="stand-in")
        row[-1] += "*" if marks and row[-1] else ""
        rows.append(row)
    header = ["our step, clipping included", "step / read", "fused AdamW / step",
              "clip + fused / step", "unscale + clip + fused / step"]  # fmt: skip
    return table(header, rows)


def _number(value: Callable[..., float], *arguments: Any, **labels: Any) -> str:
    """Show a ratio, or "" if something it needs was not measured."""
    try:
        return f"{value(*arguments, **labels):.2f}"
    except LookupError:
        return ""


def stages_table(data: dict[str, Any]) -> str:
    """Show the milliseconds of each operation alone, and the scan's share of the bandwidth."""
    found = select(data, "stages")
    names = list(dict.fromkeys(each["stage"] for each in found))
    rows: dict[str, dict[str, str]] = {}
    for each in found:
        title = f"{each['model']} {each['dtype']}, {each['name']}, exp = {each['exp']:g}"
        row = rows.setdefault(title, {})
        row[each["stage"]] = _ms(each)
        if each["stage"] == "scan":
            row["scan GB/s"] = f"{speed(each):,.0f}"
            row["scan / copy"] = _number(share, data, each, "copy")
            row["scan / read"] = _number(share, data, each, "read")
    names += ["scan GB/s", "scan / copy", "scan / read"]
    return table(
        ["ms", *names], [[title, *(row.get(name, "") for name in names)]
                         for title, row in rows.items()],
    )  # fmt: skip


def factors_table(data: dict[str, Any]) -> str:
    """Show the time as one factor varies."""
    rows = [
        [
            f"{each['model']} {each['dtype']}, {each['name']}, B = {count(each['budget'])}, "
            f"k = {each['quota']}",
            _ms(each),
        ]
        for each in select(data, "factors")
    ]
    return table(["ms", "clipped"], rows)


def memory_table(data: dict[str, Any]) -> str:
    """Show the megabytes that each optimizer holds, and its peak in a step."""
    rows = [
        [
            f"{each['model']} {each['dtype']}, {each['name']}",
            f"{each['held_bytes'] / 1e6:,.1f}",
            f"{each['step_peak_bytes'] / 1e6:,.1f}",
        ]
        for each in data["records"]
        if "held_bytes" in each
    ]
    return table(["MB", "held", "peak in a step"], rows)


def training_table(data: dict[str, Any]) -> str:
    """Show memory and time of whole training steps."""
    found = select(data, "training")
    return training.table([{**each, "kind": each["name"]} for each in found]) if found else ""


def caps_table(data: dict[str, Any]) -> str:
    """Show the peak within the memory of smaller cards, beside the estimate."""
    rows = [
        [
            f"{each['model']} {each['dtype']}, {each['name']}",
            *(f"{each[name] / 2**30:.2f}" for name in CAPS),
            each["fits"],
        ]
        for each in data["records"]
        if "cap_bytes" in each and "failed" not in each
    ]
    header = ["in backward, GiB", "memory", "peak", "reserved", "estimate", "estimated to fit"]
    return table(header, rows) if rows else ""


CAPS = ("cap_bytes", "peak_bytes", "reserved_bytes", "estimate_bytes")


def operations_table(data: dict[str, Any]) -> str:
    """Show sampled gradients beside the dense product, and selections beside torch.topk."""
    rows = [
        [
            f"gradient of {each['outputs']} x {each['inputs']}, {each['tokens']} tokens, "
            + (f"{each['share']:.2%} by {each['name']}" if "share" in each else "dense"),
            _ms(each),
        ]
        for each in select(data, "sampled_grad")
    ]
    rows += [
        [f"{count(each['quota'])} of {count(each['entries'])} entries, {each['name']}", _ms(each)]
        for each in select(data, "topk")
    ]
    return table(["ms", ""], rows) if rows else ""


def failures(data: dict[str, Any]) -> str:
    """List phases that failed or were skipped, and subjects that could not be measured."""
    lines = [
        f"- {phase['name']}: {phase['status']}"
        for phase in data["phases"]
        if phase["status"] != "ok"
    ]
    for each in data["records"]:
        if "failed" in each:
            labels = (each.get(key) for key in ("model", "dtype", "kind", "name"))
            lines.append(f"- {' '.join(filter(None, labels))}: {each['failed']}")
        if "absent" in each:
            lines.append(f"- {each['name']}: {each['absent']}")
    return "\n".join(dict.fromkeys(lines))


def _sections(parts: Sequence[tuple[str, str]]) -> str:
    return "\n\n".join(f"{title}\n\n{body}" if title else body for title, body in parts if body)


def short_table(data: dict[str, Any]) -> str:
    """Show the main tables, for the terminal and docs/benchmarks.md."""
    tables = (steps_table, ratios_table, stages_table, bandwidth_line, caption)
    parts = [("", each(data)) for each in tables]
    parts[3:3] = [("", each(data)) for each in (training_table, caps_table, operations_table)]
    return _sections([*parts, ("Not measured:", failures(data))])


def full_report(data: dict[str, Any]) -> str:
    """Show every table."""
    return _sections(
        [
            ("# Recorded on a GPU", caption(data)),
            ("## Steps", steps_table(data)),
            ("## Ratios", ratios_table(data)),
            ("## Stages", stages_table(data)),
            ("## Budgets and quotas", factors_table(data)),
            ("## Memory", memory_table(data)),
            ("## Whole training steps", training_table(data)),
            ("## In the memory of smaller cards", caps_table(data)),
            ("## Single operations", operations_table(data)),
            ("## Bandwidth", bandwidth_line(data)),
            ("## Not measured", failures(data)),
            ("## GPU goals", f"```text\n{gpu_goals.check(data)}\n```"),
        ]
    )


def join(files: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Join runs of one commit on one card; of a phase that ran again, the last run counts.

    Raises:
        ValueError: commits or cards differ.
    """
    commits = {each["commit"] for each in files}
    cards = {each["machine"].get("gpu", "") for each in files}
    for name, values in (("commits", commits), ("cards", cards)):
        if len(values) > 1:
            raise ValueError(f"the files are of different {name}: {', '.join(sorted(values))}")
    phases: dict[str, dict[str, Any]] = {}
    ran: dict[str, int] = {}  # name of a phase -> file of its last run
    for index, each in enumerate(files):
        for phase in each["phases"]:
            if not phase["status"].startswith("left out"):
                ran[phase["name"]] = index
            if ran.get(phase["name"], index) == index:
                phases[phase["name"]] = phase
    records = [
        record
        for index, each in enumerate(files)
        for record in each["records"]
        if ran.get(record.get("phase"), index) == index
    ]
    dirty = any(each["dirty"] for each in files)
    return {**files[0], "dirty": dirty, "phases": list(phases.values()), "records": records}


def results_name(gpu: str, day: str = "") -> str:
    """Return the name of a results file, of today by default."""
    card = gpu.lower().replace("nvidia ", "").replace(" ", "-")
    return f"gpu-{card}-{day or date.today().isoformat()}.json"


def main() -> None:
    """Show the files."""
    parser = console.parser("gpu_report", __doc__)
    parser.add_argument("files", nargs="+", type=Path, help="results files")
    parser.add_argument("--write", action="store_true", help="record them as one")
    arguments = parser.parse_args()
    try:
        data = join([json.loads(path.read_text()) for path in arguments.files])
    except ValueError as error:
        sys.exit(str(error))
    print(f"{short_table(data)}\n\n{gpu_goals.check(data)}")
    if arguments.write:
        if data["dry_run"]:
            sys.exit("a dry run is not recorded")
        path = environment.RESULTS / results_name(data["machine"]["gpu"], data["date"][:10])
        path.write_text(json.dumps(data, separators=(",", ":")) + "\n")
        print(f"\nwritten: {path}")


if __name__ == "__main__":
    main()

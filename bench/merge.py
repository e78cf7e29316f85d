"""Merge deltas, beside merging the checkpoints that they stand for.

    python -m bench.merge                 # BERT-base, 0.1% of the entries, two deltas
    python -m bench.merge --write         # also records bench/results/cpu-merge-MODEL-SHARE-<date>

Both do the same arithmetic. `memory` merges what is loaded: state dicts, tensor by tensor, in
float32; or deltas, with the base's values from the base (whose fingerprints are checked) or from
the deltas' own originals. (Loading a delta hashes its content, which a merge records.) `files`
reads and writes safetensors as well: base and checkpoints in, a checkpoint out; or delta files in,
with a base folder or without, and a delta file out. The files are in the page cache, and a delta
file is synced to disk. Merges of deltas are timed first: what checkpoints leave behind in the
allocator would slow them down, and a merge of deltas is a process without any.

TIES and DARE on checkpoints: the entries to keep are a share of all entries that differ from the
base, found by one `torch.topk` (or drawn) over the whole task vector, as for the deltas.
"""

from __future__ import annotations

import json
import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from bench import console
from bench.environment import RESULTS, Conditions, describe
from bench.shapes import MODELS, make_params, num_entries, random_positions
from bench.tables import table
from bench.timing import Subject, interleave
from sparse_optim.delta import Delta, load_delta, merge, merge_deltas, save_delta

GOAL = 50  # times faster than merging checkpoints
DENSITY = 0.5  # of ties and dare
SETTINGS: dict[str, dict[str, Any]] = {
    "sum": {},
    "ties": {"density": DENSITY},
    "dare": {"density": DENSITY},
}
State = dict[str, Tensor]


def dense_merge(base: State, tuned: Sequence[State], method: str) -> State:
    """Merge whole state dicts with weights 1, as `merge_deltas` does with deltas."""
    vectors = [{name: state[name] - base[name] for name in base} for state in tuned]
    if method == "ties":
        vectors = [_trimmed(vector) for vector in vectors]
    elif method == "dare":
        vectors = [{name: _dropped(tau) for name, tau in vector.items()} for vector in vectors]
    combine = _elected if method == "ties" else _added
    return {name: base[name] + combine([vector[name] for vector in vectors]) for name in base}


def _trimmed(vector: State) -> State:
    magnitude = torch.cat([tau.view(-1) for tau in vector.values()]).abs_()
    count = round(DENSITY * int(magnitude.count_nonzero()))
    bound = magnitude.topk(count, sorted=False).values.min()
    return {name: torch.where(tau.abs() >= bound, tau, 0) for name, tau in vector.items()}


def _dropped(tau: Tensor) -> Tensor:
    return torch.where(torch.rand_like(tau) < DENSITY, tau / DENSITY, 0)


def _added(taus: list[Tensor]) -> Tensor:
    return torch.stack(taus).sum(0)


def _elected(taus: list[Tensor]) -> Tensor:
    stacked = torch.stack(taus)
    agree = stacked.sign() * stacked.sum(0).sign() > 0
    return torch.where(agree, stacked, 0).sum(0) / agree.sum(0).clamp(min=1)


def make(model: str, share: float, count: int) -> tuple[State, list[Delta]]:
    """A base, and deltas that each change a share of its entries, at random places."""
    shapes = MODELS[model]
    base = {f"layer.{at}": p.detach() for at, p in enumerate(make_params(shapes, torch.float32))}
    deltas = []
    for seed in range(count):
        generator = torch.Generator().manual_seed(seed)
        tuned = {name: tensor.clone() for name, tensor in base.items()}
        places = random_positions(shapes, round(share * num_entries(shapes)), seed + 1)
        for tensor, position in zip(tuned.values(), places, strict=True):
            change = torch.randn(position.numel(), generator=generator) * 1e-3
            tensor.view(-1)[position] += change
        deltas.append(Delta.from_models(base, tuned, store_original=True))
    return base, deltas


def _ours_in_files(folder: Path, count: int, method: str, base: Path | None) -> None:
    deltas = [load_delta(folder / f"delta-{at}.safetensors") for at in range(count)]
    merged = merge_deltas(deltas, base, method=method, **SETTINGS[method])
    save_delta(merged, folder / "out.safetensors")


def _dense_in_files(folder: Path, count: int, method: str) -> None:
    base = load_file(folder / "base" / "model.safetensors")
    tuned = [load_file(folder / f"tuned-{at}.safetensors") for at in range(count)]
    save_file(dense_merge(base, tuned, method), folder / "out-dense.safetensors")


def measure(model: str, share: float, count: int, rounds: int) -> dict[str, Any]:
    """Time all subjects, interleaved by kind; return medians in milliseconds and raw times."""
    base, deltas = make(model, share, count)
    tuned = [merge(delta, base) for delta in deltas]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "base").mkdir()
        save_file(base, folder / "base" / "model.safetensors")
        for at, (delta, state) in enumerate(zip(deltas, tuned, strict=True)):
            save_delta(delta, folder / f"delta-{at}.safetensors")
            save_file(state, folder / f"tuned-{at}.safetensors")
        deltas = [load_delta(folder / f"delta-{at}.safetensors") for at in range(count)]
        calls: dict[str, Callable[[], object]] = {}
        for method, settings in SETTINGS.items():
            ours = partial(merge_deltas, deltas, method=method, **settings)
            in_files = partial(_ours_in_files, folder, count, method)
            calls |= {
                f"{method}, memory: checkpoints": partial(dense_merge, base, tuned, method),
                f"{method}, memory: deltas and base": partial(ours, base),
                f"{method}, memory: deltas with originals": ours,
                f"{method}, files: checkpoints": partial(_dense_in_files, folder, count, method),
                f"{method}, files: deltas and base": partial(in_files, folder / "base"),
                f"{method}, files: deltas with originals": partial(in_files, None),
            }
        conditions = Conditions.begin()
        records = [
            record
            for dense in (False, True)
            for record in interleave(_subjects(calls, dense), rounds, warmup=1)
        ]
    times = {record["name"]: statistics.median(record["us"]) / 1000 for record in records}
    medians = {name: times[name] for name in calls}
    return {
        **describe(),
        "conditions": conditions.end(),
        "model": model,
        "entries": num_entries(MODELS[model]),
        "share": share,
        "deltas": count,
        "ms": medians,
        "times_faster": {
            name: round(_baseline(medians, name) / ms, 1) for name, ms in medians.items()
        },
        "records": records,
    }


def _subjects(calls: Mapping[str, Callable[[], object]], dense: bool) -> list[Subject]:
    """Those on checkpoints, or on deltas."""
    return [
        Subject({"name": name}, call)
        for name, call in calls.items()
        if name.endswith("checkpoints") == dense
    ]


def _baseline(medians: dict[str, float], name: str) -> float:
    return medians[name.partition(":")[0] + ": checkpoints"]


def report(data: dict[str, Any]) -> str:
    """Show a result as Markdown."""
    rows = [
        [name, f"{ms:.1f}", f"{data['times_faster'][name]:.1f}"] for name, ms in data["ms"].items()
    ]
    return (
        f"Merging {data['deltas']} deltas of {100 * data['share']:g}% of {data['entries']:,} "
        f"entries ({data['model']} shapes, {data['machine']['threads']} threads, commit "
        f"{data['commit'][:8]}; goal: {GOAL} times faster):\n\n"
        f"{table(['merge', 'ms', 'times faster'], rows)}"
    )


def main() -> None:
    """Measure, print the table, and record it if asked to."""
    parser = console.parser("merge", __doc__)
    parser.add_argument("--model", default="BERT-base", choices=list(MODELS), help="shapes to use")
    parser.add_argument("--share", type=float, default=0.001, help="changed entries of each delta")
    parser.add_argument("--deltas", type=int, default=2, help="how many to merge")
    parser.add_argument("--rounds", type=int, default=5, help="timed calls of each subject")
    parser.add_argument("--write", action="store_true", help="record under bench/results")
    options = parser.parse_args()
    result = measure(options.model, options.share, options.deltas, options.rounds)
    print(report(result))
    if options.write:
        name = f"cpu-merge-{options.model}-{options.share:g}-{date.today()}.json"
        path = RESULTS / name
        path.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()

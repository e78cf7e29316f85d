"""Compute times and ratios from a GPU results file (see bench.gpu).

A value that was not measured raises LookupError, which names it.
"""

from __future__ import annotations

import statistics
from typing import Any

from bench.shapes import DTYPES, MODELS, num_entries

Record = dict[str, Any]
# Mode of fused AdamW -> mode of our step that it is compared with: ours always clips.
OUR_MODE = {"alone": "clip", "clip": "clip", "scaler": "scaler"}


def median_ms(record: Record) -> float:
    """Return the median of the rounds."""
    return float(statistics.median(record["us"]) / 1e3)


def select(data: dict[str, Any], kind: str, **labels: Any) -> list[Record]:
    """Return the timed records of a phase kind with these labels."""
    wanted = {"kind": kind, **labels}
    return [
        record
        for record in data["records"]
        if "us" in record and all(record.get(key) == value for key, value in wanted.items())
    ]


def find(data: dict[str, Any], kind: str, **labels: Any) -> Record:
    """Return the first of them, or raise LookupError."""
    found = select(data, kind, **labels)
    if not found:
        raise LookupError(f"no {kind} of {', '.join(map(str, labels.values()))}")
    return found[0]


def speed(record: Record) -> float:
    """Return the GB/s of the bytes that the subject must move."""
    return float(record["moved_bytes"] / max(median_ms(record), 1e-3) / 1e6)


def bandwidths(data: dict[str, Any]) -> dict[str, float]:
    """Return the bandwidth of the memory in GB/s: the fastest "copy" and "read"."""
    best: dict[str, float] = {}
    for record in select(data, "bandwidth"):
        best[record["name"]] = max(best.get(record["name"], 0.0), speed(record))
    return best


def share(data: dict[str, Any], record: Record, of: str) -> float:
    """Divide the record's speed by the memory's for "copy" or "read" in the same run."""
    best = bandwidths(data)
    if of not in best:
        raise LookupError(f"no bandwidth of {of}")
    return speed(record) / best[of]


def read_ms(data: dict[str, Any], model: str, dtype: str) -> float:
    """Return the time to read all gradients: torch's, or less if the read bandwidth allows it."""
    times = [median_ms(each) for each in select(data, "steps", name="read", model=model,
                                                dtype=dtype)]  # fmt: skip
    best = bandwidths(data)
    if "read" in best:
        size = num_entries(MODELS[model]) * DTYPES[dtype].itemsize
        times.append(size / best["read"] / 1e6)
    if not times:
        raise LookupError(f"no read of {model} {dtype}")
    return max(min(times), 1e-6)


def over_read(data: dict[str, Any], record: Record) -> float:
    """Divide a step's time by one read of the gradients."""
    return median_ms(record) / read_ms(data, record["model"], record["dtype"])


def times_faster(data: dict[str, Any], mode: str, **labels: Any) -> float:
    """Divide fused AdamW's time in a mode by that of our step (see `OUR_MODE`)."""
    cell = {"model": labels["model"], "dtype": labels["dtype"]}
    baseline = find(data, "steps", **cell, name="fused", mode=mode)
    own = find(data, "steps", **labels, mode=OUR_MODE[mode])
    return median_ms(baseline) / max(median_ms(own), 1e-3)

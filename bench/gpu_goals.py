"""Goals for the step on a data-centre GPU: reported, not asserted."""

from __future__ import annotations

import operator
import statistics
from collections.abc import Callable
from typing import Any

from bench.goals import EXPS, Goal
from bench.gpu_times import find, median_ms, over_read, select, share, times_faster

Value = Callable[[dict[str, Any]], float]
LARGE = {
    "model": "Llama-7B", "dtype": "bf16", "name": "cuda", "budget": 3_500_000, "quota": 466,
}  # fmt: skip
SMALL = {
    "model": "DeBERTa-base", "dtype": "fp32", "name": "cuda", "budget": 320_000, "quota": 466,
}  # fmt: skip


def _scan(data: dict[str, Any]) -> float:
    scans = (find(data, "stages", **LARGE, stage="scan", exp=exp) for exp in EXPS)
    return min(share(data, scan, "copy") for scan in scans)


def _over_read(data: dict[str, Any]) -> float:
    return max(over_read(data, find(data, "steps", **LARGE, mode="clip", exp=exp)) for exp in EXPS)


def _faster(cell: dict[str, Any], mode: str) -> Value:
    exps = EXPS[:1] if mode == "scaler" else EXPS  # under a scaler only exp = 0 is measured
    return lambda data: min(times_faster(data, mode, **cell, exp=exp) for exp in exps)


def _triton(data: dict[str, Any]) -> float:
    ratios = []
    for record in select(data, "steps", name="triton"):
        same = {key: record[key] for key in ("model", "dtype", "mode", "budget", "quota", "exp")}
        ratios.append(median_ms(record) / median_ms(find(data, "steps", **same, name="cuda")))
    if not ratios:
        raise LookupError("no steps of triton")
    return max(ratios)


def _host_us(data: dict[str, Any]) -> float:
    steps = [find(data, "steps", **LARGE, mode="clip", exp=exp) for exp in EXPS]
    if not all("host_us" in step for step in steps):
        raise LookupError("no time of the host")
    return max(float(statistics.median(step["host_us"])) for step in steps)


def _held_gb(data: dict[str, Any]) -> float:
    wanted = {key: LARGE[key] for key in ("model", "dtype", "name")}
    for record in data["records"]:
        if "held_bytes" in record and wanted.items() <= record.items():
            return float(record["held_bytes"] / 1e9)
    raise LookupError("memory was not measured")


def _training(data: dict[str, Any], kind: str) -> dict[str, Any]:
    return find(data, "training", model=LARGE["model"], name=kind)


def _fused_ms(data: dict[str, Any]) -> float:
    return median_ms(_training(data, "fused")) / median_ms(_training(data, "ordinary"))


def _peak(data: dict[str, Any], kind: str) -> float:
    row = _training(data, kind)
    return float(row["weights"] + row["state"] + row["step"])


def _fused_peak(data: dict[str, Any]) -> float:
    return _peak(data, "fused") / _peak(data, "LoRA")


def _speeds(text: str, cell: dict[str, Any], limits: dict[str, float]) -> list[Goal]:
    names = {"alone": "fused AdamW", "clip": "clip + fused", "scaler": "unscale + clip + fused"}
    return [
        Goal(f"{text}: {names[mode]} / step", limit, _faster(cell, mode), operator.ge)
        for mode, limit in limits.items()
    ]


SEVEN = "Llama-7B bf16, B=3.5M, k=466"
GOALS = [
    Goal(f"{SEVEN}: bandwidth of scan / copy", 0.85, _scan, operator.ge),
    Goal(f"{SEVEN}: step / read", 1.15, _over_read),
    *_speeds(SEVEN, LARGE, {"alone": 5.5, "clip": 8.0, "scaler": 9.5}),
    *_speeds("DeBERTa-base fp32, B=320K, k=466", SMALL, {"alone": 4.0, "clip": 6.0, "scaler": 7.0}),
    Goal("every step: Triton / CUDA", 1.25, _triton),
    Goal(f"{SEVEN}: host time, us (291 tensors)", 150.0, _host_us, operator.lt),
    Goal(f"{SEVEN}: held, GB", 1.1, _held_gb, operator.lt),
    Goal("Llama-7B bf16, a training step: fused / ordinary", 1.03, _fused_ms),
    Goal("Llama-7B bf16, a training step: peak of fused / LoRA", 1.1, _fused_peak),
]


def check(data: dict[str, Any]) -> str:
    """Report all goals, one line each: CUDA kernels with clipping, the worse of exp 0 and 2."""
    return "\n".join(goal.outcome(data) for goal in GOALS)

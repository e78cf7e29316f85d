"""Plot step times relative to one read of the gradients."""

from __future__ import annotations

import textwrap
from collections.abc import Container
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.patches import Rectangle

from bench import gpu_report
from bench.gpu_times import over_read, select
from bench.results import Results
from bench.shapes import MODELS, num_entries
from bench.tables import count

# Okabe and Ito's colours: distinct under every kind of colour blindness, and in lightness.
CLIPPED, FUSED, LARGE, SMALL = "#BBBBBB", "#777777", "#56B4E9", "#0072B2"
SCALED = "#DDDDDD"
INK, FAINT = "#222222", "#666666"
BAR = 0.8  # height of a bar, in units of the distance between bars
QUOTA = 320
DTYPE_NAMES = {"fp32": "float32", "bf16": "bfloat16"}

plt.rcParams.update({"font.family": "DejaVu Sans", "font.size": 10, "text.color": INK})


def draw(results: Results, path: Path) -> None:
    """Draw bars for every model and dtype: AdamW with and without clipping, and our step.

    Our bar is the slowest of all exp at k = 320, or at the nearest quota that was measured.
    """
    settings = results.data["settings"]
    dtypes, models = settings["dtypes"], settings["models"]
    figure, axes = plt.subplots(
        1, len(dtypes), figsize=(5.4 * len(dtypes), 0.9 + 1.35 * len(models)), sharey=True,
        squeeze=False, layout="constrained",
    )  # fmt: skip
    for axis, dtype in zip(axes[0], dtypes, strict=True):
        ticks = []
        for row, model in enumerate(models):
            bars = _bars(results, model, dtype)
            _group(axis, bars, row * (len(bars) + 1.1))
            ticks.append(row * (len(bars) + 1.1) + (len(bars) - 1) / 2)
        _dress(axis, dtype)
        axis.set_yticks(ticks, [_title(results, model) for model in models])
    axes[0][0].invert_yaxis()
    _legend(figure, results)
    figure.savefig(path, dpi=200, facecolor="white")
    plt.close(figure)


def _quota(results: Results) -> int:
    quotas: list[int] = results.data["settings"]["quotas"]
    return min(quotas, key=lambda quota: abs(quota - QUOTA))


def _bars(results: Results, model: str, dtype: str) -> list[tuple[str, float, bool]]:
    """Return (colour, time over the read's, whether it is ours) from top to bottom."""
    settings = results.data["settings"]
    bars = [
        (CLIPPED, results.ratio(model, dtype, "read", "clip+fused"), False),
        (FUSED, results.ratio(model, dtype, "read", "fused"), False),
    ]
    colors = [SMALL, LARGE]
    for color, budget in sorted(zip(colors, settings["budgets"], strict=False), reverse=True):
        labels: dict[str, Any] = {"budget": budget, "quota": _quota(results)}
        exp = results.slowest_exp(model, dtype, **labels)  # as the tables choose it
        slowest = results.ratio(model, dtype, "read", "ours", exp=exp, **labels)
        bars.append((color, slowest, True))
    return bars


def _group(
    axis: Any, bars: list[tuple[str, float, bool]], top: float, starred: Container[int] = ()
) -> None:
    for offset, (color, length, ours) in enumerate(bars):
        axis.barh(top + offset, length, height=BAR, color=color, zorder=2)
        axis.annotate(
            (f"{length:.1f}" if length >= 9.95 else f"{length:.2f}") + "*" * (offset in starred),
            (length, top + offset), xytext=(4, 0), textcoords="offset points", va="center",
            fontsize=9, color=SMALL if ours else FAINT, fontweight="bold" if ours else "normal",
        )  # fmt: skip


def _title(results: Results, model: str) -> str:
    entries = next(run["entries"] for run in results.data["runs"] if run["model"] == model)
    return f"{model}\n{entries / 1e6:.0f}M"


def _dress(axis: Any, dtype: str) -> None:
    axis.set_title(DTYPE_NAMES.get(dtype, dtype), loc="left", fontsize=11, fontweight="bold")
    axis.axvline(1.0, color=INK, linewidth=1, linestyle=(0, (4, 3)), zorder=3)
    axis.set_xlabel("time relative to one read of the gradients (dashed)", color=FAINT)
    axis.spines[["top", "right", "left", "bottom"]].set_visible(False)
    axis.tick_params(length=0, colors=FAINT)
    axis.tick_params(axis="y", labelcolor=INK)
    axis.grid(axis="x", color="#E6E6E6", linewidth=0.8, zorder=0)
    axis.set_axisbelow(True)
    axis.margins(x=0.12)


def _legend(figure: Any, results: Results) -> None:
    budgets = [f"{budget:,}" for budget in results.data["settings"]["budgets"]]
    ours = [f"sparse_optim, {budget} entries, clipping included" for budget in budgets]
    names = ["clip_grad_norm_ + fused AdamW", "fused AdamW", *reversed(ours)]
    colors = [CLIPPED, FUSED, *([SMALL, LARGE][: len(budgets)][::-1])]
    handles = [Rectangle((0, 0), 1, 1, color=color) for color in colors]
    figure.legend(
        handles, names, loc="outside upper left", ncols=2, frameon=False, fontsize=9,
        handlelength=1, handleheight=1, columnspacing=2.5,
    )  # fmt: skip


# (label, colour, whether it is ours, labels of its records)
GPU_BARS: tuple[tuple[str, str, bool, dict[str, str]], ...] = (
    ("unscale + clip + fused AdamW", SCALED, False, {"name": "fused", "mode": "scaler"}),
    ("clip_grad_norm_ + fused AdamW", CLIPPED, False, {"name": "fused", "mode": "clip"}),
    ("fused AdamW", FUSED, False, {"name": "fused", "mode": "alone"}),
    ("sparse_optim, Triton, clipping included", LARGE, True, {"name": "triton", "mode": "clip"}),
    ("sparse_optim, CUDA, clipping included", SMALL, True, {"name": "cuda", "mode": "clip"}),
    ("sparse_optim, dry run on the CPU", SMALL, True, {"name": "cpp", "mode": "clip"}),
)


def draw_gpu(data: dict[str, Any], path: Path) -> None:
    """Draw bars for every model and dtype of a GPU results file; ours is the slowest of all exp.

    Raises:
        ValueError: the file has no times of steps.
    """
    cells = gpu_report.cells(data, "steps")
    dtypes = [dtype for dtype in DTYPE_NAMES if dtype in {each for _, each in cells}]
    if not cells:
        raise ValueError("the file has no times of steps to draw; record it with make gpu-report")
    rows = max(sum(dtype == each for _, dtype in cells) for each in dtypes)
    figure, axes = plt.subplots(
        1, len(dtypes), figsize=(5.4 * max(len(dtypes), 2), 2.2 + 1.35 * rows), squeeze=False,
        layout="constrained",
    )  # fmt: skip
    drawn: dict[str, str] = {}
    for axis, dtype in zip(axes[0], dtypes, strict=True):
        models = sorted((model for model, each in cells if each == dtype), key=_entries)
        drawn |= _gpu_panel(axis, data, models, dtype)
        _dress(axis, dtype)
        axis.invert_yaxis()
    handles = [Rectangle((0, 0), 1, 1, color=color) for color in drawn.values()]
    figure.legend(handles, list(drawn), loc="outside upper left", ncols=2, frameon=False,
                  fontsize=9)  # fmt: skip
    text = textwrap.fill(gpu_report.caption(data).replace("`", ""), 75 * max(len(dtypes), 2))
    figure.supxlabel(text, fontsize=7, color=FAINT, x=0.01, ha="left")
    figure.savefig(path, dpi=200, facecolor="white")
    plt.close(figure)


def _entries(model: str) -> int:
    return num_entries(MODELS[model])


def _gpu_panel(axis: Any, data: dict[str, Any], models: list[str], dtype: str) -> dict[str, str]:
    """Draw the models of a dtype; return the colours of the measured bars by label."""
    drawn, titles, ticks, top = {}, [], [], 0.0
    for model in models:
        bars: list[tuple[str, float, bool]] = []
        starred, budget = set(), 0
        for label, color, ours, labels in GPU_BARS:
            found = select(data, "steps", model=model, dtype=dtype, **labels)
            if found:
                budget = found[0].get("budget", budget)
                if "unscale" in found[0]:
                    starred.add(len(bars))
                bars.append((color, max(over_read(data, each) for each in found), ours))
                drawn[label] = color
        _group(axis, bars, top, starred)
        titles.append(f"{model}\n{_entries(model) / 1e6:,.0f}M, B = {count(budget)}")
        ticks.append(top + (len(bars) - 1) / 2)
        top += len(bars) + 1.1
    axis.set_yticks(ticks, titles)
    return drawn

"""Draw the two pictures of README.md: whole training steps, and quality."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

SHADES = [plt.get_cmap("tab20")(number) for number in range(20)]
WHOLE = "full fine-tuning"
OURS, OTHERS, INK, FAINT = "#0072B2", "#AAAAAA", "#222222", "#666666"


def draw_whole_steps(cases: Mapping[str, Mapping[str, float]], path: Path) -> None:
    """Draw a panel of bars for each case: milliseconds of a training step by kind of training.

    Args:
        cases: title -> name of a bar -> milliseconds; ours begin with "sparse_optim".
    """
    columns = 3
    rows = -(-len(cases) // columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(10.5, 0.4 + 1.75 * rows), squeeze=False, layout="constrained"
    )
    for axis, (title, bars) in zip(axes.flat, cases.items(), strict=False):
        _bars(axis, bars, "{:.0f}")
        axis.set_title(title, loc="left", fontsize=10, fontweight="bold", color=INK)
        axis.set_xlim(0, 1.15 * max(bars.values()))
    for axis in axes.flat[len(cases) :]:
        axis.set_visible(False)
    for number, axis in enumerate(axes.flat):
        if number % columns:
            axis.set_yticklabels([])
    figure.supxlabel("milliseconds of a whole training step", fontsize=9, color=FAINT)
    figure.savefig(path, dpi=150, facecolor="white")
    plt.close(figure)


def _bars(axis: Any, bars: Mapping[str, float], form: str) -> None:
    for place, (name, value) in enumerate(bars.items()):
        is_ours = name.startswith("sparse_optim")
        axis.barh(place, value, height=0.72, color=OURS if is_ours else OTHERS)
        axis.annotate(
            form.format(value), (value, place), xytext=(4, 0), textcoords="offset points",
            va="center", fontsize=9, color=OURS if is_ours else FAINT,
        )  # fmt: skip
    axis.set_yticks(range(len(bars)), list(bars), fontsize=9, color=INK)
    axis.invert_yaxis()
    axis.spines[["top", "right", "left", "bottom"]].set_visible(False)
    axis.tick_params(length=0, labelsize=9, labelcolor=INK)
    axis.set_xticks([])


def draw_scores(
    lines: Mapping[str, Sequence[tuple[float, Any]]],
    ticks: Mapping[float, str],
    label: str,
    path: Path,
) -> None:
    """Draw scores against trained entries, with bars of one deviation each way.

    Methods at the same number of entries stand side by side, so that their bars can be seen.

    Args:
        lines: name -> (entries, score with `mean` and `deviation` in per cent); a band for
            "full fine-tuning".
        ticks: numbers of entries -> labels on the x axis.
        label: of the y axis.
    """
    figure, axis = plt.subplots(figsize=(9.5, 5.2), layout="constrained")
    names = [name for name in lines if name != WHOLE]
    for place, name in enumerate(names):
        dodge = 1.09 ** (place - (len(names) - 1) / 2)
        xs = [entries * dodge for entries, _ in lines[name]]
        means = [score.mean for _, score in lines[name]]
        bars = [score.deviation or 0.0 for _, score in lines[name]]
        axis.errorbar(
            xs, means, yerr=bars, label=name, color=SHADES[place % len(SHADES)],
            marker="os^Dv"[place % 5], markersize=6, linewidth=1, elinewidth=1, capsize=2.5,
        )  # fmt: skip
    for _, score in lines.get(WHOLE, []):
        spread = score.deviation or 0.0
        axis.axhspan(score.mean - spread, score.mean + spread, color=FAINT, alpha=0.18, lw=0)
        axis.axhline(score.mean, color=FAINT, linestyle="--", linewidth=1, label=WHOLE)
    axis.set_xscale("log")
    places = [entries for name in names for entries, _ in lines[name]]
    ticks = {at: text for at, text in ticks.items() if any(at < 2 * x < 4 * at for x in places)}
    axis.set_xlim(min(ticks) / 2.5, max(ticks) * 2.5)
    axis.set_xticks(list(ticks), labels=list(ticks.values()))
    axis.minorticks_off()
    axis.set_xlabel("trained entries, without the fresh head", color=FAINT)
    axis.set_ylabel(label, color=FAINT)
    axis.grid(True, color="#E6E6E6", linewidth=0.8)
    axis.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside right upper", frameon=False, fontsize=9)
    figure.savefig(path, dpi=150, facecolor="white")
    plt.close(figure)


def draw_rates(
    points: Sequence[tuple[str, Mapping[str, float], float, tuple[float, float]]],
    factor: float,
    path: Path,
) -> None:
    """Draw tuned learning rates against curvature, and against the rates that follow from it.

    Args:
        points: (method, line with `sign_curvature` and `lr`, best rate, (lowest, highest) rate that
            is as good).
        factor: half-width of the band around the diagonal.
    """
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.8), sharey=True, layout="constrained")
    names = list(dict.fromkeys(name for name, *_ in points))
    for place, name in enumerate(names):
        mine = [point for point in points if point[0] == name]
        best = [tuned for _, _, tuned, _ in mine]
        below = [tuned - low for _, _, tuned, (low, _) in mine]
        above = [high - tuned for _, _, tuned, (_, high) in mine]
        for axis, key in ((left, "sign_curvature"), (right, "lr")):
            axis.errorbar(
                [line[key] for _, line, _, _ in mine], best, yerr=[below, above], linestyle="",
                color=SHADES[place % len(SHADES)], marker="os^Dv"[place % 5], markersize=6,
                elinewidth=1, capsize=2.5, label=name if axis is left else None,
            )  # fmt: skip
    low = min(min(line["lr"], tuned) for _, line, tuned, _ in points) / factor
    high = max(max(line["lr"], tuned) for _, line, tuned, _ in points) * factor
    right.fill_between(
        [low, high], [low / factor, high / factor], [low * factor, high * factor],
        color=FAINT, alpha=0.15, lw=0,
    )  # fmt: skip
    right.plot([low, high], [low, high], color=FAINT, linestyle="--", linewidth=1)
    for axis, label in (
        (left, "curvature along the signs of the gradient"),
        (right, f"suggested rate (band: a factor of {factor:g})"),
    ):
        axis.set_xscale("log")
        axis.set_yscale("log")
        axis.set_xlabel(label, color=FAINT)
        axis.grid(True, color="#E6E6E6", linewidth=0.8)
        axis.spines[["top", "right"]].set_visible(False)
    left.set_ylabel("tuned rate (bar: within a point of the best)", color=FAINT)
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    figure.savefig(path, dpi=150, facecolor="white")
    plt.close(figure)


def draw_bytes(
    models: Mapping[str, Mapping[str, Sequence[float]]], counts: Sequence[int], path: Path
) -> None:
    """Draw the bytes that a process sends in a step against the number of processes.

    Args:
        models: name -> kind of step -> bytes at each of `counts`.
    """
    figure, axes = plt.subplots(
        1, len(models), figsize=(11, 4.8), sharey=True, layout="constrained"
    )
    for axis, (model, lines) in zip(axes, models.items(), strict=True):
        for place, (name, sent) in enumerate(lines.items()):
            axis.plot(
                counts, sent, label=name if axis is axes[0] else None, linewidth=1.4,
                color=SHADES[place % len(SHADES)], marker="os^Dv*"[place % 6], markersize=4,
            )  # fmt: skip
        axis.set(xscale="log", yscale="log", title=model)
        axis.set_xticks([2, 8, 64, 512, 4096], labels=["2", "8", "64", "512", "4,096"])
        axis.minorticks_off()
        axis.set_xlabel("processes", color=FAINT)
        axis.grid(True, color="#E6E6E6", linewidth=0.8)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("bytes that a process sends in a step", color=FAINT)
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    figure.savefig(path, dpi=150, facecolor="white")
    plt.close(figure)

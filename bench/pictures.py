"""Draw the two pictures of README.md: whole training steps, and quality."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

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


def draw_quality(scores: Mapping[str, float], ours: Sequence[str], path: Path) -> None:
    """Draw a bar for the average score of each way to fine-tune.

    Args:
        scores: name -> score in per cent.
        ours: names whose bars are in our colour: the methods that run on the engine.
    """
    figure, axis = plt.subplots(figsize=(7, 0.7 + 0.34 * len(scores)), layout="constrained")
    _bars(axis, scores, "{:.1f}", set(ours))
    axis.set_xlim(0, 100)
    axis.set_xlabel("average score, per cent (blue: methods of this package)", color=FAINT)
    figure.savefig(path, dpi=150, facecolor="white")
    plt.close(figure)


def _bars(axis: Any, bars: Mapping[str, float], form: str, ours: set[str] | None = None) -> None:
    for place, (name, value) in enumerate(bars.items()):
        is_ours = name.startswith("sparse_optim") if ours is None else name in ours
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

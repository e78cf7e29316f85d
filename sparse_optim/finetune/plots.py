"""The picture of a run: loss, metric and active entries against the step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import EngFormatter, MaxNLocator

from sparse_optim.analysis.plot_style import BLUE, GREEN, ORANGE, new_figure, plain, save

SMOOTHING = 0.8  # weight of the past in the running mean of the training loss


def draw_curves(metrics: Mapping[str, Any], path: Path) -> None:
    """Draw `curves.png` from what `metrics.json` holds.

    Args:
        metrics: the job's metrics, with `log`, `evaluations`, `metric` and `config`.
        path: file to write; its suffix is the format.
    """
    config = metrics["config"]
    title = f"{config['method']}: {config['model']} on {config['dataset']}"
    figure = new_figure(7.2, 7.6, title)
    loss_axes, metric_axes, active_axes = figure.subplots(
        3, 1, sharex=True, height_ratios=(1.2, 1.0, 1.0)
    )
    log, evaluations = metrics["log"], metrics["evaluations"]
    draw_loss(loss_axes, log, evaluations)
    draw_metric(metric_axes, evaluations, metrics["metric"]["name"])
    draw_active(active_axes, log, metrics["active_entries"], metrics["model"]["parameters"])
    plain((loss_axes, metric_axes, active_axes))
    active_axes.set_xlabel("step")
    active_axes.set_xlim(left=0)
    active_axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    save(figure, path)


def points(rows: Sequence[Mapping[str, Any]], key: str) -> tuple[list[int], list[float]]:
    """Steps and values of the rows that have a finite value."""
    found = [(row["step"], row[key]) for row in rows if row.get(key) is not None]
    return [step for step, _ in found], [value for _, value in found]


def running_mean(values: Sequence[float]) -> list[float]:
    """Exponential running mean that starts at the first value."""
    smooth: list[float] = []
    for value in values:
        past = smooth[-1] if smooth else value
        smooth.append(SMOOTHING * past + (1 - SMOOTHING) * value)
    return smooth


def draw_loss(axes: Axes, log: Sequence[Any], evaluations: Sequence[Any]) -> None:
    """Training loss as logged, its running mean, and the evaluation loss."""
    steps, losses = points(log, "loss")
    few = len(steps) < 20
    axes.plot(steps, losses, color=BLUE, alpha=0.9 if few else 0.3, linewidth=1.4 if few else 0.9,
              label="training" if few else None)  # fmt: skip
    if not few:
        axes.plot(steps, running_mean(losses), color=BLUE, linewidth=1.8, label="training (mean)")
    steps, losses = points(evaluations, "loss")
    axes.plot(steps, losses, color=ORANGE, marker="o", markersize=4.5, label="evaluation")
    axes.set_ylabel("loss")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, fontsize=9, ncols=2)


def draw_metric(axes: Axes, evaluations: Sequence[Any], name: str) -> None:
    """The evaluation metric, its last value written out."""
    steps, values = points(evaluations, name)
    axes.plot(steps, values, color=GREEN, marker="o", markersize=4.5)
    if steps:
        axes.annotate(f"{values[-1]:.4g}", (steps[-1], values[-1]), xytext=(0, 7),
                      textcoords="offset points", ha="right", color=GREEN, fontsize=9)  # fmt: skip
    axes.margins(y=0.18)
    axes.set_ylabel(name.replace("_", " / "))


def draw_active(axes: Axes, log: Sequence[Any], final: int, parameters: int) -> None:
    """Active entries, from nothing to what the run ended with."""
    steps, active = points(log, "active")
    axes.plot(steps, active, color=BLUE, linewidth=1.8, drawstyle="steps-post")
    axes.fill_between(steps, active, color=BLUE, alpha=0.12, linewidth=0, step="post")
    axes.set_ylim(0, 1.15 * max(final, 1))
    axes.yaxis.set_major_formatter(EngFormatter(sep=""))
    axes.annotate(f"{final:,} of {parameters:,} ({final / parameters:.2%})", (0.02, 0.95),
                  xycoords="axes fraction", ha="left", va="top", color=BLUE,
                  fontsize=9)  # fmt: skip
    axes.set_ylabel("active entries")

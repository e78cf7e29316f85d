"""Goals for the step on two cores: reported, not asserted (tests assert the memory limit)."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from bench.memory import held_bytes
from bench.results import ROW_SCALED, SYNTHETIC, Results

EXPS = (0.0, 2.0)
SMALL, LARGE = 320_000, 3_500_000  # budgets


@dataclass(frozen=True)
class Goal:
    """A limit on a ratio. The value is the worst of all cases that the goal covers.

    Attributes:
        text: describes the compared quantities.
        limit: the largest value allowed (the smallest if `holds` is operator.ge).
        value: computes the value from results; raises LookupError if something is missing.
        holds: compares the value with the limit.
    """

    text: str
    limit: float
    value: Callable[[Any], float]
    holds: Callable[[float, float], bool] = operator.le

    def outcome(self, results: Any) -> str:
        """Report in one line whether the goal is reached, not reached, or not measured."""
        try:
            value = self.value(results)
        except LookupError as error:
            return f"not measured  {self.text}  ({error})"
        verdict = "reached      " if self.holds(value, self.limit) else "NOT REACHED  "
        return f"{verdict} {value:5.3f}  limit {self.limit:5.3f}  {self.text}"


def _step(
    models: tuple[str, ...],
    dtype: str,
    budget: int,
    quotas: tuple[int, ...],
    baseline: str,
    kinds: tuple[str, ...] = (SYNTHETIC,),
) -> Callable[[Results], float]:
    """Divide our step by a baseline; worst of all models, kinds of gradients, quotas and exp."""
    return lambda results: max(
        results.of(grads).ratio(model, dtype, baseline, "ours", budget=budget, quota=quota, exp=exp)
        for grads in kinds
        for model in models
        for quota in quotas
        for exp in EXPS
    )


def _scan(models: tuple[str, ...]) -> Callable[[Results], float]:
    return lambda results: max(
        results.of(SYNTHETIC).ratio(model, dtype, "read", "scan", budget=SMALL)
        for model in models
        for dtype in ("fp32", "bf16")
    )


def _memory(results: Results) -> float:
    rows = results.data["memory"]
    if not rows:
        raise LookupError("memory was not measured")
    return max(held_bytes(row) / int(row["limit_bytes"]) for row in rows)


def _adamw(
    text: str,
    dtype: str,
    budget: int,
    quotas: tuple[int, ...],
    fused: float,
    clipped: float,
    model: str = "BERT-base",
    kinds: tuple[str, ...] = (SYNTHETIC,),
) -> list[Goal]:
    """Build the goals against fused AdamW, without and with clipping."""

    def over(baseline: str) -> Callable[[Results], float]:
        return _step((model,), dtype, budget, quotas, baseline, kinds)

    return [
        Goal(f"{text}: step / fused AdamW", fused, over("fused")),
        Goal(f"{text}: step / clip + fused AdamW", clipped, over("clip+fused")),
    ]


def _of_kinds(text: str, model: str, kinds: tuple[str, ...]) -> list[Goal]:
    """Build the goals for kinds of gradients whose large entries crowd into few rows."""
    limits = [  # dtype, quotas, limits of the step over fused and over clip + fused
        ("fp32", "k<=3200", (320, 3200), 0.36, 0.20),
        ("fp32", "k=16000", (16000,), 0.42, 0.26),
        ("bf16", "k<=3200", (320, 3200), 0.24, 0.16),
        ("bf16", "k=16000", (16000,), 0.34, 0.23),
    ]
    return [
        goal
        for dtype, quota, quotas, fused, clipped in limits
        for goal in _adamw(
            f"{model} {dtype}, {text}, B=320K, {quota}",
            dtype, SMALL, quotas, fused, clipped, model, kinds,
        )
    ]  # fmt: skip


BOTH = ("BERT-base", "DeBERTa-base")

GOALS = [
    *_adamw("BERT-base fp32, B=320K, k<=320", "fp32", SMALL, (32, 320), 0.36, 0.19),
    *_adamw("BERT-base bf16, B=320K, k<=320", "bf16", SMALL, (32, 320), 0.24, 0.15),
    *_adamw("BERT-base fp32, B=320K, k=3200", "fp32", SMALL, (3200,), 0.40, 0.24),
    *_adamw("BERT-base fp32, B=3.5M, all k", "fp32", LARGE, (32, 320, 3200), 0.65, 0.40),
    *_of_kinds("all gradients", "BERT-base", (SYNTHETIC, ROW_SCALED)),
    Goal("BERT-base and DeBERTa-base, B=320K, fp32 and bf16: scan / read", 1.10, _scan(BOTH)),
    Goal(
        "BERT-base and DeBERTa-base fp32, B=320K, k<=320: step / read",
        1.20,
        _step(BOTH, "fp32", SMALL, (32, 320), "read"),
    ),
    Goal("state and work space / (24 B per budget entry + 8 B per tile + 64 KiB)", 1.0, _memory),
]


def check(results: Results) -> str:
    """Report all goals, one line each; ratios are the worst of exp 0 and 2 and the named models."""
    lines = [goal.outcome(results) for goal in GOALS]
    return "\n".join([*lines, f"clean calls: {results.clean_share():.0%}"])

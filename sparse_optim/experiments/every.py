"""What unmasking at every so many-th step alone costs in quality: ID3 with `every` = 1 to 64.

At one learning rate, the best one of ID3 in the quality experiment. One row takes dense gradients
where the others sample them: it must end at the same quality.
"""

from __future__ import annotations

from typing import Any

from sparse_optim.experiments.presets import Block, Experiment, Row
from sparse_optim.experiments.quality import MODEL, SETTINGS, TASKS

LRS = (1.5e-3,)
BUDGET = "0.5%"


def variant(name: str, **settings: Any) -> Row:
    """ID3 that has spent its budget in the middle of the run, as `finetune` does."""
    return Row("id3", LRS, BUDGET, settings={"unmask_share": 0.5, **settings}, variant=name)


EVERY = Experiment(
    name="every",
    title="ID3 that unmasks at every so many-th step alone: MiniLM (22.7M), test sets",
    about="ID3 that unmasks at every 4th, 16th or 64th step alone, on MiniLM.",
    model=MODEL,
    blocks=(
        Block(
            TASKS[:2],
            (
                variant("every=1"),
                variant("every=16", every=16),
                variant("every=4", every=4),
                variant("every=64", every=64),
                variant("every=16,dense", every=16, sampled_backward=False),
            ),
        ),
    ),
    seeds=(0, 1, 2),
    protocol="tuned",
    kept=3,
    settings=SETTINGS,
)

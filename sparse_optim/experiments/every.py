"""What unmasking at every N-th step costs in quality: ID3 with `every` = 1 to 64.

At one learning rate, the best one of ID3 in the quality experiment. One row takes dense gradients
where the others sample them: it must end at the same quality.
"""

from __future__ import annotations

from sparse_optim.experiments.presets import Block, Experiment, Row
from sparse_optim.experiments.quality import MODEL, SETTINGS, TASKS

LRS = (1.5e-3,)
BUDGET = "0.5%"


# The budget is spent in the first half of the run.
ID3 = Row("id3", LRS, BUDGET, settings={"unmask_share": 0.5})

EVERY = Experiment(
    name="every",
    title="ID3 that unmasks only at every N-th step: MiniLM (22.7M), test sets",
    about="ID3 that unmasks only at every 4th, 16th or 64th step, on MiniLM.",
    model=MODEL,
    blocks=(
        Block(
            TASKS[:2],
            (
                ID3.changed("every=1"),
                ID3.changed("every=16", every=16),
                ID3.changed("every=4", every=4),
                ID3.changed("every=64", every=64),
                ID3.changed("every=16,dense", every=16, sampled_backward=False),
            ),
        ),
    ),
    seeds=(0, 1, 2),
    protocol="tuned",
    kept=3,
    settings=SETTINGS,
    pictures=(),  # all rows have one budget
)

"""ID3 and repeat-D3 at many budgets: Figure 6 of the ID3 paper.

Agarwal et al. 2025, section 6: DeBERTa-v3-base on CoLA, MRPC and RTE, a set of entries that grows
(increment) against a new set at each step (repeat). The text names two budgets: 80K (a sparsity of
99.95%), where repeat may be ahead, and about 330K (99.82%), above which repeat drops. Figure 6 is a
picture, so its other budgets are not known: those here are between and above the two, with 103K and
320K of Table 1. Settings are those of Tables 7a and 7b.
"""

from __future__ import annotations

from sparse_optim.experiments import glue, paper
from sparse_optim.experiments.presets import Block, Experiment, Row

NAMES = ("cola", "mrpc", "rte")
BUDGET_NAMES = ("80K", "103K", "160K", "240K", "320K", "480K", "640K")

BUDGETS = Experiment(
    name="budgets",
    title="Budgets, GLUE development sets",
    about="Increment and repeat selection of D3 at seven budgets (ID3 paper, Figure 6).",
    model=glue.MODEL,
    blocks=(
        Block(
            glue.tasks_named(*NAMES),
            tuple(
                Row(method, glue.LRS, budget)
                for budget in BUDGET_NAMES
                for method in ("id3", "repeat-d3")
            ),
        ),
    ),
    seeds=glue.SEEDS,
    protocol="grid",
    kept=3,
    settings=glue.ID3_SETTINGS,
    paper={
        label: {name: paper.GLUE[label][name] for name in NAMES}
        for label in ("id3-103K", "id3-320K")
    },
    paper_note="The paper: Agarwal et al. 2025, Table 1 (Figure 6 prints no numbers).",
    pictures=("budgets", "pareto"),
)

"""ID3 with other values of eps and exp: Figure 4 of the ID3 paper.

    D3 = |grad| / (|param| + eps)^exp

Agarwal et al. 2025, section 5.1: DeBERTa-v3-base on three tasks; eps = 0.5 and exp = -1 come out
best. Figure 4 is a picture: the text names neither the tasks (here: CoLA, MRPC and RTE, as in
Figures 5 to 9), nor the budget (here: 103K), nor the other values of eps, nor the fixed value of
the setting that does not change (here: exp = 2 and eps = 1 of Table 7a).
"""

from __future__ import annotations

from sparse_optim.experiments import glue
from sparse_optim.experiments.budgets import NAMES
from sparse_optim.experiments.presets import Block, Experiment, Row

ID3 = Row("id3", glue.LRS, "103K")  # exp = 2, eps = 1
EPS = (0.01, 0.1, 0.5, 2.0)
EXP = (-2.0, -1.0, 0.0, 1.0)

ROWS = (
    ID3,
    *(ID3.changed(f"eps={eps:g}", d3_eps=eps) for eps in EPS),
    *(ID3.changed(f"exp={exp:g}", d3_exp=exp) for exp in EXP),
)

SWEEPS = Experiment(
    name="sweeps",
    title="ID3 with other eps and exp, GLUE development sets",
    about="ID3 with five values of eps at exp = 2, and of exp at eps = 1 (ID3 paper, Figure 4).",
    model=glue.MODEL,
    blocks=(Block(glue.tasks_named(*NAMES), ROWS),),
    seeds=glue.SEEDS,
    protocol="grid",
    kept=3,
    settings=glue.ID3_SETTINGS,
    paper_note="The paper: Agarwal et al. 2025, Figure 4, which prints no numbers: best at "
    "eps = 0.5 and at exp = -1.",
    pictures=("sweeps",),
)

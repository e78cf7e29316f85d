"""Compare settings of ID3 on a part of train, with one setting changed at a time.

The papers conflict (exp = 2, 0 or -1; eps = 1, 0.5 or 1e-3), and mention neither the bias
correction nor when to spend the budget. Each setting gets the same learning rates; its best run
counts. The test splits are not read.
"""

from __future__ import annotations

from dataclasses import replace

from sparse_optim.experiments.presets import Block, Experiment, Row
from sparse_optim.experiments.quality import MODEL, SETTINGS, TASKS

LRS = (1.5e-3, 5e-3)
BUDGET = "0.5%"


# exp = 0, eps = 1, uniform, bias correction per entry; each of the others changes something.
ID3 = Row("id3", LRS, BUDGET)

ROWS = (
    ID3,
    ID3.changed("exp=2", d3_exp=2.0),
    ID3.changed("exp=-1", d3_exp=-1.0, d3_eps=0.5),
    ID3.changed("exp=1,eps=0.01", d3_exp=1.0, d3_eps=0.01),
    ID3.changed("exp=2,eps=0.01", d3_exp=2.0, d3_eps=0.01),
    ID3.changed("exp=0,global", bias_correction="global"),
    ID3.changed("exp=0,linear", unmask_schedule="linear"),
    ID3.changed("exp=0,share=0.5", unmask_share=0.5),
    ID3.changed("exp=0,share=0.2", unmask_share=0.2),
)

ABLATION = Experiment(
    name="ablation",
    title="ID3 with other settings: MiniLM (22.7M), held-out part of train",
    about="ID3's own settings on MiniLM, one changed at a time (exp, eps, bias, schedule).",
    model=MODEL,
    blocks=(Block(tuple(replace(task, split=None) for task in TASKS), ROWS),),
    seeds=(0,),
    protocol="grid",
    kept=1,
    settings=SETTINGS,
    pictures=(),  # all rows have one budget
)

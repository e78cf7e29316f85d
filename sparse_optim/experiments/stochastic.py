"""Stochastic Tuning on six GLUE tasks: Table 1 and section 3.1 of the paper.

Akbar-Tajari and Pilehvar 2024, Findings of EMNLP, pages 17195-17202: RoBERTa, batches of 16, at
most 128 tokens, AdamW with eps 1e-6, warm-up over a tenth of the steps and linear decay, learning
rate chosen from six, seven seeds. Sub-networks have the size of BitFit's, whichever the model: as
many entries as it has biases outside the head (102,144 of RoBERTa-base, 0.08%).

DPS (Zhang et al. 2022, NeurIPS 35) trains 30% of each Linear weight in its sparse windows, as the
script of its authors does (`reserve_p` 0.3 and `update_ratio` 0.05 in script/run_glue.sh of
github.com/ZhangHaojie077/DPS); the paper's table has its variant DPS Mix, and names no share.

The paper does not say how many epochs it trains (here: those of the ID3 paper's Table 7b), nor on
what the learning rate is chosen (here: on a part of train). Its table is a picture; its figures are
not copied here.
"""

from __future__ import annotations

from dataclasses import replace

from sparse_optim.experiments import glue
from sparse_optim.experiments.presets import Block, Experiment, Row

LRS = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3)
METRICS = {"cola": "matthews", "mrpc": "f1_positive", "stsb": "spearman"}  # caption of Table 1
DPS_SHARE = "30%"
SIX = ("cola", "sst2", "mrpc", "stsb", "qnli", "rte")  # Appendix A

TASKS = tuple(
    replace(task, metric=METRICS.get(task.name, "accuracy"), max_length=128, eval_every=None)
    for task in glue.tasks_named(*SIX)
)

ROWS = (
    Row("stochastic-tuning", LRS),
    Row("bitfit", LRS),
    Row("full", LRS),
    Row("top-tuning", LRS),
    Row("random-tuning", LRS),
    Row("multi-head", LRS),
    Row("frozen", LRS),
    Row("dps-mix", LRS, DPS_SHARE),
    Row("dps", LRS, DPS_SHARE),
)

STOCHASTIC = Experiment(
    name="stochastic",
    title="Stochastic Tuning, GLUE development sets",
    about="RoBERTa-base on six GLUE tasks (Stochastic Tuning paper, Table 1); for its other half, "
    "--model FacebookAI/roberta-large.",
    model="FacebookAI/roberta-base",
    blocks=(Block(TASKS, ROWS),),
    seeds=(0, 1, 2, 3, 4, 5, 6),
    protocol="tuned",
    kept=7,
    settings={"adam_eps": 1e-6, "warmup": 0.1},
    paper_note="The paper (Akbar-Tajari and Pilehvar 2024) prints its table as a picture.",
)

"""Summaries of news: an encoder-decoder on CNN/DailyMail, ROUGE.

The published text of the ID3 paper has neither this task nor figures for it. What it says about
generative tasks is kept (section 8.2, Table 7a): batches of 4, learning rate 3e-4, 3 epochs,
seed 42, exp 0. The rest is chosen here:

- BART-base (Lewis et al. 2020). Full fine-tuning takes 3e-5: 3e-4 is too high for it, as the
  paper says of other tasks (footnote 3).
- The budget of 320K entries is that of the paper's other tables; LoRA has rank 8, as on GLUE.
- Texts are cut to 1024 tokens, the model's positions, summaries to 128. Summaries are written with
  4 beams, as Lewis et al. report CNN/DailyMail; the model's other generation settings are kept.
- Runs are evaluated once, on the test split, at their end.

`xsum` is the built-in sample of XSum (Narayan et al. 2018), 799 stories to train on and 200 to
test: it needs no hub, and is too small to compare with results on the whole of XSum.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sparse_optim.experiments.presets import Block, Experiment, Row, TaskPreset

if TYPE_CHECKING:
    from sparse_optim.experiments.runner import RunOptions  # torch: the command has it by then
    from sparse_optim.finetune.config import FinetuneConfig
    from sparse_optim.finetune.inputs import Inputs
    from sparse_optim.finetune.job import Trained

MODEL = "facebook/bart-base"
LR, FULL_LR = 3e-4, 3e-5
BUDGET = "320K"
SHORT = {"rouge1": "R-1", "rouge2": "R-2", "rougeL": "R-L"}  # in the columns of the table


def news_task(name: str, dataset: str, config: str | None = None) -> TaskPreset:
    """Stories and their summaries: three columns of the table."""
    return TaskPreset(
        name,
        dataset,
        "summarization",
        "rouge1",
        max_length=1024,
        config=config,
        split="test",
        epochs=3,
        batch_size=4,
        columns=tuple(f"{name} {short}" for short in SHORT.values()),
    )


TASKS = (
    news_task("cnn_dailymail", "abisee/cnn_dailymail", "3.0.0"),
    news_task("xsum", "xsum"),
)

ROWS = (
    *(Row(method, (LR,), BUDGET) for method in ("id3", "pafi", "r-mask")),
    Row("full", (FULL_LR,)),
    Row("full", (LR,), adapter="lora", rank=8),
)

SUMMARIZATION = Experiment(
    name="summarization",
    title="Summaries of news, ROUGE F-measures, test sets",
    about="BART-base on CNN/DailyMail, or a sample of XSum without a hub (--tasks xsum).",
    model=MODEL,
    blocks=(Block(TASKS, ROWS),),
    seeds=(42,),
    protocol="grid",
    kept=1,
    settings={"d3_exp": 0.0, "d3_eps": 1.0, "max_target_length": 128, "num_beams": 4},
    paper_note="R-1, R-2, R-L: ROUGE-1, ROUGE-2, ROUGE-L, words stemmed; summaries are written "
    "with 4 beams unless --beams says otherwise. The ID3 paper has no figures for these tasks.",
)


def measure_rouge(
    config: FinetuneConfig, inputs: Inputs, trained: Trained, task: TaskPreset, options: RunOptions
) -> dict[str, Any]:
    """The three ROUGE values of the last evaluation, by column."""
    final = trained.metrics["final"]
    return {f"{task.name} {short}": final[metric] for metric, short in SHORT.items()}

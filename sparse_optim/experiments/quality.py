"""Quality against cost on real text: one encoder, many methods, equal numbers of entries.

The built-in MiniLM encoder, 300 steps of 16 short examples of about the same length, so that a run
takes a minute on one CPU core; the same command runs it whole on a GPU. Every method gets the same
steps, head and head learning rate; its own learning rate is chosen on a part of train with one
seed, from rates that differ by a factor of 2 and reach beyond the best on both sides. Each run
looks at the test split once, at its end.

With `--shifted` each run is also tested on other data: film reviews against product reviews, tweets
against both, questions and news with typing errors (lower case is no shift for this encoder).
"""

from __future__ import annotations

from dataclasses import replace

from sparse_optim.experiments.presets import Block, Experiment, Row, Shift, TaskPreset

MODEL = "minilm"
HEAD_LR = 5e-3  # for all methods but "frozen", which trains the head with its learning rate

# Seconds of a cell until one has been timed: 300 steps of TREC-50 at 0.1 s on one core.
FIRST_GUESS = 30.0

# 0.5% and 0.05% of the encoder's 22.6M entries. A share would be one of the pool: Linear modules
# have 10.6M.
BUDGET, SMALL = "112827", "11282"

# LoRA on every Linear module has 6 x (4 x (384 + 384) + 2 x (384 + 1536)) = 41,472 entries a rank;
# on query and value 6 x 2 x 768 = 9,216.
LORA_RANK, SMALL_LORA_RANK = 3, 1
SMALL_TARGETS = ("query", "value")

COST_STEPS = 60  # of a run that only measures its costs
EVERY = 16  # steps of ID3 from one that unmasks to the next, as in `finetune`

# All rates are 1e-3 times a power of 2: the grid grows until the best is inside.
WIDEN = 2.0
FULL_LRS = (1.25e-4, 2.5e-4)
LORA_LRS = (2e-3, 4e-3)
GRADIENT_LRS = (1e-3, 2e-3)  # for masks of the largest gradients
SPREAD_LRS = (1.6e-2, 3.2e-2)  # for masks that do not look at the loss
FROZEN_LRS = (1.6e-2, 3.2e-2)
PAPER_LR = 5e-4  # the ID3 paper uses 1e-4 to 7e-4 for masks of all kinds

# `quality` itself runs without autocast: not all CPUs compute bfloat16 fast.
SETTINGS = {"head_lr": HEAD_LR, "amp": "bf16", "group_by_length": True}


def linear(method: str, lrs: tuple[float, ...], budget: str, **settings: object) -> Row:
    """A method whose pool are the weights of Linear modules."""
    return Row(method, lrs, budget).changed("linear", rank="linear", **settings)


def paper(lrs: tuple[float, ...], budget: str) -> Row:
    """ID3 as its paper has it for encoders: all parameters, exp = 2, eps = 1, the whole run."""
    return Row("id3", lrs, budget).changed("paper", d3_exp=2.0)


def at_paper_rate(method: str, **settings: object) -> Row:
    """A method over all parameters, at a rate that the ID3 paper uses for every method."""
    return Row(method, (PAPER_LR,), BUDGET).changed("paper-rate", **settings)


def spread_over(share: float, variant: str, lrs: tuple[float, ...], budget: str) -> Row:
    """ID3 over Linear modules, with its budget spent in a share of the run."""
    settings = {"rank": "linear", "unmask_share": share, "every": EVERY}
    return Row("id3", lrs, budget).changed(variant, **settings)


def task(name: str, dataset: str, kind: str, metric: str, **more: object) -> TaskPreset:
    """A task of 300 steps of 16, tested once."""
    fields: dict[str, object] = {"steps": 300, "batch_size": 16, "split": "test"}
    fields["seconds"] = FIRST_GUESS
    return TaskPreset(name, dataset, kind, metric, **{**fields, **more})  # type: ignore[arg-type]


def glue_task(name: str, metric: str = "accuracy", **more: object) -> TaskPreset:
    """A GLUE task; its labelled test examples are its validation split."""
    kind = "regression" if name == "stsb" else "sequence-classification"
    return task(
        name, "nyu-mll/glue", kind, metric, config=name, split="validation", max_length=64, **more
    )


CLASSES = "sequence-classification"
TASKS = (
    task(
        *("conll2003", "conll2003", "token-classification", "f1"),
        max_length=64,
        shifts={"conll2003 -> typos": Shift(typos=True)},
    ),
    task(
        *("trec50", "trec50", CLASSES, "accuracy"),
        max_length=32,
        shifts={"trec50 -> typos": Shift(typos=True)},
    ),
    glue_task("stsb", "pearson_spearman"),
)
# On CoLA a run of 300 steps, or one at the rates of the other tasks, learns nothing: it calls all
# sentences acceptable.
CORE_TASKS = (*TASKS, glue_task("cola", "matthews", steps=1000, seconds=200.0, lr_factor=0.25))
SMALL_TASKS = TASKS[:2]
MORE_TASKS = (
    glue_task("mrpc"),
    glue_task("rte"),
    task(
        *("tweets", "tweets", "regression", "pearson"),
        max_length=48,
        shifts={
            "tweets -> movies": Shift("movie-scores"),
            "tweets -> amazon": Shift("amazon-scores"),
        },
    ),
    task(
        *("movies", "movies", CLASSES, "accuracy"),
        max_length=48,
        shifts={"movies -> amazon": Shift("amazon")},
    ),
)

FULL = Row("full", FULL_LRS)
LORA = Row("full", LORA_LRS, adapter="lora", rank=LORA_RANK)
SMALL_LORA = Row("full", LORA_LRS, adapter="lora", rank=SMALL_LORA_RANK).changed(
    "qv", adapter_targets=SMALL_TARGETS
)
FROZEN = Row("frozen", FROZEN_LRS, settings={"head_lr": None})
BITFIT = Row("bitfit", LORA_LRS)

CORE = (
    FULL,
    LORA,
    linear("r-mask", SPREAD_LRS, BUDGET),
    linear("pafi", SPREAD_LRS, BUDGET),
    paper(GRADIENT_LRS, BUDGET),
    spread_over(0.2, "early", GRADIENT_LRS, BUDGET),
)
MASKS = (
    linear("lift", LORA_LRS, BUDGET),
    linear("shira-snip", GRADIENT_LRS, BUDGET),
    linear("fish", GRADIENT_LRS, BUDGET),
    linear("static-d3", GRADIENT_LRS, BUDGET),
)
SMALL_ROWS = (
    FULL,
    SMALL_LORA,
    linear("r-mask", (3.2e-2, 6.4e-2), SMALL),
    linear("pafi", (3.2e-2, 6.4e-2), SMALL),
    paper(LORA_LRS, SMALL),
    spread_over(0.2, "early", LORA_LRS, SMALL),
    linear("fish", LORA_LRS, SMALL),
    linear("static-d3", LORA_LRS, SMALL),
)
SCHEDULES = (
    spread_over(0.5, "half", GRADIENT_LRS, BUDGET),
    spread_over(1.0, "whole", GRADIENT_LRS, BUDGET),
)
PAPER_RATES = (
    at_paper_rate("id3", d3_exp=2.0),
    at_paper_rate("pafi"),
    at_paper_rate("r-mask"),
)
FURTHER = (
    FROZEN,
    BITFIT,
    Row("r-mask", SPREAD_LRS, BUDGET),  # all parameters: what the pool is worth
    linear("gem", GRADIENT_LRS, BUDGET),
    linear("shira", LORA_LRS, BUDGET),
    linear("super", LORA_LRS, BUDGET),
)

QUALITY = Experiment(
    name="quality",
    title="MiniLM (22.7M), test sets",
    about="MiniLM on real text: methods at equal numbers of entries; needs no hub but for GLUE.",
    model=MODEL,
    blocks=(
        Block(CORE_TASKS, CORE),
        Block(CORE_TASKS, MASKS),
        Block(SMALL_TASKS, SMALL_ROWS),
        Block(SMALL_TASKS, PAPER_RATES),
        Block(TASKS, SCHEDULES),
        Block(TASKS, FURTHER),
        Block(MORE_TASKS, CORE),
    ),
    seeds=(0, 1, 2),
    protocol="tuned",
    kept=3,
    settings=SETTINGS | {"amp": "none"},
    averaged=tuple(task.name for task in CORE_TASKS),
    widen=WIDEN,
)

COSTS = Experiment(
    name="costs",
    title="MiniLM (22.7M): time, state and delta",
    about="What a step of the rows of `quality` costs, in short runs: for an idle machine.",
    model=MODEL,
    blocks=(
        Block(
            tuple(replace(task, steps=COST_STEPS) for task in SMALL_TASKS),
            tuple(replace(row, lrs=row.lrs[:1]) for row in (*CORE, *MASKS)),
        ),
    ),
    seeds=(0,),
    protocol="grid",
    kept=1,
    settings=QUALITY.settings,
    pictures=(),
)

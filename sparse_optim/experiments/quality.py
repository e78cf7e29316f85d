"""Quality against cost on real text: one encoder, many methods, equal numbers of entries.

The built-in MiniLM encoder, 300 steps of 16 short examples of about the same length under bfloat16
autocast, so that a run takes half a minute on one CPU core; the same command runs it whole on a
GPU. Every method gets the same steps, head and head learning rate; its own learning rate is chosen
on a part of train with one seed. Each run looks at the test split once, at its end.

With `--shifted` each run is also tested on other data: film reviews against product reviews, tweets
against both, questions and news with typing errors (lower case is no shift for this encoder).
"""

from __future__ import annotations

from sparse_optim.experiments.presets import Block, Experiment, Row, Shift, TaskPreset

MODEL = "minilm"
HEAD_LR = 5e-3  # for all methods but "frozen", which trains the head with its learning rate

# Seconds of a cell until one has been timed: 300 steps of TREC-50 at 0.1 s on one core.
FIRST_GUESS = 30.0

SELECTIVE_LRS = (5e-4, 1.5e-3, 5e-3, 1.5e-2)
FULL_LRS = (5e-5, 1.5e-4, 5e-4, 1.5e-3)
FROZEN_LRS = (5e-3, 1.5e-2, 5e-2, 1.5e-1)

# LoRA on every Linear module has 6 x (4 x (384 + 384) + 2 x (384 + 1536)) = 41,472 entries a rank.
# 0.5% of the encoder is 112,827 entries; 0.1% is 22,565, less than LoRA can have.
LORA_RANKS = {"0.5%": 3, "0.1%": 1}
LORA_WHOLE_RANK = 6  # where ID3 picks entries of LoRA: twice the budget to choose from

SETTINGS = {"head_lr": HEAD_LR, "amp": "bf16", "group_by_length": True}


def selective(methods: tuple[str, ...], budget: str) -> tuple[Row, ...]:
    """Rows for methods with a budget."""
    return tuple(Row(method, SELECTIVE_LRS, budget) for method in methods)


def lora(budget: str) -> Row:
    """LoRA with about the same number of entries, trained whole."""
    return Row("full", SELECTIVE_LRS, adapter="lora", rank=LORA_RANKS[budget])


def half(budget: str) -> Row:
    """ID3 that has spent its budget in the middle of the run, as `finetune` does."""
    return Row("id3", SELECTIVE_LRS, budget).changed("share=0.5", unmask_share=0.5)


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
MORE_TASKS = (
    glue_task("cola", "matthews"),
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

CORE = (
    Row("full", FULL_LRS),
    Row("frozen", FROZEN_LRS, settings={"head_lr": None}),
    *selective(("id3", "static-d3", "fish", "pafi", "r-mask"), "0.5%"),
    lora("0.5%"),
    half("0.5%"),
)
FURTHER = (
    Row("bitfit", SELECTIVE_LRS),
    *selective(("repeat-d3", "stochastic-tuning", "top-tuning"), "0.5%"),
    # A share would be one of the adapter's entries.
    Row("id3", SELECTIVE_LRS, "112827", adapter="lora", rank=LORA_WHOLE_RANK),
)
SMALL = (
    *selective(("id3", "static-d3", "fish", "pafi", "r-mask"), "0.1%"),
    lora("0.1%"),
    *selective(("repeat-d3", "stochastic-tuning", "top-tuning"), "0.1%"),
)

QUALITY = Experiment(
    name="quality",
    title="MiniLM (22.7M), test sets",
    about="MiniLM on real text: methods at equal numbers of entries; needs no hub but for GLUE.",
    model=MODEL,
    blocks=(
        Block(TASKS, CORE),
        Block(TASKS, FURTHER),
        Block(MORE_TASKS, CORE + FURTHER),
        Block(TASKS + MORE_TASKS, SMALL),
    ),
    seeds=(0, 1, 2),
    protocol="tuned",
    kept=3,
    settings=SETTINGS | {"d3_exp": 2.0, "d3_eps": 1.0},
)

"""The options of `sparse-optim finetune`: one type each, with its help."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from sparse_optim.finetune.adapters import ADAPTERS, DEFAULT_RATE
from sparse_optim.finetune.columns import TASK_NAMES
from sparse_optim.methods import METHODS, SPARSE_SCORES
from sparse_optim.policy.schedule import SCHEDULES

DEFAULT_RATES = ", ".join(f"{name} {method.lr:g}" for name, method in METHODS.items())


def option(about: str, panel: str, *names: str) -> Any:
    """A typer option under a heading of the help."""
    return typer.Option(*names, help=about, rich_help_panel=panel)


def data(about: str, *names: str) -> Any:
    """An option of the data."""
    return option(about, "Data", *names)


def training(about: str, *names: str) -> Any:
    """An option of the training."""
    return option(about, "Training", *names)


def selection(about: str, *names: str) -> Any:
    """An option of what is unmasked."""
    return option(about, "Selection", *names)


def results(about: str, *names: str) -> Any:
    """An option of what is reported and written."""
    return option(about, "Results", *names)


def machine(about: str, *names: str) -> Any:
    """An option of how it is computed."""
    return option(about, "Machine", *names)


Model = Annotated[
    str, typer.Option("--model", "-m", help="Built-in name, local folder, GGUF file or hub id.")
]
DataSet = Annotated[
    str,
    typer.Option(
        "--dataset", "-d", help="Built-in name, local CSV/JSONL/parquet file or folder, or hub id."
    ),
]
Output = Annotated[Path, typer.Option("--output", "-o", help="Folder for the results.")]
MethodName = Annotated[str, typer.Option(help=f"How to fine-tune: {', '.join(METHODS)}.")]
AdapterName = Annotated[
    str | None,
    typer.Option(
        "--adapter", help=f"Train only an adapter on a frozen base: {', '.join(ADAPTERS)}."
    ),
]
DEFAULT_RANKS = ", ".join(f"{name} {kind.rank}" for name, kind in ADAPTERS.items() if kind.rank)
AdapterRank = Annotated[
    int | None, typer.Option(help=f"Rank of the adapter (default: {DEFAULT_RANKS}).")
]
AdapterAlpha = Annotated[
    float | None, typer.Option(help="LoRA and DoRA are scaled by alpha / rank (default: 2 rank).")
]
AdapterTargets = Annotated[
    list[str] | None,
    typer.Option(
        help="LoRA and DoRA on Linear modules whose names end so (default: all). Repeatable."
    ),
]

Budget = Annotated[
    str | None,
    selection(
        "Entries to unmask in all: a count (320K, 103000) or a share (1%, 0.01). "
        "Default: 1%; where a set is drawn at each step, as many as there are biases."
    ),
]
D3Exp = Annotated[float, selection("exp of the importance |grad| / (|param| + eps)^exp.")]
D3Eps = Annotated[float, selection("eps of the importance.")]
UnmaskSchedule = Annotated[
    str, selection(f"How the budget is spread over the steps: {', '.join(SCHEDULES)}.")
]
UnmaskShare = Annotated[
    float, selection("Spend the budget in this share of the run (1: the paper's ID3).")
]
BiasCorrection = Annotated[
    str, selection("Adam's step counts from an entry's unmasking (entry) or the start (global).")
]
SparseScore = Annotated[
    str, selection(f"How sparse-adapter ranks an adapter's entries: {', '.join(SPARSE_SCORES)}.")
]
DensePrefixes = Annotated[
    list[str] | None,
    selection("Train these parameters densely, too: how their names begin. Repeatable."),
]
Backend = Annotated[str, selection("Kernels: auto, cpp, cuda, triton or reference.")]

Pooling = Annotated[
    str,
    training(
        "What a sequence head reads: cls (the model's standard head), mean (BERT only), or auto: "
        "mean where the model says that it was trained so."
    ),
]
Steps = Annotated[int | None, training("Optimizer steps (default: as many as --epochs takes).")]
Epochs = Annotated[float, training("Passes over the training examples.")]
BatchSize = Annotated[int, training("Examples of a batch.")]
EvalBatchSize = Annotated[int, training("Examples of a batch in evaluation.")]
Accumulation = Annotated[int, training("Batches of an optimizer step.")]
LearningRate = Annotated[
    float | None,
    training(
        "Learning rate. ID3 wants 1e-4 to 7e-4, ten times full fine-tuning's "
        f"(default: {DEFAULT_RATES}; with --adapter {DEFAULT_RATE:g})."
    ),
]
HeadLearningRate = Annotated[float | None, training("Of the fresh head (default: --lr).")]
LrSchedule = Annotated[
    str, training("Of the learning rate: linear, cosine, constant, ... (transformers' names).")
]
Warmup = Annotated[float, training("Warm-up: steps, or a share of the run if below 1.")]
WeightDecay = Annotated[float, training("Of active entries of matrices.")]
AdamEps = Annotated[float | None, training("eps of AdamW. Default: the method's.")]
MaxGradNorm = Annotated[float, training("Clip gradients at this norm; 0 does not clip.")]
GroupByLength = Annotated[
    bool, training("Batch examples of about the same length.", "--group-by-length")
]
FuseBackward = Annotated[
    bool,
    training(
        "Read gradients inside the backward pass and free them: less memory, the same steps.",
        "--fuse-backward",
    ),
]
Seed = Annotated[int, training("Of the fresh head, the order of examples and dropout.")]
Resume = Annotated[Path | None, training("Go on from this checkpoint (see --save-every).")]

TaskName = Annotated[
    str | None, data(f"Default: read off the columns. One of {', '.join(TASK_NAMES)}.")
]
DatasetConfig = Annotated[str | None, data("Configuration of a hub set, such as rte.")]
TextColumn = Annotated[str | None, data("Text, words or prompt (default: guessed).")]
TextPairColumn = Annotated[str | None, data("Second text of a pair (default: guessed).")]
LabelColumn = Annotated[str | None, data("Label, tags or response (default: guessed).")]
TrainSplit = Annotated[str, data("Split to train on.")]
EvalSplit = Annotated[str | None, data("Split to evaluate on (default: validation, dev or test).")]
EvalFraction = Annotated[
    float | None,
    data("Evaluate on this share held out of train instead: to choose settings with."),
]
MaxTrainExamples = Annotated[int | None, data("Train on a sample of at most so many.")]
MaxEvalExamples = Annotated[int | None, data("Evaluate on a sample of at most so many.")]
MaxLength = Annotated[int, data("Tokens of an example; the rest is cut off.")]

MetricName = Annotated[
    str | None,
    results(
        "Metric to report: accuracy, matthews, f1, pearson_spearman, perplexity, ... "
        "(default: the task's usual one)."
    ),
]
EvalEvery = Annotated[int | None, results("Steps (default: a fifth of the run).")]
LogEvery = Annotated[int | None, results("Steps (default: a hundredth of the run).")]
SaveEvery = Annotated[int | None, results("Steps between checkpoints (default: none are kept).")]
SaveModel = Annotated[bool, results("Write the whole trained model, too.", "--save-model")]
ReportTo = Annotated[
    str, results("Also log to a tracker: tensorboard, wandb, mlflow, ... or none.")
]
Overwrite = Annotated[bool, results("Replace an earlier job's results.", "--overwrite")]
Verify = Annotated[bool, results("Check base + delta == trained model.", "--verify/--no-verify")]

Dtype = Annotated[str, machine("Of the weights: float32, bfloat16 or float16.")]
Amp = Annotated[str, machine("Autocast: none or bf16.")]
Cpu = Annotated[bool, machine("Leave the GPU alone.", "--cpu")]
Threads = Annotated[int | None, machine("CPU threads of torch.")]
Debug = Annotated[bool, machine("Show the libraries' warnings, and tracebacks.", "--debug")]

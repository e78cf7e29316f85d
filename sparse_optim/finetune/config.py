"""What one fine-tuning job is asked to do."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from sparse_optim.finetune.errors import FinetuneError
from sparse_optim.policy.schedule import SCHEDULES

DEFAULT_BUDGET = 0.01

# Entries that are unmasked late have few steps left, at a decayed learning rate. Half of the run
# gained against the paper's whole run on each of three tasks: see bench/results/quality/README.md.
DEFAULT_UNMASK_SHARE = 0.5


@dataclass(frozen=True)
class FinetuneConfig:
    """Settings of a job; a field that is None takes the default named here.

    Args:
        model: built-in name, local folder, GGUF file or hub id.
        dataset: built-in name, local file or folder, or hub id.
        output: folder for the delta, the metrics and the plot.
        method: a key of `METHODS`.
        adapter: a key of `ADAPTERS`; the method then trains its entries, and the base is frozen.
        adapter_rank: of LoRA, DoRA or the bottleneck (default: the adapter's).
        adapter_alpha: of LoRA or DoRA, whose product is scaled by alpha / rank (default: 2 rank).
        adapter_targets: Linear modules that get LoRA or DoRA, by how their names end (default: all
            but a fresh head and the output layer of a language model).
        task: a key of `TASKS` (default: read off the data set's columns).
        budget: entries (int) or share of the ranked entries (float) (default: 1%; for methods
            that draw a set at each step, as many entries as there are biases).
        steps: optimizer steps (default: as many as `epochs` takes).
        lr: learning rate (default: the method's). head_lr: of the fresh head (default: lr).
        warmup: steps if >= 1, else share of the run.
        max_length: tokens of an example.
        adam_eps: eps of AdamW (default: the method's, most often 1e-8).
        max_grad_norm: clip gradients at this norm; 0 does not clip.
        eval_every, log_every, save_every: steps (defaults: a fifth of the run; a hundredth; never).
        metric: the evaluation metric to report (default: the task's first).
        group_by_length: batch examples of about the same length: less padding.
        d3_exp, d3_eps: of the importance |grad| / (|param| + eps)^exp.
        unmask_schedule: of methods that unmask step by step, a key of `SCHEDULES`.
        unmask_share: of the run, in which their budget is spent; above 0, at most 1 (the paper's).
        bias_correction: "entry" or "global", as in `MaskedAdamW`.
        sparse_score: of "sparse-adapter", a key of `SPARSE_SCORES`.
        fuse_backward: as in `MaskedAdamW`: no buffer for gradients.
        dense: further parameters to train densely, by the beginning of their names.
        pooling: what a sequence head reads: "cls", "mean", or "auto" as the model was trained.
        resume: a Trainer checkpoint to go on from.
        report_to: a tracker that transformers knows (tensorboard, wandb, ...), or none.
    """

    model: str
    dataset: str
    output: Path
    method: str = "id3"
    adapter: str | None = None
    adapter_rank: int | None = None
    adapter_alpha: float | None = None
    adapter_targets: tuple[str, ...] = ()
    task: str | None = None
    dataset_config: str | None = None
    text_column: str | None = None
    text_pair_column: str | None = None
    label_column: str | None = None
    train_split: str = "train"
    eval_split: str | None = None
    eval_fraction: float | None = None
    max_train_examples: int | None = None
    max_eval_examples: int | None = None
    max_length: int = 128
    budget: int | float | None = None
    steps: int | None = None
    epochs: float = 3.0
    batch_size: int = 16
    eval_batch_size: int = 64
    accumulation: int = 1
    lr: float | None = None
    head_lr: float | None = None
    schedule: str = "linear"
    warmup: float = 0.0
    weight_decay: float = 0.0
    adam_eps: float | None = None
    max_grad_norm: float = 1.0
    group_by_length: bool = False
    d3_exp: float = 0.0
    d3_eps: float = 1.0
    unmask_schedule: str = "uniform"
    unmask_share: float = DEFAULT_UNMASK_SHARE
    bias_correction: str = "entry"
    sparse_score: str = "snip"
    fuse_backward: bool = False
    dense: tuple[str, ...] = ()
    pooling: str = "auto"
    backend: str = "auto"
    dtype: str = "float32"
    amp: str = "none"
    seed: int = 0
    metric: str | None = None
    eval_every: int | None = None
    log_every: int | None = None
    save_every: int | None = None
    save_model: bool = False
    resume: Path | None = None
    report_to: str = "none"
    overwrite: bool = False
    verify: bool = True
    cpu: bool = False
    threads: int | None = None

    def __post_init__(self) -> None:
        """Raise FinetuneError for numbers out of range."""
        positive = {
            "steps": self.steps,
            "epochs": self.epochs,
            "batch_size": self.batch_size,
            "eval_batch_size": self.eval_batch_size,
            "accumulation": self.accumulation,
            "max_length": self.max_length,
            "lr": self.lr,
            "head_lr": self.head_lr,
            "adam_eps": self.adam_eps,
            "budget": self.budget,
            "adapter_rank": self.adapter_rank,
            "adapter_alpha": self.adapter_alpha,
            "eval_every": self.eval_every,
            "log_every": self.log_every,
            "save_every": self.save_every,
            "threads": self.threads,
        }
        for name, value in positive.items():
            if value is not None and not value > 0:
                raise FinetuneError(f"{option(name)} must be above 0, got {value}")
        for name in ("warmup", "weight_decay", "max_grad_norm"):
            if getattr(self, name) < 0:
                raise FinetuneError(f"{option(name)} must be at least 0, got {getattr(self, name)}")
        if self.unmask_schedule not in SCHEDULES:
            raise FinetuneError(
                f"--unmask-schedule must be one of {', '.join(SCHEDULES)}, "
                f"got {self.unmask_schedule!r}"
            )
        if not 0 < self.unmask_share <= 1:
            raise FinetuneError(
                f"--unmask-share must be above 0 and at most 1, got {self.unmask_share}"
            )
        if self.fuse_backward and self.accumulation > 1:
            raise FinetuneError(
                "--fuse-backward frees gradients at once, so that --accumulation cannot add them "
                "up: leave one of both out"
            )
        if self.amp not in ("none", "bf16"):
            raise FinetuneError(f"--amp must be none or bf16, got {self.amp!r}")
        for name in ("adapter_rank", "adapter_alpha", "adapter_targets"):
            if self.adapter is None and getattr(self, name):
                raise FinetuneError(f"{option(name)} needs --adapter")
        if self.adapter is not None and self.save_model:
            raise FinetuneError(
                "--save-model is for runs without --adapter: the folder adapter/ is written anyway"
            )


def option(field: str) -> str:
    """The command-line option of a field."""
    return "--" + field.replace("_", "-")


def parse_budget(text: str) -> int | float:
    """Read '320K', '3.5M' or '103000' as entries, '1%' or '0.01' as a share of the pool.

    Raises:
        FinetuneError: if it is none of these, or a share above 100%.

    Example:
        >>> parse_budget("320K"), parse_budget("0.5%"), parse_budget("1000")
        (320000, 0.005, 1000)
    """
    number, unit = text.strip().replace("_", "").replace(",", ""), ""
    if number and number[-1].upper() in "%KMB":
        number, unit = number[:-1], number[-1].upper()
    try:
        if unit == "%" or (unit == "" and "." in number):
            share = float(number) / (100 if unit else 1)
            if not 0 < share <= 1:
                raise FinetuneError(f"--budget: a share lies above 0 and at most 1, got {text!r}")
            return share
        entries = round(float(number) * {"": 1, "K": 10**3, "M": 10**6, "B": 10**9}[unit])
    except (ValueError, OverflowError) as error:
        if isinstance(error, FinetuneError):
            raise
        raise FinetuneError(
            f"--budget: expected entries (320K, 103000) or a share (1%, 0.01), got {text!r}"
        ) from None
    if entries < 1:
        raise FinetuneError(f"--budget must be at least one entry, got {text!r}")
    return entries

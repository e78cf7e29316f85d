"""The settings of a fine-tuning job, each with its type, default and help."""

from __future__ import annotations

import math
import typing
from dataclasses import MISSING, dataclass, fields
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal

from sparse_optim.finetune.adapter_kinds import ADAPTERS, DEFAULT_RATE
from sparse_optim.finetune.columns import TaskName
from sparse_optim.finetune.errors import FinetuneError
from sparse_optim.finetune.settings import KEY, Setting, choices, setting
from sparse_optim.methods import METHODS
from sparse_optim.policy.defaults import RANK, SAMPLED_EVERY, UNMASK_SHARE

DEFAULT_BUDGET = 0.01

# Tokens: summaries of CNN/DailyMail have 56 words on average (See et al. 2017, section 4).
MAX_TARGET_LENGTH = 128

AUTO = "auto"  # as --lr: see sparse_optim.finetune.auto_rate

LAST = Path("last")  # as --resume: the newest checkpoint in the output folder

RATES = ", ".join(f"{name} {method.lr:g}" for name, method in METHODS.items())
RANKS = ", ".join(f"{name} {kind.rank}" for name, kind in ADAPTERS.items() if kind.rank)

ScheduleName = Literal["uniform", "linear"]  # the keys of policy.schedule.SCHEDULES
ScoreName = Literal["rand", "mag", "snip", "grasp", "synflow"]  # of methods.SPARSE_SCORES
BackendName = Literal["auto", "cpp", "cuda", "triton", "reference"]


def parse_budget(text: str) -> int | float:
    """Read '320K', '3.5M' or '103000' as entries, '1%' or '0.01' as a share of the pool.

    Raises:
        FinetuneError: if it is none of these, or a share above 100%.

    Examples:
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
                raise FinetuneError(f"--budget: a share is above 0 and at most 1, got {text!r}")
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


def parse_rate(text: str) -> float | str:
    """Read a learning rate: a number, or auto.

    Raises:
        FinetuneError: if it is neither.
    """
    if text == AUTO:
        return AUTO
    try:
        return float(text)
    except ValueError:
        raise FinetuneError(
            f"--lr: expected a number such as 5e-4, or auto, got {text!r}"
        ) from None


def zero_is_none(value: float) -> float | None:
    """None for 0: the command line has no way to write None."""
    return None if value == 0 else value


_data = partial(setting, panel="Data")
_training = partial(setting, panel="Training")
_selection = partial(setting, panel="Selection")
_results = partial(setting, panel="Results")
_machine = partial(setting, panel="Machine")


@dataclass(frozen=True)
class FinetuneConfig:
    """Settings of a job. Each field carries its help; `sparse-optim finetune --help` prints it.

    Raises:
        FinetuneError: a number is out of range, a name is unknown, or settings exclude each other.
    """

    model: str = setting(MISSING, "Built-in name, local folder, GGUF file or hub id.", short="-m")
    dataset: str = setting(
        MISSING, "Built-in name, local CSV/JSONL/parquet file or folder, or hub id.", short="-d"
    )
    output: Path = setting(MISSING, "Write the results to this folder.", short="-o")
    method: str = setting("id3", f"Fine-tune by this method: {', '.join(METHODS)}.")
    adapter: str | None = setting(
        None, f"Freeze the base and train only an adapter: {', '.join(ADAPTERS)}."
    )
    adapter_rank: int | None = setting(None, f"Rank of the adapter (default: {RANKS}).")
    adapter_alpha: float | None = setting(
        None, "LoRA and DoRA: scale by alpha / rank (default: 2 rank)."
    )
    adapter_targets: tuple[str, ...] = setting(
        (),
        "LoRA and DoRA: adapt only Linear modules with names that end in this (default: all but a "
        "fresh head and a language model's output layer). Repeatable.",
    )
    budget: int | float | None = _selection(
        None,
        "Number of entries to unmask (320K, 103000) or share of the ranked entries (1%, 0.01). "
        "Default: 1%; for methods that choose a new set at each step, the number of biases.",
        written=str,
        read=parse_budget,
    )
    rank: str | None = _selection(
        None,
        "Parameters that compete for the budget: all, linear (weights of Linear modules) or a "
        "regular expression for their names; the others stay frozen (default: "
        f"{RANK}; all with --adapter).",
    )
    d3_exp: float = _selection(0.0, "exp in the importance |grad| / (|param| + eps)^exp.")
    d3_eps: float = _selection(1.0, "eps in the importance.")
    unmask_schedule: ScheduleName = _selection(
        "uniform", "Spread the budget over the steps evenly, or with most entries early (linear)."
    )
    unmask_share: float | None = _selection(
        None,
        "id3: spend the budget in this share of the run (1: the paper's ID3; default: "
        f"{UNMASK_SHARE}; 1 with --series, so that every saved model has been trained).",
    )
    every: int | None = _selection(
        None,
        "id3: unmask only at every N-th step; the steps between are faster (1: the paper's ID3; "
        f"default: at most {SAMPLED_EVERY} where --sampled-backward is possible, else 1).",
    )
    bias_correction: Literal["entry", "global"] = _selection(
        "entry", "Count Adam's steps from the unmasking of an entry, or from the start (global)."
    )
    sparse_score: ScoreName = _selection(
        "snip", "Score by which sparse-adapter ranks an adapter's entries."
    )
    dense: tuple[str, ...] = _selection(
        (), "Also train parameters with names that begin with this, all entries. Repeatable."
    )
    backend: BackendName = _selection("auto", "Kernels to compute with.")
    pooling: Literal["auto", "cls", "mean"] = _training(
        "auto",
        "Input of a classification head: the model's standard head (cls), the mean over tokens "
        "(BERT only), or mean if the model's files say that it was trained so (auto).",
    )
    steps: int | None = _training(None, "Optimizer steps (default: set by --epochs).")
    epochs: float = _training(3.0, "Passes over the training examples.")
    batch_size: int = _training(16, "Batch size.")
    eval_batch_size: int | None = _training(
        None, "Batch size in evaluation (default: 64, for causal-lm and summarization 8)."
    )
    accumulation: int = _training(1, "Gradient accumulation steps.")
    lr: float | str | None = _training(
        None,
        "Learning rate, or auto: from the size of a first step on the method's entries, relative "
        f"to the weights (default: {RATES}; with --adapter "
        f"at least {DEFAULT_RATE:g}).",
        written=str,
        read=parse_rate,
    )
    head_lr: float | None = _training(None, "Learning rate of the fresh head (default: --lr).")
    schedule: str = _training(
        "linear",
        "Learning rate schedule: linear, cosine, constant or another that transformers knows.",
    )
    warmup: float = _training(0.0, "Warm-up: steps, or a share of the run if below 1.")
    weight_decay: float = _training(0.0, "Weight decay of the active entries of matrices.")
    adam_eps: float | None = _training(None, "eps of AdamW (default: set by the method).")
    max_grad_norm: float | None = _training(
        1.0, "Clip gradients to this norm; 0: no clipping.", written=float, read=zero_is_none
    )
    group_by_length: bool = _training(False, "Batch examples of similar length, to save padding.")
    gradient_checkpointing: bool = _training(
        False,
        "Recompute activations in the backward pass: less memory, about a third more time a step.",
    )
    fuse_backward: bool = _training(
        False,
        "Read gradients inside the backward pass and free them: less memory, the same steps.",
    )
    sampled_backward: bool | None = _training(
        None,
        "On steps that unmask nothing, compute weight gradients of active entries alone: faster, "
        "the same up to rounding (default: where the method allows it).",
    )
    seed: int = _training(0, "Seed of the fresh head, the order of the examples and dropout.")
    patience: int | None = _training(
        None, "Stop after this number of evaluations in a row without a better --metric."
    )
    best: bool | None = _training(
        None,
        "Keep the model of the best evaluation, not of the last step (default: with --patience).",
    )
    resume: Path | None = _training(
        None, "Resume from this checkpoint (see --save-every), or the last one of --output: last."
    )
    task: TaskName | None = _data(None, "Task (default: guessed from the columns).")
    dataset_config: str | None = _data(None, "Configuration of a hub data set, such as rte.")
    text_column: str | None = _data(
        None, "Column with the text, words or prompt (default: guessed)."
    )
    text_pair_column: str | None = _data(
        None, "Column with the second text of a pair (default: guessed)."
    )
    label_column: str | None = _data(
        None, "Column with the label, tags, response or summary (default: guessed)."
    )
    train_split: str = _data("train", "Train on this split.")
    eval_split: str | None = _data(
        None, "Evaluate on this split (default: validation, dev or test)."
    )
    eval_fraction: float | None = _data(
        None, "Evaluate on this share of train, held out: use it to choose settings."
    )
    max_train_examples: int | None = _data(None, "Train on a sample of at most this size.")
    max_eval_examples: int | None = _data(None, "Evaluate on a sample of at most this size.")
    max_length: int | None = _data(
        None,
        "Cut examples to this number of tokens (default: 128, for causal-lm 1024, for "
        "summarization 1024 or the model's own limit).",
    )
    max_target_length: int | None = _data(
        None,
        "summarization: cut summaries to this number of tokens, and write at most as many "
        f"(default: {MAX_TARGET_LENGTH}).",
    )
    source_prefix: str | None = _data(
        None,
        "summarization: put this before each text (default: what the model's config.json says, "
        'such as "summarize: " for T5).',
    )
    num_beams: int | None = _data(
        None,
        "summarization: write by beam search with this number of beams (default: 1, greedy: "
        "evaluations take less time).",
    )
    chat: bool | None = _data(
        None,
        "causal-lm: render prompts and responses with the tokenizer's chat template (default: only "
        "instructions, as in Alpaca, and conversations).",
    )
    packing: bool = _data(
        False,
        "causal-lm: fill rows of --max-length tokens with several examples that do not see each "
        "other; --batch-size counts rows.",
    )
    metric: str | None = _results(
        None,
        "Report this metric: accuracy, matthews, f1, pearson_spearman, perplexity, rouge1, ... "
        "(default: set by the task).",
    )
    eval_every: int | None = _results(
        None, "Steps between evaluations (default: a fifth of the run)."
    )
    log_every: int | None = _results(None, "Steps between logs (default: a hundredth of the run).")
    save_every: int | None = _results(
        None, "Steps between checkpoints (default: save no checkpoints)."
    )
    save_total_limit: int | None = _results(
        None, "Keep at most this number of checkpoints, the newest ones (default: all)."
    )
    series: int | None = _results(
        None,
        "id3: also save the model at each of N equal parts of the budget, to series/, with its "
        "--metric.",
    )
    store_steps: bool = _results(
        True,
        "Store in the delta at which step each entry was unmasked, 4 bytes an entry; without, no "
        "prefix of the budget can be taken from it.",
    )
    save_model: bool = _results(False, "Also write the whole trained model.")
    push_to_hub: str | None = _results(None, "Upload the results to this repository: USER/NAME.")
    report_to: str = _results(
        "none", "Also log to a tracker: tensorboard, wandb, mlflow, ... or none."
    )
    overwrite: bool = _results(False, "Replace the results of an earlier job.")
    verify: bool = _results(True, "Check that base + delta is the trained model.")
    dtype: Literal["float32", "bfloat16", "float16"] = _machine("float32", "dtype of the weights.")
    amp: Literal["none", "bf16", "fp16"] = _machine(
        "none", "Autocast: bf16, or on a GPU fp16 with loss scaling."
    )
    cpu: bool = _machine(False, "Use the CPU.")
    threads: int | None = _machine(None, "Number of CPU threads.")

    def __post_init__(self) -> None:
        """Check names and numbers."""
        for name, hint in field_types().items():
            known, value = choices(hint), getattr(self, name)
            if known and value is not None and value not in known:
                raise FinetuneError(
                    f"{option(name)} must be one of {', '.join(known)}, got {value!r}"
                )
        for name in field_types():
            value = getattr(self, name)
            if isinstance(value, float) and not math.isfinite(value):
                raise FinetuneError(f"{option(name)} must be a finite number, got {value}")
        if isinstance(self.lr, str) and self.lr != AUTO:
            raise FinetuneError(f"--lr must be a number or {AUTO}, got {self.lr!r}")
        for name in _POSITIVE:
            value = getattr(self, name)
            if value not in (None, AUTO) and not value > 0:
                raise FinetuneError(f"{option(name)} must be above 0, got {value}")
        for name, most in _AT_MOST.items():
            value = getattr(self, name)
            if value is not None and not 0 <= value <= most:
                raise FinetuneError(f"{option(name)} must be 0 to {most:,}, got {value:,}")
        for name in ("warmup", "weight_decay"):
            if not getattr(self, name) >= 0:
                raise FinetuneError(f"{option(name)} must be at least 0, got {getattr(self, name)}")
        if self.unmask_share is not None and not 0 < self.unmask_share <= 1:
            raise FinetuneError(
                f"--unmask-share must be above 0 and at most 1, got {self.unmask_share}"
            )
        self._check_combinations()

    @property
    def keeps_best(self) -> bool:
        """Whether the result is the model of the best evaluation."""
        return self.patience is not None if self.best is None else self.best

    def _check_combinations(self) -> None:
        if self.save_total_limit is not None and self.save_every is None:
            raise FinetuneError("--save-total-limit is for checkpoints: add --save-every")
        if self.patience is not None and self.best is False:
            raise FinetuneError(
                "--patience stops after the best evaluation, and --no-best keeps the model of the "
                "last: drop one of them"
            )
        if self.amp == "fp16" and self.dtype == "float16":
            raise FinetuneError(
                "--amp fp16 scales the loss, which weights in float16 do not allow: use --dtype "
                "float32, or drop --amp"
            )
        if self.fuse_backward and self.accumulation > 1:
            raise FinetuneError(
                "--fuse-backward frees each gradient at once, so --accumulation has nothing to add "
                "up: drop one of them"
            )
        if self.every not in (None, 1, SAMPLED_EVERY) and self.method != "id3":
            raise FinetuneError(f"--every is for the method id3, not for {self.method}")
        if self.series is not None and self.method != "id3":
            raise FinetuneError(
                f"--series is for the method id3: with {self.method} no set of entries grows in "
                "parts: drop it"
            )
        for name in ("adapter_rank", "adapter_alpha", "adapter_targets"):
            if self.adapter is None and getattr(self, name):
                raise FinetuneError(f"{option(name)} needs --adapter")
        if self.adapter is not None and self.save_model:
            raise FinetuneError(
                "--save-model is for runs without --adapter: the folder adapter/ is written anyway"
            )


_POSITIVE = (
    *("steps", "epochs", "batch_size", "eval_batch_size", "accumulation", "max_length"),
    *("lr", "head_lr", "adam_eps", "max_grad_norm", "budget", "adapter_rank", "adapter_alpha"),
    *("eval_every", "log_every", "save_every", "threads", "every", "patience"),
    *("save_total_limit", "series", "max_target_length", "num_beams"),
)


# torch ends the process where it cannot start its threads; steps are counted in 32 bits.
_AT_MOST = {"seed": 2**32 - 1, "threads": 1024, "steps": 2**31 - 2, "series": 100}


@cache
def field_types() -> dict[str, Any]:
    """The type of each field of FinetuneConfig, by name."""
    return typing.get_type_hints(FinetuneConfig)


def settings() -> dict[str, Setting]:
    """The `Setting` of each field of FinetuneConfig, by name."""
    return {field.name: field.metadata[KEY] for field in fields(FinetuneConfig)}


def option(field: str) -> str:
    """The command-line option of a field."""
    return "--" + field.replace("_", "-")

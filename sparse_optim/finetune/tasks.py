"""The tasks: model class, tokenised examples, collator and metrics of each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from datasets import Dataset
from torch import Tensor
from transformers import (
    DataCollatorForTokenClassification,
    DataCollatorWithPadding,
    EvalPrediction,
    PreTrainedTokenizerBase,
)

from sparse_optim.finetune.encode import (
    IGNORED,
    Encoded,
    encode_generation,
    encode_texts,
    encode_words,
)
from sparse_optim.finetune.errors import FinetuneError
from sparse_optim.finetune.metrics import (
    classification_metrics,
    first_output,
    generation_metrics,
    multi_label_metrics,
    regression_metrics,
    tagging_metrics,
    token_losses,
)
from sparse_optim.finetune.packing import PadGeneration

Encode = Callable[[Dataset, PreTrainedTokenizerBase, int], Encoded]
Metrics = Callable[[EvalPrediction, list[str]], dict[str, float]]


@dataclass(frozen=True)
class Task:
    """One kind of fine-tuning.

    `metrics` has the names of the values that `compute` returns; the first is the default.
    `problem_type` is that of transformers' config, None for one of several classes and for text.
    `max_length` is the default number of tokens to which examples are cut, `eval_batch_size` the
    default batch size in evaluation: logits over a vocabulary take gigabytes.
    """

    model_class: str
    encode_counted: Encode
    collator: Callable[[PreTrainedTokenizerBase], Any]
    compute: Metrics
    metrics: tuple[str, ...]
    preprocess_logits: Callable[[Any, Tensor], Tensor] | None = None
    problem_type: str | None = None
    max_length: int = 128
    eval_batch_size: int = 64

    def check_metric(self, metric: str | None) -> str:
        """The metric to report.

        Raises:
            FinetuneError: the task does not have it.
        """
        if metric is not None and metric not in self.metrics:
            raise FinetuneError(
                f"no metric {metric!r} for this task; known: {', '.join(self.metrics)}"
            )
        return metric or self.metrics[0]


def pad_text(tokenizer: PreTrainedTokenizerBase) -> Any:
    """Collator for one label an example."""
    return DataCollatorWithPadding(tokenizer)


def pad_tokens(tokenizer: PreTrainedTokenizerBase) -> Any:
    """Collator for one label a token, padded with the ignored label."""
    return DataCollatorForTokenClassification(tokenizer, label_pad_token_id=IGNORED)


TASKS = {
    "sequence-classification": Task(
        "AutoModelForSequenceClassification",
        encode_texts,
        pad_text,
        classification_metrics,
        ("accuracy", "matthews", "f1", "f1_positive"),
        preprocess_logits=first_output,
    ),
    "multi-label-classification": Task(
        "AutoModelForSequenceClassification",
        encode_texts,
        pad_text,
        multi_label_metrics,
        ("f1_micro", "f1_macro", "subset_accuracy"),
        preprocess_logits=first_output,
        problem_type="multi_label_classification",
    ),
    "regression": Task(
        "AutoModelForSequenceClassification",
        encode_texts,
        pad_text,
        regression_metrics,
        ("pearson_spearman", "pearson", "spearman", "rmse"),
        preprocess_logits=first_output,
        problem_type="regression",
    ),
    "token-classification": Task(
        "AutoModelForTokenClassification",
        encode_words,
        pad_tokens,
        tagging_metrics,
        ("f1", "precision", "recall", "accuracy"),
        preprocess_logits=first_output,
    ),
    "causal-lm": Task(
        "AutoModelForCausalLM",
        encode_generation,
        PadGeneration,
        generation_metrics,
        ("perplexity", "token_loss"),
        preprocess_logits=token_losses,
        max_length=1024,
        eval_batch_size=8,
    ),
}

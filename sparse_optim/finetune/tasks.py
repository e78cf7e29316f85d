"""The tasks: model class, tokenised examples, collator and metrics of each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from datasets import Dataset
from torch import Tensor
from transformers import (
    DataCollatorForSeq2Seq,
    DataCollatorForTokenClassification,
    DataCollatorWithPadding,
    EvalPrediction,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from sparse_optim.finetune.encode import (
    IGNORED,
    Encoded,
    Lengths,
    encode_generation,
    encode_summaries,
    encode_texts,
    encode_words,
)
from sparse_optim.finetune.errors import FinetuneError
from sparse_optim.finetune.metrics import (
    ROUGE,
    classification_metrics,
    decoded,
    first_output,
    generation_metrics,
    multi_label_metrics,
    regression_metrics,
    summary_metrics,
    tagging_metrics,
    token_losses,
)
from sparse_optim.finetune.packing import PadGeneration

Encode = Callable[..., Encoded]  # (split, tokenizer, max_length), where it writes also Targets
Metrics = Callable[[EvalPrediction, list[str]], dict[str, float]]


@dataclass(frozen=True)
class Task:
    """One kind of fine-tuning.

    `metrics` has the names of the values that `compute` returns; the first is the default.
    `writes` says that evaluation lets the model write, and that `compute` gets texts.
    `problem_type` is that of transformers' config, None for one of several classes and for text.
    `max_length` is the default number of tokens to which examples are cut, `eval_batch_size` the
    default batch size in evaluation: logits over a vocabulary take gigabytes.
    """

    model_class: str
    encode_counted: Encode
    collator: Callable[[PreTrainedTokenizerBase, PreTrainedModel], Any]
    compute: Metrics
    metrics: tuple[str, ...]
    preprocess_logits: Callable[[Any, Tensor], Tensor] | None = None
    problem_type: str | None = None
    max_length: int = 128
    eval_batch_size: int = 64
    writes: bool = False

    def encode(
        self, split: Dataset, tokenizer: PreTrainedTokenizerBase, lengths: Lengths
    ) -> Encoded:
        """Tokenise and count examples."""
        targets = () if lengths.targets is None else (lengths.targets,)
        return self.encode_counted(split, tokenizer, lengths.max_length, *targets)

    def scores(
        self, tokenizer: PreTrainedTokenizerBase, names: list[str]
    ) -> Callable[[EvalPrediction], dict[str, float]]:
        """The function with which a Trainer computes the metrics.

        Args:
            names: the classes.
        """
        if self.writes:
            return lambda prediction: self.compute(decoded(prediction, tokenizer), names)
        return lambda prediction: self.compute(prediction, names)

    def check_metric(self, metric: str | None, names: list[str] | None = None) -> str:
        """The metric to report.

        Args:
            names: the classes, once they are known.

        Raises:
            FinetuneError: the task does not have it, or it is for two classes.
        """
        if metric is not None and metric not in self.metrics:
            raise FinetuneError(
                f"no metric {metric!r} for this task; known: {', '.join(self.metrics)}"
            )
        if metric == "f1_positive" and names is not None and len(names) != 2:
            raise FinetuneError(
                f"--metric f1_positive is for two classes, and the data has {len(names)}: use f1"
            )
        return metric or self.metrics[0]


def pad_text(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> Any:
    """Collator for one label an example."""
    return DataCollatorWithPadding(tokenizer)


def pad_tokens(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> Any:
    """Collator for one label a token, padded with the ignored label."""
    return DataCollatorForTokenClassification(tokenizer, label_pad_token_id=IGNORED)


def pad_generation(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> Any:
    """Collator for texts that a decoder continues."""
    return PadGeneration(tokenizer)


def pad_pairs(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> Any:
    """Collator for texts and summaries; the model makes the decoder's inputs from the labels."""
    return DataCollatorForSeq2Seq(tokenizer, model, label_pad_token_id=IGNORED)


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
        pad_generation,
        generation_metrics,
        ("perplexity", "token_loss"),
        preprocess_logits=token_losses,
        max_length=1024,
        eval_batch_size=8,
    ),
    "summarization": Task(
        "AutoModelForSeq2SeqLM",
        encode_summaries,
        pad_pairs,
        summary_metrics,
        ROUGE,
        max_length=1024,
        eval_batch_size=8,
        writes=True,
    ),
}

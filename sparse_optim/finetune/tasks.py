"""The tasks: model class, tokenised examples, collator and metrics of each."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor
from transformers import (
    DataCollatorForTokenClassification,
    DataCollatorWithPadding,
    EvalPrediction,
    PreTrainedTokenizerBase,
)

from sparse_optim.finetune.errors import FinetuneError

IGNORED = -100  # label of tokens that carry no loss

Encode = Callable[[Dataset, PreTrainedTokenizerBase, int], Dataset]
Metrics = Callable[[EvalPrediction, list[str]], dict[str, float]]


@dataclass(frozen=True)
class Task:
    """One kind of fine-tuning.

    `metrics` has the names of the values that `compute` returns; the first is the default.
    """

    model_class: str
    encode: Encode
    collator: Callable[[PreTrainedTokenizerBase], Any]
    compute: Metrics
    metrics: tuple[str, ...]
    preprocess_logits: Callable[[Any, Tensor], Tensor] | None = None

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


def encode_texts(split: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Dataset:
    """Tokenise texts or pairs of texts, with one label each; an empty text is an end token."""
    end = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.pad_token_id
    empty = {"input_ids": end, "attention_mask": 1, "token_type_ids": 0}

    def encode(batch: Mapping[str, list[Any]]) -> dict[str, Any]:
        pair = batch.get("text_pair")
        encoded = tokenizer(batch["text"], pair, truncation=True, max_length=max_length)
        for row, ids in enumerate(encoded["input_ids"]):
            if not ids:  # a decoder's tokenizer adds nothing to an empty text
                for name, value in empty.items():
                    if name in encoded:
                        encoded[name][row] = [value]
        return {**encoded, "labels": batch["label"]}

    return tokenized(split, encode)


def encode_words(split: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Dataset:
    """Tokenise lists of words; the first token of a word carries its tag."""

    def encode(batch: Mapping[str, list[Any]]) -> dict[str, Any]:
        encoded = tokenizer(
            batch["text"], is_split_into_words=True, truncation=True, max_length=max_length
        )
        labels = []
        for row, tags in enumerate(batch["label"]):
            words = encoded.word_ids(row)
            labels.append(
                [
                    tags[word] if word is not None and word != previous else IGNORED
                    for previous, word in zip([None, *words], words, strict=False)
                ]
            )
        return {**encoded, "labels": labels}

    if not tokenizer.is_fast:
        raise FinetuneError("token classification needs a fast tokenizer (tokenizer.json)")
    return tokenized(split, encode)


def encode_generation(
    split: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> Dataset:
    """Tokenise plain texts, or prompts with responses; prompts carry no loss."""
    end = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []

    def encode(batch: Mapping[str, list[Any]]) -> dict[str, Any]:
        prompts = [f"{text}\n" if "label" in batch else "" for text in batch["text"]]
        answers = [str(answer) for answer in batch.get("label", batch["text"])]
        rows: dict[str, Any] = {"input_ids": [], "attention_mask": [], "labels": []}
        for prompt, answer in zip(prompts, answers, strict=True):
            head = tokenizer(prompt)["input_ids"] if prompt else []
            tail = tokenizer(answer, add_special_tokens=not prompt)["input_ids"] + end
            ids = (head + tail)[:max_length]
            rows["input_ids"].append(ids)
            rows["attention_mask"].append([1] * len(ids))
            rows["labels"].append(([IGNORED] * len(head) + tail)[:max_length])
        return rows

    encoded = tokenized(split, encode)
    # The first token is never predicted: an example needs one more that carries a loss.
    kept = encoded.filter(
        lambda row: any(label != IGNORED for label in row["labels"][1:]), load_from_cache_file=False
    )
    if len(kept) == 0:
        raise FinetuneError(
            f"no example has a token to learn within --max-length {max_length}; raise it"
        )
    return kept


def tokenized(split: Dataset, encode: Callable[..., dict[str, Any]]) -> Dataset:
    """Map in batches, without leaving cache files behind."""
    return split.map(
        encode,
        batched=True,
        remove_columns=split.column_names,
        load_from_cache_file=False,
        keep_in_memory=True,
    )


def pad_text(tokenizer: PreTrainedTokenizerBase) -> Any:
    """Collator for one label an example."""
    return DataCollatorWithPadding(tokenizer)


def pad_tokens(tokenizer: PreTrainedTokenizerBase) -> Any:
    """Collator for one label a token, padded with the ignored label."""
    return DataCollatorForTokenClassification(tokenizer, label_pad_token_id=IGNORED)


def class_ids(prediction: EvalPrediction) -> tuple[np.ndarray, np.ndarray]:
    """Predicted and true classes."""
    return np.asarray(prediction.predictions).argmax(-1), np.asarray(prediction.label_ids)


def classification_metrics(prediction: EvalPrediction, names: list[str]) -> dict[str, float]:
    """Accuracy, Matthews correlation, macro F1, and F1 of the second class alone (GLUE's MRPC)."""
    from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

    guess, truth = class_ids(prediction)
    seen = set(truth) | set(guess)
    return {
        "accuracy": float(accuracy_score(truth, guess)),
        "f1": float(f1_score(truth, guess, average="macro", zero_division=0)),
        "f1_positive": float(f1_score(truth == 1, guess == 1, zero_division=0)),
        # Undefined, and a warning, where there is one class alone.
        "matthews": float(matthews_corrcoef(truth, guess)) if len(seen) > 1 else 0.0,
    }


def regression_metrics(prediction: EvalPrediction, names: list[str]) -> dict[str, float]:
    """Pearson and Spearman correlation, their mean, and the root mean square error."""
    from scipy.stats import rankdata

    guess = np.asarray(prediction.predictions, dtype=np.float64).reshape(-1)
    truth = np.asarray(prediction.label_ids, dtype=np.float64).reshape(-1)
    pearson = correlation(guess, truth)
    spearman = correlation(rankdata(guess), rankdata(truth))
    return {
        "pearson_spearman": (pearson + spearman) / 2,
        "pearson": pearson,
        "spearman": spearman,
        "rmse": float(np.sqrt(np.mean((guess - truth) ** 2))),
    }


def correlation(first: np.ndarray, second: np.ndarray) -> float:
    """Pearson correlation, 0 where one side is constant (a model that has learnt nothing yet)."""
    first, second = first - first.mean(), second - second.mean()
    scale = float(np.sqrt((first**2).sum() * (second**2).sum()))
    return float((first * second).sum()) / scale if scale > 0 else 0.0


def tagging_metrics(prediction: EvalPrediction, names: list[str]) -> dict[str, float]:
    """Entity F1, precision and recall (CoNLL), and accuracy of single tags.

    Tags that are not BIO (parts of speech, say) have no entities: F1 is of the single tags then.
    """
    guess, truth = class_ids(prediction)
    counted = truth != IGNORED
    accuracy = float((guess == truth)[counted].mean())
    if not all(name == "O" or name[:2] in ("B-", "I-", "E-", "S-", "L-", "U-") for name in names):
        from sklearn.metrics import precision_recall_fscore_support

        precision, recall, f1, _ = precision_recall_fscore_support(
            truth[counted], guess[counted], average="macro", zero_division=0
        )
    else:
        precision, recall, f1 = entity_scores(guess, truth, counted, names)
    return {
        "f1": float(f1),
        "precision": float(precision),
        "recall": float(recall),
        "accuracy": accuracy,
    }


def entity_scores(
    guess: np.ndarray, truth: np.ndarray, counted: np.ndarray, names: list[str]
) -> tuple[float, float, float]:
    """Precision, recall and F1 of whole entities: right only if type, start and end are."""

    def all_entities(ids: np.ndarray) -> set[tuple[int, str, int, int]]:
        rows = [[names[tag] for tag in row[mask]] for row, mask in zip(ids, counted, strict=True)]
        return {(row, *entity) for row, tags in enumerate(rows) for entity in entities(tags)}

    found, wanted = all_entities(guess), all_entities(truth)
    right = len(found & wanted)
    precision = right / len(found) if found else 0.0
    recall = right / len(wanted) if wanted else 0.0
    return precision, recall, 2 * right / (len(found) + len(wanted)) if right else 0.0


def entities(tags: list[str]) -> list[tuple[str, int, int]]:
    """The entities of a sentence as (type, first word, last word).

    Reads the schemes IOB1, IOB2, IOBES and BILOU by the rules of the script ``conlleval`` of the
    CoNLL-2003 task (Tjong Kim Sang and De Meulder 2003), which accept any sequence of tags:
    a word begins an entity if its tag says so, or if it follows one of another type or an end.
    """
    found: list[tuple[str, int, int]] = []
    previous, previous_kind = "O", ""
    for word, tag in enumerate(tags):
        place, kind = tag[0], tag[2:]
        if place != "O":
            begins = place in "BSU" or previous in "OESLU" or kind != previous_kind
            start = word if begins else found.pop()[1]
            found.append((kind, start, word))
        previous, previous_kind = place, kind
    return found


def first_output(logits: Any, labels: Tensor) -> Tensor:
    """The classes' logits: encoder-decoders also return hidden states, in an order of their own."""
    first: Tensor = logits[0] if isinstance(logits, tuple) else logits
    return first


def token_losses(logits: Any, labels: Tensor) -> Tensor:
    """Negative log-likelihood of each next token, (batch, length - 1); IGNORED where none counts.

    Kept instead of the logits, which would be vocabulary times larger.
    """
    logits = logits[0] if isinstance(logits, tuple) else logits
    target = labels[:, 1:]
    losses = torch.nn.functional.cross_entropy(
        logits[:, :-1].float().transpose(1, 2),
        target,
        ignore_index=IGNORED,
        reduction="none",
    )
    return losses.masked_fill(target == IGNORED, float(IGNORED))


def generation_metrics(prediction: EvalPrediction, names: list[str]) -> dict[str, float]:
    """Perplexity: exp of the mean loss over all tokens, not over batches."""
    losses = np.asarray(prediction.predictions, dtype=np.float64)
    mean = float(losses[losses >= 0].mean())
    return {"perplexity": math.exp(min(mean, 700.0)), "token_loss": mean}


TASKS = {
    "sequence-classification": Task(
        "AutoModelForSequenceClassification",
        encode_texts,
        pad_text,
        classification_metrics,
        ("accuracy", "matthews", "f1", "f1_positive"),
        preprocess_logits=first_output,
    ),
    "regression": Task(
        "AutoModelForSequenceClassification",
        encode_texts,
        pad_text,
        regression_metrics,
        ("pearson_spearman", "pearson", "spearman", "rmse"),
        preprocess_logits=first_output,
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
        pad_tokens,
        generation_metrics,
        ("perplexity", "token_loss"),
        preprocess_logits=token_losses,
    ),
}

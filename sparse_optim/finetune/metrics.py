"""Metrics of the tasks, from predictions and labels."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import EvalPrediction, PreTrainedTokenizerBase

from sparse_optim.finetune.encode import IGNORED

ROUGE = ("rouge1", "rouge2", "rougeL")


def describe_metric(name: str, task: str) -> str:
    """A metric's name for people: which F1 it is, where the name does not say.

    Examples:
        >>> describe_metric("f1", "sequence-classification"), describe_metric("f1", "x")
        ('f1 (macro mean)', 'f1')
    """
    words = {"f1": "f1 (macro mean)", "f1_positive": "f1 of the second class"}
    return words.get(name, name) if task == "sequence-classification" else name


def class_ids(prediction: EvalPrediction) -> tuple[np.ndarray, np.ndarray]:
    """Predicted and true classes."""
    return np.asarray(prediction.predictions).argmax(-1), np.asarray(prediction.label_ids)


def classification_metrics(prediction: EvalPrediction, names: list[str]) -> dict[str, float]:
    """Accuracy, Matthews correlation and macro F1.

    Of two classes also F1 of the second one alone (GLUE's MRPC).
    """
    from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

    guess, truth = class_ids(prediction)
    seen = set(truth) | set(guess)
    positive = {"f1_positive": float(f1_score(truth == 1, guess == 1, zero_division=0))}
    return {
        "accuracy": float(accuracy_score(truth, guess)),
        "f1": float(f1_score(truth, guess, average="macro", zero_division=0)),
        **(positive if len(names) == 2 else {}),
        # Undefined, and a warning, where there is one class alone.
        "matthews": float(matthews_corrcoef(truth, guess)) if len(seen) > 1 else 0.0,
    }


def multi_label_metrics(prediction: EvalPrediction, names: list[str]) -> dict[str, float]:
    """F1 over all decisions (micro), mean F1 of the classes (macro), share of exact sets of labels.

    A class is predicted where its probability is above 1/2.
    """
    from sklearn.metrics import f1_score

    guess = np.asarray(prediction.predictions) > 0  # logits
    truth = np.asarray(prediction.label_ids) > 0.5
    return {
        "f1_micro": float(f1_score(truth, guess, average="micro", zero_division=0)),
        "f1_macro": float(f1_score(truth, guess, average="macro", zero_division=0)),
        "subset_accuracy": float((guess == truth).all(-1).mean()),
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
    # A row at a time: float32 copies of a whole batch of logits would take gigabytes.
    rows = [
        torch.nn.functional.cross_entropy(
            row[:-1].float(), wanted, ignore_index=IGNORED, reduction="none"
        )
        for row, wanted in zip(logits, target, strict=True)
    ]
    losses = torch.stack(rows)
    return losses.masked_fill(target == IGNORED, float(IGNORED))


def generation_metrics(prediction: EvalPrediction, names: list[str]) -> dict[str, float]:
    """Perplexity: exp of the mean loss over all tokens, not over batches."""
    losses = np.asarray(prediction.predictions, dtype=np.float64)
    mean = float(losses[losses >= 0].mean())
    return {"perplexity": math.exp(min(mean, 700.0)), "token_loss": mean}


def decoded(prediction: EvalPrediction, tokenizer: PreTrainedTokenizerBase) -> EvalPrediction:
    """Texts for the ids that a model wrote, and for those of the labels."""
    written, wanted = (
        decode(np.asarray(ids), tokenizer) for ids in (prediction.predictions, prediction.label_ids)
    )
    return EvalPrediction(written, wanted)  # type: ignore[arg-type]  # annotated as arrays


def decode(ids: np.ndarray, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The texts of rows of ids, without special and ignored tokens."""
    filled = np.where(ids == IGNORED, tokenizer.pad_token_id, ids)
    texts = tokenizer.batch_decode(filled.tolist(), skip_special_tokens=True)
    return [text.strip() for text in texts]


def summary_metrics(prediction: EvalPrediction, names: list[str]) -> dict[str, float]:
    """Mean F-measures of ROUGE-1, ROUGE-2 and ROUGE-L, 0 to 1, of decoded texts.

    Words are letters and digits in lower case, stemmed (Porter) as in the rouge-score package with
    `use_stemmer=True`, which transformers' example of summarization reports.

    Reference: Lin 2004, "ROUGE: A Package for Automatic Evaluation of Summaries", sections 2, 3.1.
    """
    from torchmetrics.functional.text.rouge import rouge_score

    written: Any = prediction.predictions
    wanted: Any = prediction.label_ids
    found = rouge_score(written, wanted, use_stemmer=True, rouge_keys=ROUGE)
    return {name: float(found[f"{name}_fmeasure"]) for name in ROUGE}

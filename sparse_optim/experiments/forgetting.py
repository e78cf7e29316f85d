"""What a model has lost of what it could do before it was fine-tuned.

An encoder for sentences, such as MiniLM, was trained so that similar sentences have similar
vectors: its score is Spearman's correlation between the similarity of two sentences that people
gave (STS-B, validation) and the cosine of their vectors, each the mean over tokens. MiniLM has no
masked-LM head, so that a masked-LM loss would measure a fresh head as well. A causal language
model's score is its mean loss, in nats a token, on news (XSum, test).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import Any

import torch
from scipy.stats import rankdata
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedTokenizerBase

from sparse_optim.experiments.presets import TaskPreset
from sparse_optim.finetune.data import DataRequest, TaskData, load_data
from sparse_optim.finetune.metrics import correlation

GLUE, STSB = "nyu-mll/glue", "stsb"
CLASSIFIES = ("sequence-classification", "token-classification", "regression")
PAIRS, DOCUMENTS = 400, 100
TOKENS = 128  # of a sentence or document
SENTENCE_BATCH, DOCUMENT_BATCH = 50, 4  # a language model gives a vocabulary of logits a token

Score = Callable[[nn.Module, PreTrainedTokenizerBase], float]


def score_name(task: TaskPreset) -> str | None:
    """The name of the score that a task's model can lose; None if the task trains that skill."""
    if task.task == "causal-lm":
        return "LM loss on XSum"
    if task.task not in CLASSIFIES or task.name == STSB:
        return None
    return "STS-B, cosine without training"


def score_of(task: TaskPreset, stsb: str) -> Score:
    """The score of a task that has one.

    Args:
        stsb: where STS-B is: a folder or hub id.
    """
    if task.task == "causal-lm":
        return lambda model, tokenizer: lm_loss(model, tokenizer, news())
    pairs = sentence_pairs(stsb)
    return lambda model, tokenizer: cosine_score(model, tokenizer, pairs)


@cache
def sentence_pairs(dataset: str) -> TaskData:
    """STS-B, validation."""
    config = STSB if dataset == GLUE else None
    return load_data(
        DataRequest(
            dataset,
            config=config,
            task="regression",
            eval_split="validation",
            max_train_examples=1,
            max_eval_examples=PAIRS,
        )
    )


@cache
def news() -> tuple[str, ...]:
    """Documents of XSum, test."""
    request = DataRequest(
        "xsum",
        task="summarization",
        eval_split="test",
        max_train_examples=1,
        max_eval_examples=DOCUMENTS,
    )
    return tuple(load_data(request).evaluation["text"])


@torch.no_grad()
def cosine_score(model: nn.Module, tokenizer: PreTrainedTokenizerBase, pairs: TaskData) -> float:
    """Spearman's correlation between given similarities and cosines of mean hidden states."""
    first = vectors(model, tokenizer, pairs.evaluation["text"])
    second = vectors(model, tokenizer, pairs.evaluation["text_pair"])
    cosines = functional.cosine_similarity(first, second)
    if not cosines.isfinite().all():
        return math.nan
    return correlation(rankdata(cosines), rankdata(pairs.evaluation["label"]))


def vectors(model: nn.Module, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> Tensor:
    """Mean over tokens of the last hidden states; (texts, width), float32, on the CPU."""
    unwrap: Any = getattr(model, "get_base_model", None)  # of peft
    encoder: Any = (model if unwrap is None else unwrap()).base_model
    found = []
    for tokens in batches(encoder, tokenizer, texts, SENTENCE_BATCH):
        mask = tokens["attention_mask"].unsqueeze(-1)
        hidden = encoder(**tokens).last_hidden_state.float()
        found.append(((hidden * mask).sum(1) / mask.sum(1)).cpu())
    return torch.cat(found)


@torch.no_grad()
def lm_loss(model: nn.Module, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> float:
    """Mean loss of a causal language model, in nats a token."""
    total, count = 0.0, 0
    for tokens in batches(model, tokenizer, texts, DOCUMENT_BATCH):
        logits = model(**tokens).logits[:, :-1].float()
        wanted = tokens["input_ids"][:, 1:].masked_fill(tokens["attention_mask"][:, 1:] == 0, -100)
        total += float(functional.cross_entropy(logits.transpose(1, 2), wanted, reduction="sum"))
        count += int((wanted != -100).sum())
    return total / count


def batches(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], size: int
) -> Iterator[Any]:
    """Tokens of the texts in batches, on the model's device; the model is set to evaluation."""
    model.eval()
    device = next(model.parameters()).device
    for begin in range(0, len(texts), size):
        yield tokenizer(
            list(texts[begin : begin + size]),
            max_length=TOKENS,
            truncation=True,
            padding=True,
            return_tensors="pt",
        ).to(device)

"""Pack several short examples of a language model into one row, without mixing them.

Positions restart at 0 with each example. Without an attention mask, transformers reads that as
separate sequences: no token sees another example.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import DataCollatorForTokenClassification, PreTrainedTokenizerBase

from sparse_optim.finetune.encode import IGNORED
from sparse_optim.finetune.errors import FinetuneError

POSITIONS = "position_ids"  # a column that packed rows alone have


def pack(examples: Dataset, max_length: int) -> Dataset:
    """Fill rows of at most `max_length` tokens with whole examples, in order.

    The first token of an example carries no loss: the example before it must not predict it.
    """
    rows: list[dict[str, list[int]]] = []
    for ids, labels in zip(examples["input_ids"], examples["labels"], strict=True):
        if not rows or len(rows[-1]["input_ids"]) + len(ids) > max_length:
            rows.append({"input_ids": [], "position_ids": [], "labels": []})
        rows[-1]["input_ids"] += ids
        rows[-1]["position_ids"] += range(len(ids))
        rows[-1]["labels"] += [IGNORED, *labels[1:]]
    return Dataset.from_list(rows)


class PadGeneration:
    """Collator of a language model: pads examples, or rows of packed examples."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.pad = tokenizer.pad_token_id
        self.single = DataCollatorForTokenClassification(tokenizer, label_pad_token_id=IGNORED)

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> Mapping[str, Tensor]:
        """A batch; padding of packed rows has separate positions, so it is no one's context."""
        if POSITIONS not in rows[0]:
            batch: Mapping[str, Tensor] = self.single(list(rows))
            return batch
        fill = {"input_ids": self.pad, "position_ids": 0, "labels": IGNORED}
        return {
            name: pad_sequence(
                [torch.tensor(row[name]) for row in rows], batch_first=True, padding_value=value
            )
            for name, value in fill.items()
        }


def check_packing(model: nn.Module) -> None:
    """Raise FinetuneError if a model lets packed examples see each other.

    Two rows have the same second example after different first ones: its logits must be equal. They
    are not with a cache of keys and values, which the Trainer turns off in the model's config.

    Args:
        model: as the Trainer has set it up.
    """
    base = getattr(model, "get_base_model", lambda: model)()  # of peft's wrapper
    if "position_ids" not in inspect.signature(base.forward).parameters:
        raise FinetuneError("--packing: the model takes no position_ids: drop --packing")
    device = next(model.parameters()).device
    ids = torch.tensor([[1, 2, 3, 4, 5, 6], [3, 1, 2, 4, 5, 6]], device=device)
    positions = torch.tensor([[0, 1, 2, 0, 1, 2]], device=device).expand_as(ids)
    training = model.training
    model.eval()
    with torch.no_grad():
        logits = model(input_ids=ids, position_ids=positions).logits[:, 3:]
    model.train(training)
    if not torch.equal(logits[0], logits[1]):
        raise FinetuneError("--packing: the model mixes packed examples: drop --packing")

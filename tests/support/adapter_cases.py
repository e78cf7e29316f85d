"""A tiny BERT classifier, its adapted versions, and a few training steps."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import peft
import torch
from torch import nn
from transformers import BertConfig, BertForSequenceClassification

from sparse_optim.integrations import add_bottlenecks

INPUTS = torch.arange(28).view(4, 7) % 40
LABELS = torch.tensor([0, 1, 1, 0])


def classifier(dtype: torch.dtype = torch.float32) -> nn.Module:
    """The base: two layers, no dropout, the same weights each time."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=40,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=16,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return BertForSequenceClassification(config).to(dtype)


def with_peft(config: Any) -> nn.Module:
    """The base with an adapter of peft; its initial values are the same each time."""
    base = classifier()
    with warnings.catch_warnings():
        # peft asks transformers for a name that transformers deprecates.
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        return peft.get_peft_model(base, config)


def bottleneck() -> nn.Module:
    """The base with bottleneck adapters and a trainable head."""
    model = classifier()
    add_bottlenecks(model, 4)
    model.classifier.requires_grad_(True)
    return model


HEAD = ["classifier"]
PEFT_CONFIGS: dict[str, Callable[[], Any]] = {
    "lora": lambda: peft.LoraConfig(r=4, target_modules=["query", "dense"], modules_to_save=HEAD),
    "dora": lambda: peft.LoraConfig(
        r=4, use_dora=True, target_modules=["query", "value"], modules_to_save=HEAD
    ),
    "ia3": lambda: peft.IA3Config(modules_to_save=HEAD),
}
KINDS = (*PEFT_CONFIGS, "bottleneck")


def adapted(kind: str) -> nn.Module:
    """A freshly adapted model of one of `KINDS`."""
    return bottleneck() if kind == "bottleneck" else with_peft(PEFT_CONFIGS[kind]())


def reloaded(base: nn.Module, folder: Any) -> nn.Module:
    """What peft makes of a saved adapter, ready to evaluate."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        return peft.PeftModel.from_pretrained(base, folder).eval()


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 4) -> None:
    """Full-batch steps on one fixed batch."""
    for _ in range(steps):
        model(input_ids=INPUTS, labels=LABELS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    """Scores of the fixed batch."""
    return model.eval()(input_ids=INPUTS).logits


def copied(model: nn.Module) -> dict[str, torch.Tensor]:
    """Every tensor of a model, as it is now."""
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}

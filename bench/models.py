"""Build transformers with random weights, and batches for them, without downloads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# Weights repeat with this period, which no row length divides: drawing 1.2 billion takes a minute.
DRAWN = 1_000_003
WEIGHT_STD = 0.02


@dataclass(frozen=True)
class Model:
    """The configuration of a transformer with random weights, and its batch.

    Attributes:
        kind: "bert" or "llama".
        sizes: arguments of the configuration.
        batch, length: number of sequences, and of tokens in each.
        dtype: dtype of the weights.
        checkpointing: recompute activations in the backward pass.
    """

    kind: str
    sizes: dict[str, Any]
    batch: int
    length: int
    dtype: torch.dtype = torch.float32
    checkpointing: bool = False

    def build(self, device: str | torch.device = "cpu") -> torch.nn.Module:
        """Build the model in training mode, without dropout, so that all kinds compute the same."""
        import transformers
        from transformers.initialization import no_init_weights

        with no_init_weights(), torch.device(device):
            config: transformers.PretrainedConfig
            family: Any  # transformers does not annotate _from_config
            if self.kind == "llama":
                family = transformers.LlamaForCausalLM
                config = transformers.LlamaConfig(**self.sizes)
            else:
                family = transformers.BertForSequenceClassification
                config = transformers.BertConfig(
                    **self.sizes, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
                )
            model: transformers.PreTrainedModel = family._from_config(config, dtype=self.dtype)
        model.tie_weights()
        _fill(model)
        if self.checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
        return model

    def inputs(self) -> dict[str, Tensor]:
        """Draw random tokens; labels are the tokens, or random classes."""
        generator = torch.Generator().manual_seed(1)
        size = (self.batch, self.length)
        tokens = torch.randint(self.sizes["vocab_size"], size, generator=generator)
        classes = torch.randint(2, (self.batch,), generator=generator)
        return {"input_ids": tokens, "labels": tokens if self.kind == "llama" else classes}


@torch.no_grad()
def _fill(model: torch.nn.Module) -> None:
    """Fill matrices with normal numbers, biases with 0, and scales of norms with 1.

    The device draws: copies from the host, thousands for 7B, would each wait for it. On the meta
    device there is nothing to fill.
    """
    device = next(model.parameters()).device
    if device.type == "meta":
        return
    generator = torch.Generator(device).manual_seed(0)
    drawn = torch.randn(DRAWN, generator=generator, device=device) * WEIGHT_STD
    for name, param in model.named_parameters():
        if param.dim() < 2:
            param.fill_(0.0 if name.endswith("bias") else 1.0)
            continue
        for part in param.view(-1).split(DRAWN):
            part.copy_(drawn[: part.numel()])


def _bert(hidden: int, layers: int, intermediate: int) -> dict[str, Any]:
    return {
        "vocab_size": 30522, "hidden_size": hidden, "num_hidden_layers": layers,
        "num_attention_heads": 12, "intermediate_size": intermediate,
    }  # fmt: skip


def _llama(
    vocabulary: int, hidden: int, layers: int, intermediate: int, heads: int, key_values: int
) -> dict[str, Any]:
    return {
        "vocab_size": vocabulary, "hidden_size": hidden, "num_hidden_layers": layers,
        "intermediate_size": intermediate, "num_attention_heads": heads,
        "num_key_value_heads": key_values,
    }  # fmt: skip


MODELS = {
    "tiny": Model("bert", {**_bert(24, 2, 48), "vocab_size": 1000}, 2, 8),  # for tests
    "MiniLM": Model("bert", _bert(384, 6, 1536), 16, 48),
    "BERT-base": Model("bert", _bert(768, 12, 3072), 8, 64),
    "Llama-small": Model("llama", _llama(32000, 512, 8, 1408, 8, 4), 4, 128),
    # The shape of SmolLM2-135M.
    "SmolLM2-135M": Model(
        "llama", {**_llama(49152, 576, 30, 1536, 9, 3), "tie_word_embeddings": True}, 8, 64
    ),
    # The shape of Llama-3.2-1B.
    "Llama-1B": Model(
        "llama", {**_llama(128256, 2048, 16, 8192, 32, 8), "tie_word_embeddings": True}, 1, 32,
        torch.bfloat16,
    ),
    # The shape of Llama-2-7B, trained on one long sequence, as on a card with little memory.
    "Llama-7B": Model(
        "llama", _llama(32000, 4096, 32, 11008, 32, 32), 1, 512, torch.bfloat16, checkpointing=True
    ),
}  # fmt: skip

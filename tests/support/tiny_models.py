"""Randomly initialised transformers models of a few thousand entries, saved as model folders."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from transformers import (
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "</s>"]
WORDS = [*"abcdefghijklmnopqrstuvwxyz", *(str(number) for number in range(10)), "Bern", "Ada"]


def save_tokenizer(folder: Path, brackets: bool) -> int:
    """Write a word-level tokenizer (with [CLS] and [SEP] if asked); return its vocabulary size."""
    vocabulary = {word: index for index, word in enumerate([*SPECIAL, *WORDS])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    if brackets:
        tokenizer.post_processor = TemplateProcessing(
            single="[CLS] $A [SEP]",
            pair="[CLS] $A [SEP] $B:1 [SEP]:1",
            special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
        )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="[UNK]",
        **({"pad_token": "[PAD]"} if brackets else {"eos_token": "</s>"}),
    ).save_pretrained(folder)
    return len(vocabulary)


def save_encoder(folder: Path) -> Path:
    """A BERT encoder without a head."""
    size = save_tokenizer(folder, brackets=True)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=size,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=64,
        pad_token_id=0,
    )
    BertModel(config).save_pretrained(folder)
    return folder


def save_decoder(folder: Path) -> Path:
    """A Llama language model with tied embeddings, whose tokenizer has no padding token."""
    size = save_tokenizer(folder, brackets=False)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=size,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=64,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=4,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder

"""Randomly initialised transformers models of a few thousand entries, saved as model folders."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
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


def save_summary_tokenizer(folder: Path) -> int:
    """A word-level tokenizer that ends each text, as T5's; return its vocabulary size."""
    words = ["<pad>", "</s>", "<unk>", "summarize:", *WORDS]
    tokenizer = Tokenizer(WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer.post_processor = TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<pad>", eos_token="</s>"
    ).save_pretrained(folder)
    return len(words)


def save_t5(folder: Path) -> Path:
    """A T5 with tied embeddings, and the prefix that T5's config.json declares."""
    size = save_summary_tokenizer(folder)
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=size,
        d_model=32,
        d_kv=16,
        d_ff=64,
        num_layers=1,
        num_heads=2,
        dropout_rate=0.0,
        decoder_start_token_id=0,
        task_specific_params={"summarization": {"prefix": "summarize: ", "num_beams": 4}},
    )
    T5ForConditionalGeneration(config).save_pretrained(folder)
    return folder


def save_bart(folder: Path) -> Path:
    """A BART with 32 positions; its generation settings are of beam search."""
    size = save_summary_tokenizer(folder)
    torch.manual_seed(0)
    config = BartConfig(
        vocab_size=size,
        d_model=32,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        max_position_embeddings=32,
        dropout=0.0,
        init_std=0.2,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
        decoder_start_token_id=1,
        forced_eos_token_id=1,
    )
    model = BartForConditionalGeneration(config)
    model.generation_config.update(
        num_beams=4, early_stopping=True, length_penalty=2.0, min_length=9, no_repeat_ngram_size=3
    )
    model.save_pretrained(folder)
    return folder

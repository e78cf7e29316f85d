"""Encoder-decoder models: how they read texts, and how they write."""

from __future__ import annotations

import copy
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from sparse_optim.finetune.encode import Targets
from sparse_optim.finetune.errors import FinetuneError


def declared_prefix(config: PreTrainedConfig) -> str:
    """What config.json says to put before a text to summarize: "summarize: " for T5, else ""."""
    declared: Any = getattr(config, "task_specific_params", None) or {}
    return str(declared.get("summarization", {}).get("prefix") or "")


def longest_source(config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase, most: int) -> int:
    """`most` tokens, or the model's own limit if that is lower.

    That is the number of positions of the encoder or, where any number will do (T5), the length of
    the texts that it was trained on, as its tokenizer has it.
    """
    names = ("max_encoder_position_embeddings", "max_position_embeddings")
    positions = (getattr(config, name, None) for name in names)
    return min(most, tokenizer.model_max_length, next(filter(None, positions), most))


def set_decoding(model: PreTrainedModel, targets: Targets) -> None:
    """Set how the model writes, once for evaluation, `predict` and the saved model.

    Lengths and beams are the job's; the rest of the model's generation settings, such as
    `no_repeat_ngram_size` and the tokens that begin and end a text, is kept.

    Args:
        model: Mutated.

    Raises:
        FinetuneError: the model does not say with which token it begins to write.
    """
    config: Any = copy.deepcopy(model.generation_config)
    if config.decoder_start_token_id is None:
        raise FinetuneError(
            f"{type(model).__name__}: neither config.json nor generation_config.json has a "
            "decoder_start_token_id: add it"
        )
    config.max_length = targets.max_length + 1  # the start token counts
    config.max_new_tokens = config.min_length = config.min_new_tokens = None
    config.do_sample, config.temperature, config.top_k, config.top_p = False, None, None, None
    config.num_beams = targets.num_beams
    if targets.num_beams == 1:  # these are of beam search alone
        config.early_stopping = config.length_penalty = None
    model.generation_config = config

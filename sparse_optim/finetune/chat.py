"""Tokenise conversations with the chat template of a tokenizer, and find the assistant's tokens."""

from __future__ import annotations

import re
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from sparse_optim.finetune.errors import FinetuneError
from sparse_optim.finetune.messages import Message

GENERATION = re.compile(r"\{%-?\s*generation\b")  # a template that marks the assistant's turns


def encode_conversation(
    messages: list[Message], tokenizer: PreTrainedTokenizerBase
) -> tuple[list[int], list[bool]]:
    """Tokenise a conversation.

    Returns:
        the tokens, and which of them the assistant writes: its content and the end of its turn.

    Raises:
        FinetuneError: no chat template, a template that refuses the conversation or renders its
            beginning otherwise than alone, or a tokenizer that is not a fast one.
    """
    if tokenizer.chat_template is None:
        raise FinetuneError(
            "the tokenizer has no chat template, which conversations need: use an instruct model, "
            "or a data set of prompts and responses"
        )
    if not tokenizer.is_fast:
        raise FinetuneError("conversations need a fast tokenizer (tokenizer.json)")
    try:
        if GENERATION.search(tokenizer.get_chat_template()):
            encoded: Any = tokenizer.apply_chat_template(
                messages, return_dict=True, return_assistant_tokens_mask=True
            )
            return encoded["input_ids"], [bool(mark) for mark in encoded["assistant_masks"]]
        text = render(messages, tokenizer)
        spans = assistant_spans(messages, text, tokenizer)
    except (TemplateError, ValueError) as error:
        raise FinetuneError(
            f"the chat template of the tokenizer refuses a conversation of "
            f"{', '.join(message['role'] for message in messages)}: {error}"
        ) from None
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    learnt = [
        any(begin < span_end and end > span_begin for span_begin, span_end in spans)
        for begin, end in encoded["offset_mapping"]
    ]
    return encoded["input_ids"], learnt


def assistant_spans(
    messages: list[Message], text: str, tokenizer: PreTrainedTokenizerBase
) -> list[tuple[int, int]]:
    """The characters of the assistant's turns, by rendering what comes before and up to each.

    Raises:
        FinetuneError: the template renders the beginning of a conversation otherwise than alone.
    """
    spans = []
    for turn, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        last = turn + 1 == len(messages)
        through = text if last else render(messages[: turn + 1], tokenizer)
        begin = content_begin(messages[: turn + 1], through, tokenizer)
        if begin is None or not text.startswith(through):
            raise FinetuneError(
                "the chat template of the tokenizer renders a turn of the assistant otherwise "
                "once more turns follow, so its tokens cannot be found: use a template with "
                "{% generation %}, or conversations with one turn of the assistant"
            )
        spans.append((begin, len(through)))
    return spans


def content_begin(
    messages: list[Message], text: str, tokenizer: PreTrainedTokenizerBase
) -> int | None:
    """Where the content of the last message, the assistant's, begins in the text of them all.

    That is after what the template writes as the prompt for a turn of the assistant; None if it
    writes something else there.
    """
    if len(messages) == 1:  # templates cannot render an empty conversation with a prompt
        prompt = render(messages, tokenizer, prompt=True)[len(text) :]
        found = text.find(prompt)
        return found + len(prompt) if found >= 0 else None
    before = render(messages[:-1], tokenizer, prompt=True)
    return len(before) if text.startswith(before) else None


def render(
    messages: list[Message], tokenizer: PreTrainedTokenizerBase, prompt: bool = False
) -> str:
    """A conversation as text; with `prompt`, followed by the beginning of an assistant's turn."""
    text: Any = tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=prompt
    )
    return str(text)

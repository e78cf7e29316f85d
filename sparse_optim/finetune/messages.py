"""Bring conversations and instructions of any layout into messages with `role` and `content`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from datasets import Dataset

from sparse_optim.finetune.errors import FinetuneError

Message = dict[str, str]

# ShareGPT's names, and those of `messages`.
ROLES = {
    **{"human": "user", "user": "user"},
    **{"gpt": "assistant", "assistant": "assistant", "model": "assistant", "bot": "assistant"},
    **{"system": "system", "tool": "tool"},
}
SPEAKERS = ("role", "from")
CONTENTS = ("content", "value")
CALLS = ("tool_calls", "function_call")


def is_conversation(value: Any) -> bool:
    """Whether a value is a list of messages (perhaps of none)."""
    return isinstance(value, list) and all(isinstance(message, dict) for message in value)


def from_conversations(split: Dataset, where: str) -> Dataset:
    """Messages from conversations as of OpenAI (role, content) or ShareGPT (from, value).

    Args:
        where: the split and column, for messages.

    Raises:
        FinetuneError: a role is unknown, or a message has no text; names the row.
    """
    rows = []
    for row, conversation in enumerate(split["text"]):
        try:
            rows.append([read_message(message) for message in conversation])
        except ValueError as error:
            raise FinetuneError(f"{where}: row {row}: {error}") from None
    return Dataset.from_dict({"messages": rows})


def describe_keys(split: Dataset, where: str) -> list[str]:
    """A line on what messages have beside their role and content, or none."""
    found = {
        key: None
        for conversation in split["text"]
        for message in conversation
        for key, value in message.items()
        if value is not None and key not in (*SPEAKERS, *CONTENTS, *CALLS)
    }
    unused = ", ".join(map(repr, found))
    return [f"{where}: not used: the messages' {unused}"] if unused else []


def join_contexts(split: Dataset) -> Dataset:
    """Prompts with responses, from instructions with what they refer to (Alpaca's `input`).

    A prompt is the instruction, followed by an empty line and the context if there is one.
    """
    if "text_pair" not in split.column_names:
        return split
    prompts = [
        f"{text}\n\n{context}" if context is not None and context.strip() else text
        for text, context in zip(split["text"], split["text_pair"], strict=True)
    ]
    return split.remove_columns(["text", "text_pair"]).add_column("text", prompts)


def as_turns(split: Dataset) -> Dataset:
    """Conversations of two turns, from prompts with responses."""
    pairs = zip(split["text"], split["label"], strict=True)
    rows = [[made("user", text), made("assistant", str(response))] for text, response in pairs]
    return Dataset.from_dict({"messages": rows})


def read_message(message: Mapping[str, Any]) -> Message:
    """One message.

    Raises:
        ValueError: it has no known role or no text, or calls a tool.
    """
    role = next((message[key] for key in SPEAKERS if message.get(key)), None)
    if not isinstance(role, str) or role.lower() not in ROLES:
        raise ValueError(f"a message's role is {role!r}, expected one of {', '.join(ROLES)}")
    call = next((key for key in CALLS if message.get(key)), None)
    if call is not None:
        raise ValueError(f"a message has {call!r}: tool calls cannot be trained on, drop the row")
    content = next((message[key] for key in CONTENTS if message.get(key) is not None), None)
    if not isinstance(content, str):
        raise ValueError(f"a message's content is {content!r}, expected text")
    return made(ROLES[role.lower()], content)


def made(role: str, content: str) -> Message:
    """A message."""
    return {"role": role, "content": content}

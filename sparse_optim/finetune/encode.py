"""Tokenise examples, and count those that were cut or dropped."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from datasets import Dataset
from transformers import BatchEncoding, PreTrainedTokenizerBase

from sparse_optim.finetune.chat import encode_conversation
from sparse_optim.finetune.errors import FinetuneError

IGNORED = -100  # label of tokens that carry no loss
CUTS = ("cut", "targets_cut")  # columns of `counted`


@dataclass(frozen=True)
class Targets:
    """How a model of texts and their summaries reads and writes.

    Attributes:
        max_length: tokens at which summaries are cut, and that the model writes at most.
        prefix: put before each text.
        num_beams: beams of the search for a summary; 1: greedy.
    """

    max_length: int
    prefix: str = ""
    num_beams: int = 1


@dataclass(frozen=True)
class Lengths:
    """The limits of a job's examples.

    Attributes:
        max_length: tokens at which examples are cut; of texts with summaries, the texts.
        targets: None for tasks without summaries.
    """

    max_length: int
    targets: Targets | None = None


@dataclass(frozen=True)
class Encoded:
    """Tokenised examples.

    Attributes:
        cut: number of examples that are longer than the maximum, and miss their end.
        dropped: number of examples left out: no token that could be learnt is within the maximum.
        targets_cut: number of summaries that are longer than their maximum.
    """

    examples: Dataset
    cut: int
    dropped: int
    targets_cut: int = 0

    @property
    def longest(self) -> int:
        """Tokens of the longest example."""
        return max(map(len, self.examples["input_ids"]))

    def describe(self, split: str, lengths: Lengths) -> list[str]:
        """A line on what was cut and dropped, or none."""
        kept = len(self.examples)
        parts = []
        if self.dropped:
            parts.append(f"{self.dropped} dropped (no token to learn within --max-length)")
        if self.cut:
            parts.append(f"{self.cut} cut to --max-length {lengths.max_length}")
        if self.targets_cut and lengths.targets is not None:
            most = lengths.targets.max_length
            parts.append(f"{self.targets_cut} cut to --max-target-length {most}")
        total = kept + self.dropped
        return [f"{split}: {kept} of {total} examples; {', '.join(parts)}"] if parts else []


def encode_texts(split: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Encoded:
    """Tokenise texts or pairs of texts, with one label each; an empty text is an end token."""
    end = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.pad_token_id
    empty = {"input_ids": end, "attention_mask": 1, "token_type_ids": 0}

    def encode(batch: Mapping[str, list[Any]]) -> dict[str, Any]:
        texts, pair = batch["text"], batch.get("text_pair")
        encoded = tokenizer(texts, pair, truncation=True, max_length=max_length)
        cut = cut_rows(encoded)
        if cut is None:
            whole = tokenizer(texts, pair, verbose=False)["input_ids"]
            cut = [len(ids) > max_length for ids in whole]
        for row, ids in enumerate(encoded["input_ids"]):
            if not ids:  # a decoder's tokenizer adds nothing to an empty text
                for name, value in empty.items():
                    if name in encoded:
                        encoded[name][row] = [value]
        return {**encoded, "labels": batch["label"], "cut": cut}

    return counted(split, encode, lambda labels: True, max_length)


def encode_words(split: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Encoded:
    """Tokenise lists of words; the first token of a word carries its tag."""

    def encode(batch: Mapping[str, list[Any]]) -> dict[str, Any]:
        encoded = tokenizer(
            batch["text"], is_split_into_words=True, truncation=True, max_length=max_length
        )
        labels = []
        for row, tags in enumerate(batch["label"]):
            words = encoded.word_ids(row)
            labels.append(
                [
                    tags[word] if word is not None and word != previous else IGNORED
                    for previous, word in zip([None, *words], words, strict=False)
                ]
            )
        return {**encoded, "labels": labels, "cut": cut_rows(encoded)}

    if not tokenizer.is_fast:
        raise FinetuneError("token classification needs a fast tokenizer (tokenizer.json)")
    return counted(split, encode, lambda tags: any(tag != IGNORED for tag in tags), max_length)


def encode_generation(
    split: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> Encoded:
    """Tokenise plain texts, prompts with responses, or conversations.

    Texts and responses end with the end token. Prompts, and the turns of a conversation that are
    not the assistant's, carry no loss.
    """
    end = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []

    def encode_text(text: str) -> tuple[list[int], list[int]]:
        ids = tokenizer(text)["input_ids"] + end
        return ids, ids

    def encode_response(prompt: str, response: Any) -> tuple[list[int], list[int]]:
        head = tokenizer(f"{prompt}\n")["input_ids"]
        tail = tokenizer(str(response), add_special_tokens=False)["input_ids"] + end
        return head + tail, [IGNORED] * len(head) + tail

    def encode_messages(messages: list[dict[str, str]]) -> tuple[list[int], list[int]]:
        roles = [message["role"] for message in messages]
        if tokenizer.chat_template is None and roles == ["user", "assistant"]:
            return encode_response(*(message["content"] for message in messages))
        ids, learnt = encode_conversation(messages, tokenizer) if messages else ([], [])
        return ids, [token if learn else IGNORED for token, learn in zip(ids, learnt, strict=True)]

    def encode(batch: Mapping[str, list[Any]]) -> dict[str, Any]:
        if "messages" in batch:
            rows = [encode_messages(messages) for messages in batch["messages"]]
        elif "label" in batch:
            pairs = zip(batch["text"], batch["label"], strict=True)
            rows = [encode_response(prompt, response) for prompt, response in pairs]
        else:
            rows = [encode_text(text) for text in batch["text"]]
        return {
            "input_ids": [ids[:max_length] for ids, _ in rows],
            "attention_mask": [[1] * len(ids[:max_length]) for ids, _ in rows],
            "labels": [labels[:max_length] for _, labels in rows],
            "cut": [len(ids) > max_length for ids, _ in rows],
        }

    # The first token is never predicted: an example needs one more that carries a loss.
    return counted(
        split, encode, lambda labels: any(label != IGNORED for label in labels[1:]), max_length
    )


def encode_summaries(
    split: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int, targets: Targets
) -> Encoded:
    """Tokenise texts, and their summaries as labels; an empty one of either is an end token.

    As transformers' example of summarization does, also in evaluation: ROUGE compares with what is
    left of a summary that was cut.
    """
    end = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.pad_token_id

    def encode(batch: Mapping[str, list[Any]]) -> dict[str, Any]:
        texts = [targets.prefix + text for text in batch["text"]]
        sources, cut = encode_cut(tokenizer, max_length, text=texts)
        labels, targets_cut = encode_cut(tokenizer, targets.max_length, text_target=batch["label"])
        ids = [row or [end] for row in sources["input_ids"]]
        return {
            "input_ids": ids,
            "attention_mask": [[1] * len(row) for row in ids],
            "labels": [row or [end] for row in labels["input_ids"]],
            "cut": cut,
            "targets_cut": targets_cut,
        }

    return counted(split, encode, bool, max_length)


def encode_cut(
    tokenizer: PreTrainedTokenizerBase, max_length: int, **texts: list[str]
) -> tuple[BatchEncoding, list[bool]]:
    """Tokenise, and say which texts are longer than the maximum.

    Args:
        texts: `text`, or `text_target` for what a model learns to write.
    """
    encoded = tokenizer(**texts, truncation=True, max_length=max_length)
    cut = cut_rows(encoded)
    if cut is None:
        whole = tokenizer(**texts, verbose=False)["input_ids"]
        cut = [len(ids) > max_length for ids in whole]
    return encoded, cut


def cut_rows(encoded: BatchEncoding) -> list[bool] | None:
    """Whether each row was truncated; None: the tokenizer is not a fast one and does not say."""
    if encoded.encodings is None:
        return None
    return [len(encoding.overflowing) > 0 for encoding in encoded.encodings]


def counted(
    split: Dataset,
    encode: Callable[..., dict[str, Any]],
    learns: Callable[[Any], bool],
    max_length: int,
) -> Encoded:
    """Map in batches, drop examples with labels that teach nothing, and count.

    Args:
        encode: also returns a column `cut`, and may return `targets_cut`.
        learns: whether the labels of an example have something to learn.

    Raises:
        FinetuneError: nothing is left.
    """
    whole = split.map(
        encode,
        batched=True,
        remove_columns=split.column_names,
        load_from_cache_file=False,  # and no cache files are left behind
        keep_in_memory=True,
    )
    rows = [row for row, labels in enumerate(whole["labels"]) if learns(labels)]
    if not rows:
        raise FinetuneError(
            f"no example has a token to learn within --max-length {max_length}; raise it"
        )
    kept = whole if len(rows) == len(whole) else whole.select(rows)
    counts = {name: sum(kept[name]) for name in CUTS if name in kept.column_names}
    return Encoded(kept.remove_columns(list(counts)), dropped=len(whole) - len(kept), **counts)

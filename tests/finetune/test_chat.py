"""Conversations: tokens by the chat template, loss on the assistant's turns alone."""

from __future__ import annotations

import pytest

pytest.importorskip("transformers", reason="the main job needs the extra 'finetune'")
pytest.importorskip("datasets", reason="the main job needs the extra 'finetune'")

from datasets import Dataset
from tiny_models import save_tokenizer
from transformers import AutoTokenizer

from sparse_optim.finetune.encode import IGNORED, Lengths, encode_generation
from sparse_optim.finetune.errors import FinetuneError
from sparse_optim.finetune.messages import as_turns, from_conversations, join_contexts

PROMPT = "{% if add_generation_prompt %}x {% endif %}"
# The roles as words of the tiny vocabulary: s for the system, u for the user, x for the assistant.
TURN = "{{ {'system': 's', 'user': 'u', 'assistant': 'x'}[m['role']] }} {{ m['content'] }} </s> "
PLAIN = "{% for m in messages %}" + TURN + "{% endfor %}" + PROMPT
WITH_SYSTEM = "{% if messages[0]['role'] != 'system' %}s z </s> {% endif %}" + PLAIN
MARKED = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}x {% generation %}"
    "{{ m['content'] }} </s>{% endgeneration %} {% else %}" + TURN + "{% endif %}{% endfor %}"
) + PROMPT
FORGETS = (  # earlier turns of the assistant, like templates of models that think
    "{% for m in messages %}{% if m['role'] == 'user' or loop.last %}" + TURN + "{% endif %}"
    "{% endfor %}" + PROMPT
)
STRICT = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"

CHAT = [("user", "a b"), ("assistant", "c d"), ("user", "e"), ("assistant", "f")]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(folder, brackets=False)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def turns(chat):
    return [{"role": role, "content": content} for role, content in chat]


def encode(tokenizer, template, *chats, max_length=64):
    """The words of each conversation, and those with loss."""
    tokenizer.chat_template = template
    split = Dataset.from_dict({"messages": [turns(chat) for chat in chats]})
    encoded = encode_generation(split, tokenizer, max_length)
    words = [
        (
            " ".join(tokenizer.convert_ids_to_tokens(row["input_ids"])),
            " ".join(tokenizer.convert_ids_to_tokens([i for i in row["labels"] if i != IGNORED])),
        )
        for row in encoded.examples
    ]
    return words, encoded


@pytest.mark.parametrize(
    ("template", "text"),
    [
        (PLAIN, "u a b </s> x c d </s> u e </s> x f </s>"),
        (WITH_SYSTEM, "s z </s> u a b </s> x c d </s> u e </s> x f </s>"),
        (MARKED, "u a b </s> x c d </s> u e </s> x f </s>"),
    ],
)
def test_only_the_assistants_words_and_ends_carry_loss(tokenizer, template, text):
    words, encoded = encode(tokenizer, template, CHAT)
    assert words == [(text, "c d </s> f </s>")]
    assert (encoded.cut, encoded.dropped) == (0, 0)


def test_a_first_turn_of_the_assistant_has_loss_without_the_systems(tokenizer):
    words, _ = encode(tokenizer, WITH_SYSTEM, [("assistant", "a"), *CHAT[:2]])
    assert words == [("s z </s> x a </s> u a b </s> x c d </s>", "a </s> c d </s>")]


def test_long_conversations_are_cut_and_those_without_the_assistant_dropped(tokenizer):
    words, encoded = encode(tokenizer, PLAIN, CHAT, CHAT[:1], [CHAT[2], CHAT[3]], max_length=6)
    assert words == [("u a b </s> x c", "c"), ("u e </s> x f </s>", "f </s>")]
    assert (encoded.cut, encoded.dropped) == (1, 1)
    assert encoded.describe("train", Lengths(6)) == [
        "train: 2 of 3 examples; 1 dropped (no token to learn within --max-length), 1 cut to "
        "--max-length 6"
    ]


def test_a_template_that_rewrites_earlier_turns_is_refused_unless_one_turn_is_learnt(tokenizer):
    with pytest.raises(FinetuneError, match=r"cannot be found: use a template with {% generation"):
        encode(tokenizer, FORGETS, CHAT)
    assert encode(tokenizer, FORGETS, CHAT[:2])[0] == [("u a b </s> x c d </s>", "c d </s>")]


def test_what_a_template_says_is_passed_on(tokenizer):
    with pytest.raises(FinetuneError, match=r"refuses a conversation of system, user.*no system"):
        encode(tokenizer, STRICT, [("system", "a"), ("user", "b")])


def test_without_a_template_one_exchange_is_prompt_and_response(tokenizer):
    assert encode(tokenizer, None, CHAT[:2])[0] == [("a b c d </s>", "c d </s>")]
    with pytest.raises(FinetuneError, match=r"no chat template.*instruct model"):
        encode(tokenizer, None, CHAT)


def test_sharegpt_is_the_same_conversation():
    names = {"user": "human", "assistant": "gpt"}
    shared = [[{"from": names[role], "value": content} for role, content in CHAT]]
    split = from_conversations(Dataset.from_dict({"text": shared}), "here")
    assert split[0]["messages"] == turns(CHAT)


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ({"role": "narrator", "content": "a"}, "here: row 0: a message's role is 'narrator'"),
        ({"role": "user", "content": [{"text": "a"}]}, r"row 0: a message's content is .*expected"),
        ({"role": "user", "content": "a", "tool_calls": ["f"]}, r"row 0: .*'tool_calls'"),
    ],
)
def test_messages_that_cannot_be_trained_on_are_named(message, expected):
    split = Dataset.from_dict({"text": [[message]]})
    with pytest.raises(FinetuneError, match=expected):
        from_conversations(split, "here")


def test_the_input_of_an_alpaca_instruction_is_part_of_the_prompt():
    split = Dataset.from_dict(
        {"text": ["Add.", "Go."], "text_pair": ["1 and 2", ""], "label": ["3", "Gone."]}
    )
    joined = join_contexts(split)
    assert (joined["text"][:], joined["label"][:]) == (["Add.\n\n1 and 2", "Go."], ["3", "Gone."])
    assert as_turns(joined)[1]["messages"] == turns([("user", "Go."), ("assistant", "Gone.")])

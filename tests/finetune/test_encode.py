"""What is cut and dropped is counted."""

from __future__ import annotations

import pytest

pytest.importorskip("transformers", reason="the main job needs the extra 'finetune'")
pytest.importorskip("datasets", reason="the main job needs the extra 'finetune'")

from datasets import Dataset
from tiny_models import save_tokenizer
from transformers import AutoTokenizer

from sparse_optim.finetune import encode
from sparse_optim.finetune.encode import (
    IGNORED,
    Lengths,
    encode_generation,
    encode_texts,
    encode_words,
)
from sparse_optim.finetune.errors import FinetuneError


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("encoder")
    save_tokenizer(folder, brackets=True)
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def decoder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("decoder")
    save_tokenizer(folder, brackets=False)
    return AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("fast", [True, False])
def test_texts_and_pairs_longer_than_the_maximum_are_counted(encoder, monkeypatch, fast):
    if not fast:  # such a tokenizer does not say what it cut
        monkeypatch.setattr(encode, "cut_rows", lambda encoded: None)
    texts = {"text": ["a b", "a b c d", "a b c d e"], "label": [0, 1, 0]}
    assert encode_texts(Dataset.from_dict(texts), encoder, 6).cut == 1
    assert encode_texts(Dataset.from_dict(texts), encoder, 7).cut == 0
    pairs = {**texts, "text_pair": ["c", "c", ""]}
    encoded = encode_texts(Dataset.from_dict(pairs), encoder, 6)
    assert (len(encoded.examples), encoded.cut, encoded.dropped) == (3, 2, 0)
    assert "cut" not in encoded.examples.column_names


def test_sentences_without_a_tagged_word_are_dropped(encoder):
    split = {"text": [["a", "b", "c"], [], ["a"]], "label": [[0, 1, 0], [], [1]]}
    encoded = encode_words(Dataset.from_dict(split), encoder, 4)
    assert (len(encoded.examples), encoded.cut, encoded.dropped) == (2, 1, 1)
    assert encoded.examples["labels"][:] == [[IGNORED, 0, 1, IGNORED], [IGNORED, 1, IGNORED]]


def test_prompts_that_fill_the_maximum_are_dropped_and_counted(decoder):
    split = {"text": ["a b c d", "a", "a b"], "label": ["e", "b c d e", "c"]}
    encoded = encode_generation(Dataset.from_dict(split), decoder, 4)
    assert (len(encoded.examples), encoded.cut, encoded.dropped) == (2, 1, 1)
    assert encoded.describe("train", Lengths(4)) == [
        "train: 2 of 3 examples; 1 dropped (no token to learn within --max-length), 1 cut to "
        "--max-length 4"
    ]
    assert (
        encode_generation(Dataset.from_dict(split), decoder, 8).describe("train", Lengths(8)) == []
    )
    with pytest.raises(FinetuneError, match="no example has a token to learn within --max-length"):
        encode_generation(Dataset.from_dict(split), decoder, 1)

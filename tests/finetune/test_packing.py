"""Packing: whole examples, which do not see each other."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers", reason="the main job needs the extra 'finetune'")
pytest.importorskip("datasets", reason="the main job needs the extra 'finetune'")

from datasets import Dataset
from tiny_models import save_decoder
from transformers import AutoModelForCausalLM, AutoTokenizer, MambaConfig, MambaForCausalLM

from sparse_optim.finetune.encode import IGNORED
from sparse_optim.finetune.errors import FinetuneError
from sparse_optim.finetune.packing import PadGeneration, check_packing, pack

EXAMPLES = [[5, 6, 7], [8, 9], [10, 11, 12, 13], [14, 15]]
LABELS = [[IGNORED, 6, 7], [8, 9], [10, IGNORED, 12, 13], [14, 15]]


@pytest.fixture(scope="module")
def decoder(tmp_path_factory):
    folder = save_decoder(tmp_path_factory.mktemp("decoder"))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = tokenizer.eos_token
    return AutoModelForCausalLM.from_pretrained(folder).eval(), tokenizer


def packed() -> Dataset:
    return pack(Dataset.from_dict({"input_ids": EXAMPLES, "labels": LABELS}), max_length=6)


def test_rows_have_whole_examples_in_order():
    assert packed()["input_ids"][:] == [[5, 6, 7, 8, 9], [10, 11, 12, 13, 14, 15]]
    assert packed()["position_ids"][:] == [[0, 1, 2, 0, 1], [0, 1, 2, 3, 0, 1]]
    assert packed()["labels"][:] == [
        [IGNORED, 6, 7, IGNORED, 9],
        [IGNORED, IGNORED, 12, 13, IGNORED, 15],
    ]


def test_packed_examples_have_the_logits_and_the_loss_of_single_ones(decoder):
    model, tokenizer = decoder
    batch = PadGeneration(tokenizer)(list(packed()))
    single = PadGeneration(tokenizer)(
        [
            {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels}
            for ids, labels in zip(EXAMPLES, LABELS, strict=True)
        ]
    )
    with torch.no_grad():
        together, alone = model(**batch, use_cache=False), model(**single)
    flat = torch.cat([together.logits[0, :5], together.logits[1]])
    expected = torch.cat([alone.logits[row, : len(ids)] for row, ids in enumerate(EXAMPLES)])
    torch.testing.assert_close(flat, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(together.loss, alone.loss, rtol=1e-4, atol=1e-5)


def test_models_that_would_mix_examples_are_refused(decoder):
    model, _ = decoder
    model.config.use_cache = False  # as the Trainer sets it
    check_packing(model.train())
    assert model.training
    model.config.use_cache = True  # transformers then takes the row for one sequence
    with pytest.raises(FinetuneError, match="mixes packed examples"):
        check_packing(model.eval())
    mamba = MambaForCausalLM(
        MambaConfig(vocab_size=20, hidden_size=8, num_hidden_layers=1, state_size=4)
    )
    with pytest.raises(FinetuneError, match="takes no position_ids"):
        check_packing(mamba)

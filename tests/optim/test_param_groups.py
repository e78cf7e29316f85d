"""Groups by name."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import nn

from sparse_optim import IncrementalMaskedAdamW, param_groups

SMALL = {
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}


def model():
    made = nn.ModuleDict({"body": nn.Linear(4, 4), "classifier": nn.Linear(4, 2)})
    made["classifier2"] = nn.Linear(2, 2)
    return made


def names(groups):
    return {group["unmask"]: [name for name, _ in group["params"]] for group in groups}


def test_a_beginning_is_whole_parts_of_a_name():
    assert names(param_groups(model(), rank="all", dense="classifier")) == {
        "rank": ["body.weight", "body.bias", "classifier2.weight", "classifier2.bias"],
        "all": ["classifier.weight", "classifier.bias"],
    }
    assert names(param_groups(model(), dense=["classifier.bias", "classifier2"]))["all"] == [
        "classifier.bias", "classifier2.weight", "classifier2.bias",
    ]  # fmt: skip


def test_weights_of_linear_modules_compete_unless_something_else_is_asked_for():
    assert names(param_groups(model(), dense="classifier")) == {
        "rank": ["body.weight", "classifier2.weight"],
        "all": ["classifier.weight", "classifier.bias"],
        "none": ["body.bias", "classifier2.bias"],
    }
    with pytest.raises(ValueError, match='rank="all" takes all that are not dense'):
        param_groups(torch.nn.Conv2d(1, 1, 3))


def test_a_function_chooses_what_competes_and_the_rest_stays_frozen():
    made = model()
    made["body"].bias.requires_grad_(False)
    groups = param_groups(made, rank=lambda name, param: param.ndim == 2, dense="classifier")
    assert names(groups) == {
        "rank": ["body.weight", "classifier2.weight"],
        "all": ["classifier.weight", "classifier.bias"],
        "none": ["classifier2.bias"],
    }
    before = {name: param.detach().clone() for name, param in made.named_parameters()}
    optimizer = IncrementalMaskedAdamW(groups, lr=0.1, budget=3, total_steps=1, unmask_steps=1.0)
    for param in made.parameters():
        param.grad = torch.ones_like(param) if param.requires_grad else None
    optimizer.step()
    moved = {name: int((param != before[name]).sum()) for name, param in made.named_parameters()}
    assert moved["body.weight"] + moved["classifier2.weight"] == 3
    assert (moved["classifier.weight"], moved["classifier.bias"]) == (8, 2)
    assert (moved["classifier2.bias"], moved["body.bias"]) == (0, 0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dense": "head"}, "begins with 'head', but with body, classifier, classifier2"),
        ({"dense": ["body", "classifier", "classifier2"]}, "no parameter competes"),
        ({"rank": lambda name, param: False}, "no parameter competes"),
        ({"rank": "liner"}, "rank='liner' and dense=\\(\\) leave none"),
        ({"rank": "lin(ear"}, "expected 'all', 'linear', a regular expression"),
        ({"rank": 3}, "expected 'all', 'linear', a regular expression"),
    ],
)
def test_what_leaves_nothing_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        param_groups(model(), **options)


def linear(made, **options):
    groups = names(param_groups(made, rank="linear", **options))
    return {name: sorted(found) for name, found in groups.items()}


def test_the_weights_of_linear_modules_of_every_architecture():
    bert = transformers.BertForSequenceClassification(transformers.BertConfig(**SMALL))
    found = linear(bert, dense="classifier")
    layer = "bert.encoder.layer.0."
    assert set(found["rank"]) == {
        "bert.pooler.dense.weight",
        *(f"{layer}attention.self.{part}.weight" for part in ("query", "key", "value")),
        *(f"{layer}{part}.dense.weight" for part in ("attention.output", "intermediate", "output")),
    }
    assert found["all"] == ["classifier.bias", "classifier.weight"]

    tied = {"vocab_size": 32, "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1}
    tied |= {"num_attention_heads": 2, "num_key_value_heads": 1}
    for is_tied in (True, False):
        config = transformers.LlamaConfig(**tied, tie_word_embeddings=is_tied)
        parts = linear(transformers.LlamaForCausalLM(config))["rank"]
        assert len(parts) == 7
        assert all("proj" in name for name in parts)

    gpt2 = transformers.GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=32, n_positions=8)
    assert linear(transformers.GPT2LMHeadModel(gpt2))["rank"] == [
        f"transformer.h.0.{part}.weight"
        for part in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    ]

    t5 = transformers.T5Config(d_model=8, d_kv=4, d_ff=16, num_layers=1, num_heads=2, vocab_size=32)
    parts = linear(transformers.T5ForConditionalGeneration(t5))["rank"]
    assert len(parts) == 4 + 2 + 8 + 2  # attention and feed-forward of encoder and decoder
    assert not any("relative" in name or "shared" in name or "lm_head" in name for name in parts)

    vit = transformers.ViTConfig(**SMALL, image_size=8, patch_size=4)
    found = linear(transformers.ViTForImageClassification(vit), dense="classifier")
    assert len(found["rank"]) == 6
    assert "vit.embeddings.patch_embeddings.projection.weight" in found["none"]  # a convolution

    attention = nn.ModuleDict({"attention": nn.MultiheadAttention(4, 2), "norm": nn.LayerNorm(4)})
    assert linear(attention)["rank"] == ["attention.in_proj_weight", "attention.out_proj.weight"]


def test_the_factors_of_an_adapter_are_linear():
    peft = pytest.importorskip("peft")
    made = peft.get_peft_model(model(), peft.LoraConfig(r=2, target_modules=["body"]))
    assert linear(made) == {
        "rank": [f"base_model.model.body.lora_{part}.default.weight" for part in "AB"]
    }


def test_a_regular_expression_and_decay():
    groups = param_groups(model(), rank=r"2\.(weight|bias)$", dense="classifier", weight_decay=0.1)
    assert [(g["unmask"], g["weight_decay"], [n for n, _ in g["params"]]) for g in groups] == [
        ("rank", 0.1, ["classifier2.weight"]),
        ("rank", 0.0, ["classifier2.bias"]),
        ("all", 0.1, ["classifier.weight"]),
        ("all", 0.0, ["classifier.bias"]),
        ("none", 0.0, ["body.weight", "body.bias"]),
    ]

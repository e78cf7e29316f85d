"""Bottleneck adapters: where they go, what they compute, save and load."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from torch import nn

pytest.importorskip("peft", reason="adapter_cases needs the extra 'peft'")
pytest.importorskip("transformers", reason="the models need the extra 'finetune'")

import transformers
from adapter_cases import bottleneck, classifier, copied, logits, train
from safetensors.torch import load_file, save_file

from sparse_optim import IncrementalMaskedAdamW
from sparse_optim.integrations import (
    BottleneckAdapter,
    adapter_groups,
    add_bottlenecks,
    load_bottlenecks,
    save_bottlenecks,
)

pytestmark = pytest.mark.usefixtures("one_thread")


def test_one_adapter_a_layer_behind_the_feed_forward_block():
    model = classifier()
    before = copied(model)
    names = add_bottlenecks(model, 4)
    assert names == [f"bert.encoder.layer.{layer}.output.dense" for layer in (0, 1)]
    assert {name for name, param in model.named_parameters() if param.requires_grad} == {
        f"{name}.adapter.{part}.{kind}"
        for name in names
        for part in ("down", "up")
        for kind in ("weight", "bias")
    }
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())


def test_it_computes_its_formula():
    torch.manual_seed(0)
    layer = nn.ModuleDict({"fc2": nn.Linear(6, 5)})
    add_bottlenecks(layer, 3)
    adapter = layer["fc2"].adapter
    adapter.down.bias.data.normal_()
    adapter.up.bias.data.normal_()
    hidden = torch.randn(2, 6)
    plain = hidden @ layer["fc2"].weight.T + layer["fc2"].bias
    inner = (plain @ adapter.down.weight.T + adapter.down.bias).clamp(min=0)
    expected = plain + inner @ adapter.up.weight.T + adapter.up.bias
    torch.testing.assert_close(layer["fc2"](hidden), expected)
    assert not torch.equal(expected, plain)


def test_it_takes_the_dtype_of_its_layer_and_survives_a_deep_copy():
    model = classifier(torch.bfloat16)
    add_bottlenecks(model, 2)
    adapters = [module for module in model.modules() if isinstance(module, BottleneckAdapter)]
    assert {param.dtype for module in adapters for param in module.parameters()} == {torch.bfloat16}
    twin = copy.deepcopy(model)
    assert torch.equal(logits(twin), logits(model))
    adapters[0].up.bias.data.fill_(1)
    assert not torch.equal(logits(twin), logits(model))


def test_named_modules_and_the_attention_output_on_demand():
    model = classifier()
    names = ["bert.encoder.layer.0.attention.output.dense", "pooler.dense"]
    assert add_bottlenecks(model, 2, names) == [names[0], "bert.pooler.dense"]


def test_two_adapters_a_layer_in_the_placement_of_houlsby():
    model = classifier()
    layers = [f"bert.encoder.layer.{layer}" for layer in (0, 1)]
    expected = [f"{x}.{end}.dense" for x in layers for end in ("attention.output", "output")]
    assert add_bottlenecks(model, 4, placement="houlsby") == expected


SMALL = {"vocab_size": 11, "num_hidden_layers": 1, "num_attention_heads": 2}
WIDE = {**SMALL, "hidden_size": 8, "intermediate_size": 12}
SEQ2SEQ = {
    **{"vocab_size": 11, "d_model": 8, "encoder_layers": 1, "decoder_layers": 1},
    **{"encoder_attention_heads": 2, "decoder_attention_heads": 2},
    **{"encoder_ffn_dim": 12, "decoder_ffn_dim": 12, "max_position_embeddings": 8},
}


@pytest.mark.parametrize(
    ("kind", "options", "ends"),
    [
        ("Roberta", WIDE, ["attention.output.dense", "output.dense"]),
        ("DebertaV2", WIDE, ["attention.output.dense", "output.dense"]),
        ("DistilBert", {"vocab_size": 11, "dim": 8, "n_layers": 1, "n_heads": 2, "hidden_dim": 12},
         ["attention.out_lin", "ffn.lin2"]),
        ("Llama", WIDE, ["self_attn.o_proj", "mlp.down_proj"]),
        ("OPT", {**SMALL, "hidden_size": 8, "ffn_dim": 12, "word_embed_proj_dim": 8},
         ["self_attn.out_proj", "fc2"]),
        ("Bart", SEQ2SEQ, ["self_attn.out_proj", "fc2", "self_attn.out_proj",
                           "encoder_attn.out_proj", "fc2"]),
        ("T5", {"vocab_size": 11, "d_model": 8, "d_kv": 4, "d_ff": 12, "num_layers": 1,
                "num_heads": 2, "num_labels": 2, "pad_token_id": 0},
         ["SelfAttention.o", "DenseReluDense.wo", "SelfAttention.o", "EncDecAttention.o",
          "DenseReluDense.wo"]),
        ("GPTNeoX", WIDE, ["attention.dense", "mlp.dense_4h_to_h"]),
    ],
)  # fmt: skip
def test_where_houlsbys_adapters_go_in_other_models(kind, options, ends):
    """Models with a classification head, whose own projections get none."""
    config = getattr(transformers, f"{kind}Config")(**options)
    model = getattr(transformers, f"{kind}ForSequenceClassification")(config)
    names = add_bottlenecks(model, 2, placement="houlsby")
    assert len(names) == len(ends)
    assert all(name.endswith(f".{end}") for name, end in zip(names, ends, strict=True)), names


def test_houlsbys_adapters_of_a_bert_that_decodes_are_also_after_its_cross_attention():
    config = transformers.BertConfig(is_decoder=True, add_cross_attention=True, **WIDE)
    names = add_bottlenecks(transformers.BertModel(config), 2, placement="houlsby")
    layer = "encoder.layer.0"
    ends = ("attention.output", "crossattention.output", "output")
    assert names == [f"{layer}.{end}.dense" for end in ends]
    names = add_bottlenecks(transformers.BertModel(config), 2)
    assert names == [f"{layer}.output.dense"]


def test_a_model_whose_attention_is_not_found_is_refused_and_unchanged():
    model = nn.ModuleDict({"fc2": nn.Linear(3, 3)})
    with pytest.raises(ValueError, match="target_modules to the output projections of its attent"):
        add_bottlenecks(model, 2, placement="houlsby")
    assert list(model["fc2"].children()) == []
    assert model["fc2"].weight.requires_grad
    with pytest.raises(ValueError, match="placement must be one of pfeiffer, houlsby, got 'both'"):
        add_bottlenecks(model, 2, placement="both")


def trained(folder):
    model = bottleneck()
    optimizer = IncrementalMaskedAdamW(
        adapter_groups(model), lr=1e-2, budget=100, total_steps=3, unmask_steps=1.0
    )
    train(model, optimizer, steps=3)
    save_bottlenecks(model, folder)
    return model


def test_save_and_load_give_the_trained_model_head_included(tmp_path):
    model = trained(tmp_path)
    again = classifier()
    load_bottlenecks(again, tmp_path)
    assert torch.equal(logits(again), logits(model))
    assert {name for name, param in again.named_parameters() if param.requires_grad} == {
        name for name, param in again.named_parameters() if ".adapter." in name
    }
    assert not any("bert.embeddings" in name for name in load_file(tmp_path / NAME))


NAME = "adapter_model.safetensors"


def other_head(folder, config):
    tensors = load_file(folder / NAME)
    tensors["classifier.bias"] = torch.zeros(3)
    save_file(tensors, folder / NAME)


def other_layer(folder, config):
    config["target_modules"][0] = "bert.encoder.layer.7.output.dense"


def other_kind(folder, config):
    del config["adapter_type"]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (other_head, r"classifier.bias is \(3,\) in the file, \(2,\) in the model"),
        (other_layer, r"layer.0.output.dense.adapter.* not there in the model"),
        (other_kind, "no bottleneck adapter"),
    ],
)
def test_a_folder_that_does_not_fit_is_refused_and_the_model_unchanged(tmp_path, damage, message):
    trained(tmp_path)
    path = tmp_path / "adapter_config.json"
    config = json.loads(path.read_text())
    damage(tmp_path, config)
    path.write_text(json.dumps(config))
    model = classifier()
    before = copied(model)
    with pytest.raises(ValueError, match=message):
        load_bottlenecks(model, tmp_path)
    assert copied(model).keys() == before.keys()
    assert all(param.requires_grad for param in model.parameters())


def test_errors():
    model = classifier()
    with pytest.raises(ValueError, match="rank must be at least 1, got 0"):
        add_bottlenecks(model, 0)
    with pytest.raises(ValueError, match="no Linear with a name that ends in nothing"):
        add_bottlenecks(model, 2, ["nothing"])
    assert all(param.requires_grad for param in model.parameters())
    with pytest.raises(ValueError, match="see add_bottlenecks"):
        save_bottlenecks(model, "nowhere")
    add_bottlenecks(model, 2)
    with pytest.raises(ValueError, match="has bottleneck adapters already"):
        add_bottlenecks(model, 2)

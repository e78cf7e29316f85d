"""sampled_backward=True on transformers' models: one quiet backward pass beside a dense one.

Loss, gradients of inputs (by way of those of biases and norms) bit for bit; gradients of active
entries by the tolerance rule, against float64.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as hf
from adapter_cases import adapted
from op_cases import assert_as_exact, assert_same_bits
from torch import Tensor, nn

from sparse_optim import MaskedAdamW, Static
from sparse_optim.policy.importance import Random

IDS = torch.randint(0, 90, (3, 11), generator=torch.Generator().manual_seed(0))
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


def bert() -> nn.Module:
    config = hf.BertConfig(
        vocab_size=90, intermediate_size=64, max_position_embeddings=16, **SMALL,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return hf.BertForSequenceClassification(config)


def llama() -> nn.Module:
    config = hf.LlamaConfig(
        vocab_size=90, intermediate_size=64, num_key_value_heads=1, tie_word_embeddings=True,
        **SMALL,
    )  # fmt: skip
    return hf.LlamaForCausalLM(config)


def gpt2() -> nn.Module:
    config = hf.GPT2Config(
        vocab_size=90, n_embd=32, n_layer=2, n_head=2, n_positions=16, resid_pdrop=0.0,
        embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    return hf.GPT2LMHeadModel(config)


def vit() -> nn.Module:
    config = hf.ViTConfig(
        image_size=16, patch_size=4, intermediate_size=64, hidden_dropout_prob=0.0, **SMALL
    )
    return hf.ViTForImageClassification(config)


def lora() -> nn.Module:
    model = adapted("lora")
    for name, param in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(param, std=0.1)
    return model


def lora_base() -> nn.Module:
    """The wrapped base layers are trained, too."""
    model = lora()
    model.requires_grad_(True)
    return model


def dora() -> nn.Module:
    """The base's weight is also used functionally."""
    model = adapted("dora")
    model.requires_grad_(True)
    return model


def inputs_of(model: nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
    name = type(model).__name__
    if name.startswith("ViT"):
        generator = torch.Generator().manual_seed(0)
        pixels = torch.randn(3, 3, 16, 16, generator=generator)
        return {"pixel_values": pixels.to(dtype), "labels": torch.tensor([0, 1, 1])}
    if name.startswith(("Llama", "GPT2")):
        return {"input_ids": IDS, "labels": IDS}
    return {"input_ids": IDS % 40, "labels": torch.tensor([0, 1, 1])}


MODELS: list[Callable[[], nn.Module]] = [bert, llama, gpt2, vit, lora, lora_base, dora]


def backward(model: nn.Module, dtype: torch.dtype, cast: bool) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16, enabled=cast):
        loss = model(**inputs_of(model, dtype)).loss
    loss.backward()
    return loss.detach()


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
@pytest.mark.parametrize("kind", ["float32", "bfloat16", "autocast"])
@pytest.mark.parametrize("build", MODELS, ids=lambda build: build.__name__)
def test_a_quiet_step_beside_a_dense_one(build, kind):
    dtype = torch.bfloat16 if kind == "bfloat16" else torch.float32
    torch.manual_seed(0)
    dense = build().to(dtype)
    sampled, exact = copy.deepcopy(dense), copy.deepcopy(dense).double()
    names = [name for name, param in sampled.named_parameters() if param.requires_grad]
    optimizer: Any = MaskedAdamW(
        [(name, param) for name, param in sampled.named_parameters() if param.requires_grad],
        importance=Random(1), selection=Static(0.1), max_grad_norm=1.0, model=sampled,
        sampled_backward=True,
    )  # fmt: skip
    losses = [backward(model, dtype, kind == "autocast") for model in (sampled, dense)]
    assert_same_bits(*losses)
    backward(exact, torch.float64, cast=False)
    covers = optimizer._sampled.covers
    assert covers
    params = [dict(model.named_parameters()) for model in (sampled, dense, exact)]
    for index, name in enumerate(names):
        got, want, true = (each[name] for each in params)
        if want.grad is None:  # peft keeps the original of a trained head
            assert got.grad is None
            assert index not in covers or covers[index].leaf.grad is None
            continue
        if index not in covers:
            assert_same_bits(got.grad, want.grad, name)
            continue
        position = covers[index].position.long()
        found = torch.zeros(position.numel())
        if covers[index].leaf.grad is not None:
            found += covers[index].leaf.grad
        if got.grad is not None:
            found += got.grad.view(-1)[position].float()
        reached, truth = (each.grad.view(-1)[position] for each in (want, true))
        if kind == "float32":
            scale = float(true.grad.abs().max())
            assert_as_exact(found, reached.float(), truth, name, scale=4 * scale)
        else:  # errors of forward and backward passes in 16 bits count more than the sum's
            worst = (reached.double() - truth).abs().max()
            assert (found.double() - truth).abs().max() <= 2 * worst, name
    functional = {"dora"}
    if build.__name__ not in functional:
        assert all(params[0][names[index]].grad is None for index in covers)
    optimizer.step()
    assert optimizer.metrics()["step"] == 1

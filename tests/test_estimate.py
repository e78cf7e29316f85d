"""Estimated memory against what training steps allocate on the CPU, and the command."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from sparse_optim import IncrementalMaskedAdamW, estimate

pytest.importorskip("transformers", reason="transformers is not installed")
from sparse_optim.cli import app
from sparse_optim.estimate_cli import read_footprint
from sparse_optim.finetune.errors import FinetuneError
from sparse_optim.finetune.models import find_model

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from bench import allocations

BATCH, SEQUENCE, BUDGET = 8, 64, 100_000


@pytest.fixture(scope="module")
def minilm() -> str:
    try:
        return find_model("minilm").location
    except FinetuneError as error:
        pytest.skip(str(error))


def measured(folder: str, optimizer_of, checkpointing: bool) -> allocations.Allocated:
    """Two training steps of MiniLM, the model included."""
    from transformers import AutoConfig, AutoModelForSequenceClassification

    config = AutoConfig.from_pretrained(folder)
    inputs = torch.zeros((BATCH, SEQUENCE), dtype=torch.long)

    def run() -> object:
        model = AutoModelForSequenceClassification.from_config(config).train()
        if checkpointing:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)
                model.gradient_checkpointing_enable()
        optimizer = optimizer_of(model)
        for _ in range(2):
            model(input_ids=inputs, labels=inputs[:, 0]).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        return model, optimizer

    return allocations.of_call(run, torch.device("cpu"))


OPTIMIZERS = {
    "adamw": lambda model: torch.optim.AdamW(model.parameters(), fused=True),
    "sparse": lambda model: IncrementalMaskedAdamW(
        model.named_parameters(), budget=BUDGET, total_steps=10
    ),
    "in-backward": lambda model: IncrementalMaskedAdamW(
        model.named_parameters(),
        budget=BUDGET,
        total_steps=10,
        max_grad_norm=1.0,
        fuse_backward=True,
    ),
}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_within_a_tenth_of_what_a_training_step_takes(minilm, name, checkpointing):
    footprint, itemsize = read_footprint("minilm", "float32", BATCH, SEQUENCE, checkpointing)
    (guess,) = estimate.estimates(footprint, itemsize, BUDGET, [name])
    found = measured(minilm, OPTIMIZERS[name], checkpointing)
    assert guess.held == pytest.approx(found.left, rel=0.1)
    assert guess.peak == pytest.approx(found.peak, rel=0.1)


def test_state_of_each_optimizer():
    footprint = estimate.Footprint(1_000_000, 3, 4, 4, 2, 0, 0)
    sizes = {name: estimate.state_bytes(name, footprint, 2, 1000) for name in estimate.OPTIMIZERS}
    assert sizes["adamw"] == 4_000_000
    assert sizes["adamw-fp32"] == 12_000_000
    assert sizes["adamw-8bit"] == 2_000_000 + 8 * 3906
    assert sizes["in-backward"] == sizes["sparse"] == 32 * 1000 + 24 * (244 + 3)
    assert estimate.state_bytes("adamw-fp32", footprint, 4, 1000) == 8_000_000


def test_frozen_and_tied_weights():
    with torch.device("meta"):
        model = torch.nn.Sequential(*(torch.nn.Linear(10, 10, bias=False) for _ in range(3)))
    model[2].weight = model[1].weight
    model[0].weight.requires_grad_(False)

    class Loss(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.model(x).sum()

    footprint = estimate.footprint_of(Loss(), {"x": torch.zeros(7, 10, device="meta")}, 0)
    assert (footprint.weights, footprint.gradients, footprint.entries) == (800, 400, 100)
    assert footprint.two_gradients == 400  # there is but one
    assert footprint.activations == 2 * 7 * 10 * 4  # inputs of the two that are trained


def run(*arguments: str):
    return CliRunner().invoke(app, ["estimate", *arguments])


def test_the_command(minilm):
    shown = run("--model", "minilm", "--dtype", "float32", "--budget", "0.5%", "--gpu", "h200",
                "--sequence", "128", "--batch", "16")  # fmt: skip
    assert shown.exit_code == 0, shown.output
    rows = {line.split()[1]: line for line in shown.output.splitlines() if "yes" in line}
    assert set(rows) == set(estimate.OPTIMIZERS)
    assert f"{22_713_986 * 8 / 2**30:.3f}" in rows["adamw"]
    only = run("--model", "minilm", "--optimizer", "sparse")
    assert "adamw" not in only.output


def test_a_decoder_from_a_config_alone(tmp_path):
    """No weights are there to be read; the logits of every token are saved in float32."""
    from transformers import LlamaConfig

    config = LlamaConfig(
        vocab_size=5000, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True,
    )  # fmt: skip
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(tmp_path)
    full, itemsize = read_footprint(str(tmp_path), "bfloat16", 3, 70, checkpointing=False)
    checkpointed, _ = read_footprint(str(tmp_path), "bfloat16", 3, 70, checkpointing=True)
    assert itemsize == 2
    assert full.weights == full.gradients == 2 * full.entries
    assert full.entries == 5000 * 64 + 2 * (64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 128 + 128) + 64
    assert full.activations > 3 * 70 * 5000 * 4
    assert checkpointed.activations < full.activations
    assert checkpointed.recomputed == full.activations // 2


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--gpu", "abacus", "unknown --gpu 'abacus'; known: l4"),
        ("--dtype", "int8", "unknown --dtype 'int8'"),
        ("--optimizer", "sgd", "unknown --optimizer 'sgd'"),
        ("--budget", "lots", "budget"),
        ("--sequence", "99999", "is beyond the model's 512 positions"),
        ("--model", "/no/such/folder", "/no/such/folder"),
    ],
)
def test_mistakes_are_told_in_a_line(minilm, option, value, message):
    options = {"--model": "minilm", option: value}
    shown = run(*(item for pair in options.items() for item in pair))
    assert shown.exit_code == 1
    assert message in shown.output
    assert "Traceback" not in shown.output

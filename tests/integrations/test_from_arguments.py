"""The optimizer and its scheduler, from TrainingArguments and a model."""

from __future__ import annotations

import math

import pytest

pytest.importorskip("transformers", reason="needs the extra 'finetune'")
pytest.importorskip("accelerate", reason="needs the extra 'finetune'")

import torch
from tiny_models import save_encoder
from tiny_trainer import Rows, arguments, build_model, trainer_of
from transformers import BertConfig, BertForSequenceClassification, Trainer

from sparse_optim.integrations.from_arguments import from_arguments

pytestmark = pytest.mark.usefixtures("one_thread")


def classifier():
    torch.manual_seed(0)
    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    return BertForSequenceClassification(
        BertConfig(vocab_size=32, num_attention_heads=2, num_labels=3, **size)
    )


def test_roles_decay_and_limits(tmp_path):
    """Linear weights compete and decay, the head is dense, embeddings and norms stay frozen."""
    args = arguments(
        tmp_path, weight_decay=0.1, adam_beta2=0.95, adam_epsilon=1e-6, max_grad_norm=0.5
    )
    optimizer = from_arguments(args, budget=40, dense="classifier", every=2)(classifier(), 10)
    roles = {
        (group["unmask"], group["weight_decay"]): set(group["param_names"])
        for group in optimizer.param_groups
    }
    assert roles.pop(("all", 0.1)) == {"classifier.weight"}
    assert roles.pop(("all", 0.0)) == {"classifier.bias"}
    ranked, frozen = roles.pop(("rank", 0.1)), roles.pop(("none", 0.0))
    assert not roles
    assert all(name.endswith("weight") for name in ranked)
    assert {"bert.embeddings.word_embeddings.weight", "bert.pooler.dense.bias"} <= frozen
    assert not any("LayerNorm" in name or "embeddings" in name for name in ranked)
    first = optimizer.param_groups[0]
    assert (first["lr"], first["betas"], first["eps"]) == (0.01, (0.9, 0.95), 1e-6)
    assert optimizer.max_grad_norm == 0.5
    assert (optimizer.selection.total_steps, optimizer.selection.every) == (10, 2)
    args = arguments(tmp_path, max_grad_norm=0.0)
    optimizer = from_arguments(args, budget=40, rank="all", sampled_backward=True)(classifier(), 10)
    assert optimizer.max_grad_norm == math.inf
    assert optimizer.sampled_backward
    (group,) = optimizer.param_groups
    assert group["weight_decay"] == 0.0
    assert "bert.embeddings.word_embeddings.weight" in group["param_names"]


def test_a_fresh_head_is_what_the_checkpoint_lacks(tmp_path):
    folder = save_encoder(tmp_path / "encoder")
    model, info = BertForSequenceClassification.from_pretrained(folder, output_loading_info=True)
    build = from_arguments(arguments(tmp_path), budget=40, dense=info["missing_keys"])
    (dense,) = (group for group in build(model, 10).param_groups if group["unmask"] == "all")
    assert set(dense["param_names"]) == {"classifier.weight", "classifier.bias"}


def test_the_scheduler_of_the_arguments_runs(tmp_path):
    changes = {"lr_scheduler_type": "cosine", "warmup_steps": 2, "max_grad_norm": 0.5}
    args = arguments(tmp_path, **changes)
    ours = trainer_of(tmp_path, args=args, build_optimizer=from_arguments(args, budget=200))
    dense = Trainer(model=build_model(), args=args, train_dataset=Rows())
    for trainer in (ours, dense):
        trainer.train()
    rates = [
        [row["learning_rate"] for row in trainer.state.log_history if "loss" in row]
        for trainer in (ours, dense)
    ]
    assert rates[0] == rates[1]
    assert ours.raw_optimizer.metrics()["active"] == 200


@pytest.mark.parametrize("changes", [{"optim": "sgd"}, {"optim_args": "a=1"}])
def test_another_optimizer_is_refused(tmp_path, changes):
    with pytest.raises(ValueError, match="takes the steps of AdamW: leave both"):
        from_arguments(arguments(tmp_path, **changes), budget=40)

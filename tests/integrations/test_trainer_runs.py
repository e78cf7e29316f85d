"""Whole runs of transformers' Trainer, by each way of giving it the optimizer."""

from __future__ import annotations

import copy
import warnings
from functools import partial

import pytest

pytest.importorskip("transformers", reason="needs the extra 'finetune'")
pytest.importorskip("accelerate", reason="needs the extra 'finetune'")

import torch
from op_cases import assert_same_bits
from tiny_trainer import Rows, arguments, build_model, build_optimizer
from transformers import Trainer

from sparse_optim import IncrementalMaskedAdamW, apply_delta
from sparse_optim.integrations.trainer import SelectiveTrainer
from sparse_optim.integrations.unwrap import unwrap

pytestmark = pytest.mark.usefixtures("one_thread")

OPTIONS = {"lr": 0.01, "budget": 200, "total_steps": 6, "unmask_steps": 1.0}
WAYS = ["optimizers", "class", "class and SelectiveTrainer", "build_optimizer"]


def trainer_by(way, folder, **changes):
    """A Trainer that is given the optimizer in this way."""
    model = build_model()
    kind = SelectiveTrainer if way.endswith(("SelectiveTrainer", "build_optimizer")) else Trainer
    given = {
        "optimizers": {"optimizers": (build_optimizer(model, 6), None)},
        "build_optimizer": {"build_optimizer": build_optimizer},
    }.get(way, {"optimizer_cls_and_kwargs": (IncrementalMaskedAdamW, dict(OPTIONS))})
    return kind(
        model=model, args=arguments(folder, **changes), train_dataset=Rows(), eval_dataset=Rows(8),
        **given,
    )  # fmt: skip


def same_bits(model, other):
    for got, value in zip(model.parameters(), other.parameters(), strict=True):
        assert_same_bits(got.detach(), value.detach())


@pytest.mark.parametrize("way", WAYS)
def test_base_and_delta_are_the_trained_model_whatever_gave_the_optimizer(tmp_path, way):
    """With accumulation and evaluation; only entries of the budget move."""
    trainer = trainer_by(
        way, tmp_path, gradient_accumulation_steps=2, eval_strategy="steps", eval_steps=3
    )
    base = copy.deepcopy(trainer.model)
    trainer.train()
    optimizer = unwrap(trainer.optimizer)
    assert optimizer.metrics()["step"] == 6
    assert optimizer.max_grad_norm == (1.0 if isinstance(trainer, SelectiveTrainer) else None)
    assert sum("eval_loss" in row for row in trainer.state.log_history) == 2
    pairs = list(zip(base.parameters(), trainer.model.parameters(), strict=True))
    assert 0 < sum(int((was != is_now).sum()) for was, is_now in pairs) <= 200
    apply_delta(base, optimizer.delta(trainer.model))
    same_bits(base, trainer.model)


def test_a_class_and_its_arguments(tmp_path):
    """The Trainer makes groups with and without decay, of all parameters, without names."""
    trainer = trainer_by("class", tmp_path, weight_decay=0.1)
    trainer.train()
    optimizer = unwrap(trainer.optimizer)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
    assert {group["unmask"] for group in optimizer.param_groups} == {"rank"}
    with pytest.raises(ValueError, match="needs names: pass model="):
        optimizer.delta()
    missing = Trainer(
        model=build_model(), args=arguments(tmp_path), train_dataset=Rows(),
        optimizer_cls_and_kwargs=(IncrementalMaskedAdamW, {"budget": 200}),
    )  # fmt: skip
    with pytest.raises(TypeError, match="total_steps"):
        missing.train()


@pytest.mark.parametrize("way", WAYS)
def test_a_run_resumed_in_mid_unmasking_is_the_run(tmp_path, way):
    saving = {"save_strategy": "steps", "save_steps": 3, "lr_scheduler_type": "linear"}
    build = partial(trainer_by, way, **saving)
    straight, resumed = build(tmp_path / "a"), build(tmp_path / "b")
    base = copy.deepcopy(straight.model)
    straight.train()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the Trainer, about arguments in the checkpoint
        resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-3"))
    optimizer = unwrap(resumed.optimizer)
    assert optimizer.metrics()["active"] == 200
    same_bits(straight.model, resumed.model)
    apply_delta(base, optimizer.delta(resumed.model))
    same_bits(base, straight.model)


@pytest.mark.parametrize("way", ["optimizers", "build_optimizer"])
def test_autocast(tmp_path, way):
    """Not fp16, for which accelerate does nothing on the CPU; see test_accelerate.py."""
    trainer = trainer_by(way, tmp_path, bf16=True)
    base, dtypes = copy.deepcopy(trainer.model), set()
    layer = trainer.model.model.layers[0].mlp.up_proj
    layer.register_forward_hook(lambda _, __, output: dtypes.add(output.dtype))
    trainer.train()
    assert dtypes == {torch.bfloat16}
    optimizer = unwrap(trainer.optimizer)
    assert (optimizer.metrics()["step"], optimizer.metrics()["active"]) == (6, 200)
    apply_delta(base, optimizer.delta(trainer.model))
    same_bits(base, trainer.model)

"""transformers' Trainer with `SelectiveMixin`: a plain loop's steps, and nothing read twice."""

from __future__ import annotations

import copy
import logging
import shutil
import warnings

import pytest

pytest.importorskip("transformers", reason="needs the extra 'finetune'")
pytest.importorskip("accelerate", reason="needs the extra 'finetune'")

import torch
from op_cases import assert_same_bits
from tiny_trainer import Rows, arguments, build_model, build_optimizer, trainer_of
from torch import nn
from transformers import LlamaForCausalLM, Trainer

from sparse_optim import IncrementalMaskedAdamW, apply_delta
from sparse_optim.integrations.trainer import SelectiveMixin, SelectiveTrainer

pytestmark = pytest.mark.usefixtures("one_thread")


def by_hand(limit: float | None, clips_itself: bool) -> LlamaForCausalLM:
    """The same six steps in a plain loop."""
    model, rows = build_model(), Rows()
    optimizer = build_optimizer(model, 6, max_grad_norm=limit if clips_itself else None)
    model.train()
    for step in range(6):
        batch = torch.stack([rows[4 * step + row]["input_ids"] for row in range(4)])
        model(input_ids=batch, labels=batch).loss.backward()
        if not clips_itself and limit is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), limit)
        optimizer.step()
        optimizer.zero_grad()
    return model


@pytest.mark.parametrize(
    ("argument", "own", "expected"),
    [(1.0, None, 1.0), (0.0, None, None), (0.5, 0.1, 0.1), (0.1, 0.5, 0.1), (0.0, 0.3, 0.3)],
)
def test_clipping_happens_in_the_optimizer_alone(tmp_path, monkeypatch, argument, own, expected):
    """Not even for the norm that is logged does the Trainer read the gradients."""
    monkeypatch.setattr(
        "accelerate.Accelerator.clip_grad_norm_",
        lambda *_, **__: pytest.fail("the Trainer read the gradients"),
    )

    def build(model: nn.Module, total_steps: int) -> IncrementalMaskedAdamW:
        return build_optimizer(model, total_steps, max_grad_norm=own)

    trainer = trainer_of(
        tmp_path, build_optimizer=build, args=arguments(tmp_path, max_grad_norm=argument)
    )
    trainer.train()
    assert trainer.raw_optimizer.max_grad_norm == expected
    expected_model = by_hand(expected, clips_itself=True)
    for got, value in zip(trainer.model.parameters(), expected_model.parameters(), strict=True):
        assert_same_bits(got.detach(), value.detach())


def test_a_limit_given_twice_gives_the_steps_of_one(tmp_path):
    """The plain Trainer clips, and then the optimizer: equal limits give equal results."""
    plain, model = build_model(), by_hand(0.1, clips_itself=False)
    optimizer = build_optimizer(plain, 6, max_grad_norm=0.1)
    Trainer(
        model=plain, args=arguments(tmp_path, max_grad_norm=0.1), train_dataset=Rows(),
        optimizers=(optimizer, None),
    ).train()  # fmt: skip
    for got, value in zip(plain.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(got, value, rtol=1e-4, atol=1e-6)


def test_the_log_has_the_optimizers_metrics_and_the_delta_is_exact(tmp_path):
    trainer = trainer_of(tmp_path)
    base = copy.deepcopy(trainer.model)
    trainer.train()
    logs = [row for row in trainer.state.log_history if "loss" in row]
    assert [row["active"] for row in logs] == [200 * step // 6 for step in range(1, 7)]
    assert all(row["grad_norm"] > 0 and row["skipped_steps"] == 0 for row in logs)
    apply_delta(base, trainer.raw_optimizer.delta(trainer.model))
    for got, value in zip(base.parameters(), trainer.model.parameters(), strict=True):
        assert_same_bits(got.detach(), value.detach())


@pytest.mark.parametrize(("steps", "words"), [(3, "too early"), (60, "in part alone")])
def test_a_schedule_of_another_length_is_mentioned_at_the_beginning(tmp_path, steps, words, caplog):
    model = build_model()
    trainer = trainer_of(
        tmp_path, model=model, build_optimizer=None,
        optimizers=(build_optimizer(model, steps), None),
    )  # fmt: skip
    with caplog.at_level(logging.WARNING, "sparse_optim"):
        trainer.train()
    message = f"total_steps is {steps}, but the training takes 6 steps: the budget is spent {words}"
    assert sum(message in line for line in caplog.messages) == 1


def test_resuming_without_the_optimizers_state_is_mentioned(tmp_path, caplog):
    saving = {"save_strategy": "steps", "save_steps": 3}
    trainer_of(tmp_path / "a", args=arguments(tmp_path / "a", **saving)).train()
    checkpoint = tmp_path / "a" / "checkpoint-3"
    shutil.copytree(checkpoint, tmp_path / "whole")
    for name in ("optimizer.pt", "scheduler.pt"):
        (checkpoint / name).unlink()
    for folder, told in ((tmp_path / "whole", False), (checkpoint, True)):
        caplog.clear()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trainer_of(tmp_path / "b").train(resume_from_checkpoint=str(folder))
        messages = [line for line in caplog.messages if "without the optimizer's state" in line]
        assert len(messages) == told


def test_the_best_model_at_the_end_has_a_delta(tmp_path):
    saving = {
        "save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2,
        "load_best_model_at_end": True, "metric_for_best_model": "loss", "learning_rate": 3.0,
    }  # fmt: skip

    def build(model: nn.Module, total_steps: int) -> IncrementalMaskedAdamW:
        return IncrementalMaskedAdamW(
            model.named_parameters(), lr=3.0, budget=200, total_steps=total_steps, unmask_steps=1.0
        )

    trainer = trainer_of(
        tmp_path, args=arguments(tmp_path, **saving), eval_dataset=Rows(), build_optimizer=build
    )
    base = copy.deepcopy(trainer.model)
    trainer.train()
    assert not trainer.state.best_model_checkpoint.endswith("checkpoint-6")
    apply_delta(base, trainer.raw_optimizer.delta(trainer.model))
    for got, value in zip(base.parameters(), trainer.model.parameters(), strict=True):
        assert_same_bits(got.detach(), value.detach())


class Other(Trainer):
    """A subclass of somebody else's, such as trl's."""


class Mixed(SelectiveMixin, Other):
    pass


def test_the_mixin_goes_with_other_trainers_and_other_optimizers(tmp_path):
    mixed = trainer_of(tmp_path, kind=Mixed)
    mixed.train()
    assert mixed.raw_optimizer.metrics()["active"] == 200
    dense = trainer_of(tmp_path, build_optimizer=None)
    dense.train()
    assert isinstance(dense.raw_optimizer, torch.optim.AdamW)
    assert all("active" not in row for row in dense.state.log_history)


@pytest.mark.parametrize("fuse", [False, True])
def test_sampled_gradients_in_a_trainer(tmp_path, fuse):
    """It zeroes gradients by the model, and accumulates where nothing is freed at once."""
    found = []
    for sampled in (True, False):
        model = build_model()

        def build(
            model: nn.Module, total_steps: int, sampled: bool = sampled
        ) -> IncrementalMaskedAdamW:
            return IncrementalMaskedAdamW(
                model.named_parameters(), lr=0.01, budget=200, total_steps=total_steps, every=3,
                norm="active", max_grad_norm=1.0, model=model, sampled_backward=sampled,
                fuse_backward=sampled and fuse, unmask_steps=1.0,
            )  # fmt: skip

        trainer = SelectiveTrainer(
            model=model, train_dataset=Rows(), build_optimizer=build,
            args=arguments(tmp_path / str(sampled), gradient_accumulation_steps=1 if fuse else 2),
        )  # fmt: skip
        trainer.train()
        assert trainer.raw_optimizer.metrics()["active"] == 200
        found.append(model)
        losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
        found.append(torch.tensor(losses))
    torch.testing.assert_close(found[1], found[3], rtol=1e-5, atol=1e-5)
    for one, other in zip(found[0].parameters(), found[2].parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)

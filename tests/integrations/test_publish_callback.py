"""The Trainer publishes: each update or some, the last one always, and after a resume."""

from __future__ import annotations

import pytest

pytest.importorskip("transformers", reason="needs the extra 'finetune'")
pytest.importorskip("accelerate", reason="needs the extra 'finetune'")

import torch
from op_cases import assert_same_bits
from tiny_trainer import Rows, arguments, build_model, build_optimizer
from transformers import Trainer

from sparse_optim.integrations.publish_callback import PublishCallback
from sparse_optim.publish import PatchFolder, WeightReceiver

pytestmark = pytest.mark.usefixtures("one_thread")


def trainer_of(folder, model, callback, **changes):
    optimizer = build_optimizer(model, 6)
    given = {"model": model, "train_dataset": Rows(), "eval_dataset": Rows()}
    given |= {"optimizers": (optimizer, None)}
    return Trainer(args=arguments(folder, **changes), callbacks=[callback], **given)


def assert_followed(folder, model):
    served = build_model()
    receiver = WeightReceiver(served)
    version = PatchFolder(folder).follow(receiver)
    for name, tensor in model.state_dict().items():
        assert_same_bits(served.state_dict()[name], tensor)
    return version


@pytest.mark.parametrize(("every", "versions"), [(1, 6), (2, 3), (4, 2), (9, 1)])
def test_some_updates_and_the_last_one(tmp_path, every, versions):
    model = build_model()
    weights = tmp_path / "weights"
    trainer_of(tmp_path, model, PublishCallback(weights, every=every)).train()
    assert assert_followed(weights, model) == versions


def test_a_resumed_run_goes_on_in_the_same_folder(tmp_path):
    weights, kept = tmp_path / "weights", {"save_strategy": "steps", "save_steps": 3}
    trainer_of(tmp_path, build_model(), PublishCallback(weights), **kept).train()
    model = build_model()
    trainer = trainer_of(tmp_path, model, PublishCallback(weights), **kept)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert assert_followed(weights, model) == 6 + 3


@pytest.mark.parametrize("every", [1, 4])
def test_the_best_model_is_published_at_the_end(tmp_path, every):
    """Servers hold what training returns."""
    model, weights = build_model(), tmp_path / "weights"
    steps = {"save_strategy": "steps", "eval_strategy": "steps", "save_steps": 2, "eval_steps": 2}
    trainer = trainer_of(
        tmp_path, model, PublishCallback(weights, every=every), load_best_model_at_end=True,
        metric_for_best_model="loss", greater_is_better=True, **steps,
    )  # fmt: skip
    trainer.train()
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-2")  # it learns: loss falls
    assert assert_followed(weights, model) == 6 // every + 1


def test_a_second_training_is_published_too(tmp_path):
    model, weights = build_model(), tmp_path / "weights"
    callback = PublishCallback(weights, every=9)
    trainer_of(tmp_path, model, callback).train()
    other = build_model()
    trainer_of(tmp_path, other, callback).train()
    assert assert_followed(weights, other) == 2


def test_a_rounded_run_is_resumed_with_its_base(tmp_path):
    weights, kept = tmp_path / "weights", {"save_strategy": "steps", "save_steps": 3}
    options = {"dtype": torch.bfloat16}
    trainer_of(tmp_path, build_model(), PublishCallback(weights, **options), **kept).train()
    model, resume = build_model(), str(tmp_path / "checkpoint-3")
    with pytest.raises(ValueError, match="no longer holds the base: give base="):
        trainer_of(tmp_path, build_model(), PublishCallback(weights, **options), **kept).train(
            resume_from_checkpoint=resume
        )
    callback = PublishCallback(weights, base=build_model(), **options)
    trainer_of(tmp_path, model, callback, **kept).train(resume_from_checkpoint=resume)
    served = build_model().bfloat16()
    assert PatchFolder(weights).follow(WeightReceiver(served)) == 6 + 3
    for name, tensor in model.bfloat16().state_dict().items():
        assert_same_bits(served.state_dict()[name], tensor)


def test_another_optimizer_is_an_error(tmp_path):
    model = build_model()
    given = {"model": model, "train_dataset": Rows()}
    adamw = torch.optim.AdamW(model.parameters())
    callback = PublishCallback(tmp_path / "weights")
    trainer = Trainer(
        args=arguments(tmp_path), callbacks=[callback], optimizers=(adamw, None), **given
    )
    with pytest.raises(ValueError, match=r"needs an optimizer of sparse_optim, .* got A"):
        trainer.train()
    with pytest.raises(ValueError, match="every: expected at least 1"):
        PublishCallback(tmp_path / "weights", every=0)

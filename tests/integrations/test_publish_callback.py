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
    given = {"model": model, "train_dataset": Rows(), "optimizers": (optimizer, None)}
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

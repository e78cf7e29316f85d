"""Metrics in every tracker's log, and a delta beside each checkpoint."""

from __future__ import annotations

import copy
import os
import sys

import pytest

pytest.importorskip("transformers", reason="needs the extra 'finetune'")
pytest.importorskip("accelerate", reason="needs the extra 'finetune'")

import torch
from op_cases import assert_same_bits
from processes import start_group
from repository import ROOT
from tiny_trainer import Rows, arguments, build_model, build_optimizer, trainer_of
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback

from sparse_optim import IncrementalMaskedAdamW, apply_delta, load_delta
from sparse_optim.integrations.callback import DELTA, LOGGED, SelectiveCallback

pytestmark = pytest.mark.usefixtures("one_thread")


class Tracker(TrainerCallback):
    """What a tracker of `report_to` is handed; it is in the trainer before our callback."""

    def __init__(self):
        self.rows = []

    def on_log(self, args, state, control, logs=None, **_):
        self.rows.append(dict(logs))


def plain_trainer(folder, model, optimizer, **changes):
    given = {"model": model, "train_dataset": Rows(), "optimizers": (optimizer, None)}
    return Trainer(args=arguments(folder, **changes), callbacks=[Tracker()], **given)


def tracker_of(trainer):
    (found,) = (c for c in trainer.callback_handler.callbacks if isinstance(c, Tracker))
    return found


def test_trackers_get_the_metrics_and_checkpoints_a_delta(tmp_path):
    model = build_model()
    base, optimizer = copy.deepcopy(model), build_optimizer(model, 6)
    trainer = plain_trainer(tmp_path, model, optimizer, save_strategy="steps", save_steps=2)
    callback = SelectiveCallback()
    callback.attach(trainer)
    with pytest.raises(ValueError, match="attach it once"):
        callback.attach(trainer)
    trainer.train()
    rows = [row for row in tracker_of(trainer).rows if "loss" in row]
    history = [row for row in trainer.state.log_history if "loss" in row]
    for found in (rows, history):
        assert [row["active"] for row in found] == [200 * step // 6 for step in range(1, 7)]
        assert all(set(LOGGED) <= row.keys() for row in found)
        assert [row["budget_left"] for row in found][-1] == 0
    for step in (2, 4, 6):
        folder = tmp_path / f"checkpoint-{step}"
        delta = load_delta(folder / DELTA)
        assert delta.num_entries == 200 * step // 6
        with apply_delta(base, delta):
            saved = AutoModelForCausalLM.from_pretrained(folder)
            for got, value in zip(base.parameters(), saved.parameters(), strict=True):
                assert_same_bits(got.detach(), value.detach())


RANK = """
import sys, torch
from pathlib import Path
from processes import leave_group
from tiny_trainer import arguments, trainer_of
from sparse_optim.integrations.callback import SelectiveCallback
from sparse_optim.integrations.from_arguments import from_arguments

torch.set_num_threads(1)
args = arguments(Path(sys.argv[1]), save_strategy="steps", save_steps=3)
build = from_arguments(args, budget=200, every=2, sampled_backward=True)
trainer = trainer_of(Path(sys.argv[1]), args=args, build_optimizer=build)
SelectiveCallback().attach(trainer)
trainer.train()
weights = torch.cat([param.detach().flatten() for param in trainer.model.parameters()])
print("found", args.world_size, trainer.raw_optimizer.metrics()["active"], weights.sum().item())
leave_group()
"""


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="torch has no gloo")
def test_two_processes_train_alike_with_sampled_gradients(tmp_path):
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests" / "support")])
    command = [sys.executable, "-W", "ignore", "-c", RANK, str(tmp_path)]
    ended = start_group(command, PYTHONPATH=path)
    assert [done.returncode for done in ended] == [0, 0], ended[0].stderr
    first, second = (done.stdout.splitlines()[-1].split() for done in ended)
    assert first == second
    assert first[:3] == ["found", "2", "200"]
    assert load_delta(tmp_path / "checkpoint-6" / DELTA).num_entries == 200


def test_beside_the_mixin_and_with_another_optimizer(tmp_path):
    mixed = trainer_of(tmp_path / "mixed")
    SelectiveCallback().attach(mixed)
    mixed.train()
    (row,) = (row for row in mixed.state.log_history if row.get("active") == 200)
    assert row["grad_norm"] == mixed.raw_optimizer.metrics()["grad_norm"]
    model = build_model()
    changes = {"save_strategy": "steps", "save_steps": 6}
    optimizer = torch.optim.AdamW(model.parameters())
    other = plain_trainer(tmp_path / "other", model, optimizer, **changes)
    SelectiveCallback().attach(other)
    other.train()
    assert not any("active" in row for row in other.state.log_history)
    assert not (tmp_path / "other" / "checkpoint-6" / DELTA).exists()


@pytest.mark.parametrize("option", ["sampled_backward", "fuse_backward"])
def test_a_trainer_that_would_clip_a_part_of_the_gradients_is_refused(tmp_path, option):
    for limit in (1.0, 0.0):
        model = build_model()
        given = {"budget": 200, "total_steps": 6, "max_grad_norm": 1.0, option: True}
        optimizer = IncrementalMaskedAdamW(model.named_parameters(), model=model, **given)
        trainer = plain_trainer(tmp_path, model, optimizer, max_grad_norm=limit)
        SelectiveCallback().attach(trainer)
        if limit:
            with pytest.raises(ValueError, match="finds a part of the gradients alone"):
                trainer.train()
        else:
            trainer.train()
            assert optimizer.metrics()["active"] == 200


def test_a_search_of_hyperparameters_is_refused(tmp_path):
    model = build_model()
    trainer = plain_trainer(tmp_path, model, build_optimizer(model, 6))
    callback = SelectiveCallback()
    trainer.state.is_hyper_param_search = True
    with pytest.raises(ValueError, match="folders of a hyperparameter search"):
        callback.on_train_begin(trainer.args, trainer.state, trainer.control, trainer.optimizer)

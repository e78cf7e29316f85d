"""trl's trainers with `SelectiveMixin`, on a language model of a few thousand entries."""

from __future__ import annotations

import copy

import pytest

pytest.importorskip("trl", reason="needs trl, of the extra 'dev'")

import torch
from datasets import Dataset
from datasets.utils.logging import disable_progress_bar
from op_cases import assert_same_bits
from tiny_models import save_decoder
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

from sparse_optim import IncrementalMaskedAdamW, apply_delta, load_delta, param_groups
from sparse_optim.integrations.callback import DELTA, SelectiveCallback
from sparse_optim.integrations.from_arguments import from_arguments
from sparse_optim.integrations.publish_callback import PublishCallback
from sparse_optim.integrations.trainer import SelectiveMixin
from sparse_optim.publish import PatchFolder, WeightReceiver

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    # of transformers and torch, about what trl asks for
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning"),
]
BUDGET, STEPS = 50, 3


class SelectiveSFT(SelectiveMixin, SFTTrainer):
    pass


class SelectiveDPO(SelectiveMixin, DPOTrainer):
    pass


class SelectiveGRPO(SelectiveMixin, GRPOTrainer):
    pass


def count_letters(completions, **_):
    return [float(len(set(text.split()))) for text in completions]


TEXTS = {"text": ["a b c d", "e f g"] * 4}
PAIRS = {"prompt": ["a b", "c d"] * 4, "chosen": [" c", " d"] * 4, "rejected": [" e f", " g"] * 4}
PROMPTS = {"prompt": ["a b", "c d"] * 4}
GRPO = {"num_generations": 2, "max_completion_length": 6}
CASES = {
    "sft": (SelectiveSFT, SFTConfig, TEXTS, {}, {}),
    "dpo": (SelectiveDPO, DPOConfig, PAIRS, {}, {}),
    "grpo": (SelectiveGRPO, GRPOConfig, PROMPTS, GRPO, {"reward_funcs": count_letters}),
}


@pytest.fixture(scope="module")
def decoder(tmp_path_factory):
    disable_progress_bar()
    return str(save_decoder(tmp_path_factory.mktemp("models") / "decoder"))


def trainer_of(decoder, folder, name, kind=None, **given):
    mixed, config, data, settings, further = CASES[name]
    tokenizer = AutoTokenizer.from_pretrained(decoder, pad_token="[PAD]")
    args = config(
        output_dir=str(folder), max_steps=STEPS, per_device_train_batch_size=2, use_cpu=True,
        learning_rate=0.01, report_to="none", logging_steps=1, disable_tqdm=True,
        save_strategy="steps", save_steps=2, **settings,
    )  # fmt: skip
    if kind is None:
        given["build_optimizer"] = from_arguments(args, budget=BUDGET, unmask_steps=1.0)
    return (kind or mixed)(
        args=args, train_dataset=Dataset.from_dict(data), processing_class=tokenizer,
        **{"model": AutoModelForCausalLM.from_pretrained(decoder), **further, **given},
    )  # fmt: skip


def test_grpo_publishes_each_update(decoder, tmp_path):
    """What a server of rollouts holds is the trainer's model, version by version."""
    served = AutoModelForCausalLM.from_pretrained(decoder)
    receiver, folder = WeightReceiver(served), PatchFolder(tmp_path / "weights")
    seen = []

    class Server(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **_):
            seen.append(folder.follow(receiver))
            for name, tensor in model.state_dict().items():
                assert_same_bits(served.state_dict()[name], tensor)

    trainer = trainer_of(
        decoder, tmp_path, "grpo", callbacks=[PublishCallback(folder), Server()]
    )  # fmt: skip
    trainer.train()
    assert seen == [1, 2, 3]
    receiver.verify()


@pytest.mark.parametrize("name", CASES)
def test_only_the_budget_moves_and_is_clipped_once(decoder, tmp_path, monkeypatch, name):
    monkeypatch.setattr(
        "accelerate.Accelerator.clip_grad_norm_",
        lambda *_, **__: pytest.fail("the Trainer clipped"),
    )
    trainer = trainer_of(decoder, tmp_path, name)
    SelectiveCallback().attach(trainer)
    base = copy.deepcopy(trainer.model)
    trainer.train()
    optimizer = trainer.raw_optimizer
    assert optimizer.max_grad_norm == trainer.args.max_grad_norm == 1.0
    assert optimizer.engine.total_steps == STEPS
    rows = [row for row in trainer.state.log_history if "loss" in row]
    assert [row["active"] for row in rows] == [16, 33, 50]
    assert all(row["grad_norm"] > 0 and "entropy" in row for row in rows)
    moved = sum(
        int((was != is_now).sum())
        for was, is_now in zip(base.parameters(), trainer.model.parameters(), strict=True)
    )
    assert 0 < moved <= BUDGET
    assert load_delta(tmp_path / "checkpoint-2" / DELTA).num_entries == 33
    delta = optimizer.delta(trainer.model)
    assert delta.num_entries == BUDGET
    apply_delta(base, delta)
    for got, value in zip(base.parameters(), trainer.model.parameters(), strict=True):
        assert_same_bits(got.detach(), value.detach())


@pytest.mark.parametrize("way", ["class", "optimizers"])
def test_trls_own_trainer_takes_it_as_transformers_does(decoder, tmp_path, way):
    options = {"lr": 0.01, "budget": BUDGET, "total_steps": STEPS, "unmask_steps": 1.0}
    model = AutoModelForCausalLM.from_pretrained(decoder)
    given = {
        "class": {"optimizer_cls_and_kwargs": (IncrementalMaskedAdamW, options)},
        "optimizers": {
            "optimizers": (IncrementalMaskedAdamW(param_groups(model), **options), None)
        },
    }
    base = copy.deepcopy(model)
    trainer = trainer_of(decoder, tmp_path, "sft", SFTTrainer, model=model, **given[way])
    trainer.train()
    delta = trainer.optimizer.optimizer.delta(trainer.model)
    assert delta.num_entries == BUDGET
    apply_delta(base, delta)
    assert all(map(torch.equal, base.parameters(), trainer.model.parameters()))

"""Options of the training loop: recomputation, fp16, TensorBoard; and the values really used."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers", reason="the job needs the extra 'finetune'")

from finetune_jobs import config, make_folders

from sparse_optim.amp import GradScaler
from sparse_optim.delta import content_fingerprint, load_delta
from sparse_optim.finetune import FinetuneConfig, FinetuneError
from sparse_optim.finetune.inputs import load_base, load_inputs
from sparse_optim.finetune.job import run
from sparse_optim.finetune.trainer import JobTrainer
from sparse_optim.finetune.trainer_setup import make_trainer
from sparse_optim.finetune.validate import check_machine, check_method

pytestmark = pytest.mark.usefixtures("one_thread")
BASE = {"model": "minilm", "dataset": "trec6", "output": Path("out")}


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, str]:
    return make_folders(tmp_path_factory.mktemp("tiny"))


@pytest.mark.parametrize(
    ("model", "dataset", "settings"),
    [
        ("encoder", "sequence", {"every": 2}),  # sampled gradients, and whole ones in between
        ("encoder", "sequence", {"fuse_backward": True}),
        ("decoder", "generation", {"sampled_backward": False}),
        ("decoder", "generation", {"method": "full", "budget": None}),
        ("decoder", "generation", {"method": "top-tuning", "budget": 500}),
        ("encoder", "sequence", {"adapter": "lora"}),
    ],
    ids=str,
)
def test_recomputed_activations_give_the_same_delta(folders, tmp_path, model, dataset, settings):
    deltas = {}
    for recomputes in (False, True):
        job = {"gradient_checkpointing": recomputes, **settings}
        result = run(config(folders, tmp_path / str(recomputes), model, dataset, **job))
        marked = [m for m in result.model.modules() if getattr(m, "gradient_checkpointing", False)]
        assert bool(marked) == recomputes == result.metrics["used"]["gradient_checkpointing"]
        delta = load_delta(result.output / "delta.safetensors")
        deltas[recomputes] = dataclasses.replace(delta, method={})  # it may name an object
    assert content_fingerprint(deltas[True]) == content_fingerprint(deltas[False])
    assert deltas[True].num_entries + len(deltas[True].dense) > 0


def test_a_model_that_cannot_recompute_is_named(folders, tmp_path, monkeypatch):
    job = config(folders, tmp_path, "encoder", "sequence", gradient_checkpointing=True)
    inputs = load_inputs(job)
    loaded = load_base(job, inputs)
    monkeypatch.setattr(type(loaded.model), "supports_gradient_checkpointing", False)
    with pytest.raises(FinetuneError, match=r"BertForSequenceClassification does not support it"):
        make_trainer(job, inputs, loaded)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"amp": "fp16", "dtype": "float16"}, "--amp fp16 .* use --dtype float32"),
        ({"save_total_limit": 2}, "--save-total-limit is for checkpoints: add --save-every"),
        ({"save_total_limit": 0, "save_every": 2}, "--save-total-limit must be above 0"),
        ({"patience": 0}, "--patience must be above 0"),
    ],
)
def test_what_excludes_each_other_is_said(settings, message):
    with pytest.raises(FinetuneError, match=message):
        FinetuneConfig(**BASE, **settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "lora"}, "--method lora: this is one of the adapters: use --adapter lora"),
        ({"adapter": "id3"}, "--adapter id3: this is one of the methods: use --method id3"),
        ({"adapter": "lore"}, r"unknown adapter 'lore' \(did you mean 'lora'\?\)"),
    ],
)
def test_a_name_of_the_other_option_names_it(settings, message):
    with pytest.raises(FinetuneError, match=message):
        check_method(FinetuneConfig(**BASE, **settings))


def test_fp16_on_the_cpu_names_bf16():
    with pytest.raises(FinetuneError, match="--amp fp16 needs a GPU: on the CPU use --amp bf16"):
        check_machine(FinetuneConfig(**BASE, amp="fp16", cpu=True))


@pytest.mark.parametrize("settings", [{}, {"fuse_backward": True}, {"every": 2}], ids=str)
def test_a_scaled_loss_gives_the_same_model(folders, tmp_path, monkeypatch, settings):
    """The Trainer makes a scaler on a GPU alone; on the CPU it is put where the Trainer puts it."""
    plain = JobTrainer.create_accelerator_and_postprocess

    def with_scaler(self) -> None:
        plain(self)
        self.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)

    models = {}
    for scaled in (False, True):
        if scaled:
            monkeypatch.setattr(JobTrainer, "create_accelerator_and_postprocess", with_scaler)
        job = config(folders, tmp_path / "out", "encoder", "sequence", **settings)
        inputs = load_inputs(job)
        trainer = make_trainer(job, inputs, load_base(job, inputs))
        scaler = trainer.accelerator.scaler
        assert type(scaler) is (GradScaler if scaled else type(None))
        trainer.train()
        if scaled:
            assert scaler.get_scale() == 2.0**16  # torch's default, and no step was skipped
        models[scaled] = trainer.model.state_dict()
    for name, tensor in models[True].items():
        assert torch.equal(tensor, models[False][name]), name


def test_metrics_have_the_values_that_were_used(folders, tmp_path):
    job = {"budget": 0.01, "head_lr": 1e-3, "warmup": 0.5, "accumulation": 2, "epochs": 1.0}
    job |= {"steps": None, "backend": "reference"}
    used = run(config(folders, tmp_path / "out", "encoder", "sequence", **job)).metrics["used"]
    expected = {
        **{"lr": 1e-3, "head_lr": 1e-3, "adam_eps": 1e-8, "backend": "reference", "device": "cpu"},
        **{"steps": 3, "planned_steps": 3, "warmup_steps": 2, "train_rows": 48, "seed": 0},
        **{"columns": {"text": "text", "text_pair": None, "label": "label"}, "max_length": 16},
        **{"batch_size": 8, "accumulation": 2, "eval_split": "held-out 25% of train"},
        **{"gradients": "sampled", "processes": 1, "chat": False},
    }
    assert {name: used[name] for name in expected} == expected
    assert used["budget_entries"] == round(0.01 * used["ranked_entries"])
    assert used["budget_share"] == pytest.approx(0.01, rel=1e-2)
    assert used["dense_entries"] == 2 * 32 + 2
    other = config(folders, tmp_path / "full", "encoder", "sequence", method="full", steps=1)
    used = run(other).metrics["used"]
    assert (used["lr"], used["budget_entries"], used["backend"]) == (1e-4, 0, "torch")


def test_tensorboard_files_are_where_people_look(folders, tmp_path):
    pytest.importorskip("tensorboard", reason="the extra 'dev' has it")
    job = {"report_to": "tensorboard", "steps": 1}
    run(config(folders, tmp_path / "out", "encoder", "sequence", **job))
    (events,) = (tmp_path / "out").rglob("events.out.tfevents.*")
    assert events.parents[1] == tmp_path / "out" / "runs"
    assert not (tmp_path / "out" / "checkpoints").exists()
    for path in (tmp_path / "out").iterdir():
        if path.is_file():
            path.unlink()
    # What a job leaves that was killed before its first checkpoint does not block the next one.
    run(config(folders, tmp_path / "out", "encoder", "sequence", **job))

"""Options of a job that say how entries are unmasked reach the optimizer."""

from __future__ import annotations

import dataclasses

import pytest
import torch

pytest.importorskip("transformers", reason="the main job needs the extra 'finetune'")
pytest.importorskip("datasets", reason="the main job needs the extra 'finetune'")
pytest.importorskip("accelerate", reason="the main job needs the extra 'finetune'")

from finetune_jobs import config, make_folders

from sparse_optim import IncrementalMaskedAdamW, param_groups
from sparse_optim.delta import load_delta
from sparse_optim.engine import sampled
from sparse_optim.finetune import FinetuneConfig, FinetuneError
from sparse_optim.finetune.inputs import load_base, load_inputs
from sparse_optim.finetune.job import run
from sparse_optim.finetune.trainer_setup import method_request
from sparse_optim.methods import METHODS

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, str]:
    return make_folders(tmp_path_factory.mktemp("tiny"))


@pytest.mark.parametrize(
    ("settings", "counts"),
    [
        ({"unmask_share": 1.0}, [10, 20, 30, 40]),
        ({"unmask_share": 1.0, "unmask_schedule": "linear"}, [17, 30, 37, 40]),  # 40 (1-(1-t/4)^2)
        ({"unmask_share": 0.5}, [20, 40, 40, 40]),
        ({}, [40, 40, 40, 40]),  # a fifth of four steps is one
        ({"series": 2}, [10, 20, 30, 40]),  # so that each of its models is trained
    ],
)
def test_the_budget_is_spent_as_asked(folders, tmp_path, settings, counts):
    options = {"steps": 4, "log_every": 1, "budget": 40, "every": 1, **settings}
    result = run(config(folders, tmp_path / "out", "encoder", "sequence", **options))
    fresh = result.metrics["model"]["fresh_entries"]
    assert [row["active"] - fresh for row in result.metrics["log"]] == counts


def test_the_command_and_the_library_have_the_same_defaults(folders, tmp_path):
    """Which parameters compete, when the budget is spent, how often entries are unmasked."""
    given = {"budget": 40, "steps": 100, "cpu": True, "eval_fraction": 0.25, "max_length": 16}
    job = FinetuneConfig(folders["encoder"], folders["sequence"], tmp_path / "out", **given)
    inputs = load_inputs(job)
    loaded, other = load_base(job, inputs), load_base(job, inputs)
    command = METHODS["id3"].build(method_request(job, loaded, loaded.model, 100, list))
    library = IncrementalMaskedAdamW(
        param_groups(other.model, dense=sorted(other.fresh)),
        budget=40,
        total_steps=100,
        max_grad_norm=1.0,
        model=other.model,
        sampled_backward=True,
    )
    assert command.sampled_backward
    assert command.selection == library.selection
    assert command.selection.every == 5  # so that four steps of the first twenty are loud
    assert command.importance == library.importance
    pools = [
        {param.shape for group in optimizer.param_groups if group["unmask"] == "rank"
         for param in group["params"]}
        for optimizer in (command, library)
    ]  # fmt: skip
    assert pools[0] == pools[1]
    assert all(len(shape) == 2 for shape in pools[0])
    adapted = dataclasses.replace(job, adapter="lora")
    assert method_request(adapted, loaded, loaded.model, 100, list).rank == "all"


def test_bias_correction_reaches_the_optimizer(folders, tmp_path):
    """An entry unmasked at step 2 moves by its lr, or by half of it: two different models."""
    weights = {}
    for kind in ("entry", "global"):
        options = {"steps": 4, "budget": 40, "bias_correction": kind, "every": 1, "unmask_share": 1}
        result = run(config(folders, tmp_path / kind, "encoder", "sequence", **options))
        weights[kind] = [param.detach() for param in result.model.parameters()]
    assert not all(map(torch.equal, weights["entry"], weights["global"]))


@pytest.mark.parametrize("method", ["id3", "pafi", "fish"])
def test_gradients_taken_inside_the_backward_pass_give_the_same_model(folders, tmp_path, method):
    weights, norms = [], []
    for fused in (False, True):
        options = {"method": method, "budget": 40, "fuse_backward": fused, "log_every": 1}
        result = run(config(folders, tmp_path / str(fused), "encoder", "sequence", **options))
        assert result.metrics["verified"] is True
        weights.append([param.detach() for param in result.model.parameters()])
        norms.append([row["grad_norm"] for row in result.metrics["log"]])
    assert all(map(torch.equal, *weights))
    assert norms[0] == norms[1]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"accumulation": 2}, "--accumulation has nothing to add up: drop one of them"),
        ({"method": "full"}, "torch.optim.AdamW, which needs whole gradients"),
        ({"method": "dps"}, "torch.optim.AdamW, which needs whole gradients"),
        ({"method": "repeat-d3"}, "needs a set that only grows"),
    ],
)
def test_what_needs_whole_gradients_is_refused(folders, tmp_path, settings, message):
    with pytest.raises(FinetuneError, match=message):
        run(config(folders, tmp_path, "encoder", "sequence", fuse_backward=True, **settings))


def test_every_unmasks_in_leaps(folders, tmp_path):
    options = {"steps": 6, "log_every": 1, "budget": 60, "unmask_share": 1.0, "every": 3}
    result = run(config(folders, tmp_path / "out", "encoder", "sequence", **options))
    fresh = result.metrics["model"]["fresh_entries"]
    assert [row["active"] - fresh for row in result.metrics["log"]] == [30, 30, 30, 60, 60, 60]


@pytest.mark.parametrize("method", ["id3", "r-mask", "static-d3"])
def test_sampled_gradients_are_the_default_and_give_nearly_the_same_model(
    folders, tmp_path, method, monkeypatch
):
    found, calls = [], []
    function = sampled.weight_grad
    monkeypatch.setattr(
        sampled, "weight_grad", lambda *given: calls.append(given) or function(*given)
    )
    for sampled_backward in (None, True, False):
        options = {"method": method, "budget": 40, "steps": 6, "sampled_backward": sampled_backward}
        output = tmp_path / str(sampled_backward)
        result = run(config(folders, output, "encoder", "sequence", **options))
        assert result.metrics["verified"] is True
        found.append([param.detach() for param in result.model.parameters()])
        assert bool(calls) is (sampled_backward is not False)
        calls.clear()
    assert all(map(torch.equal, found[0], found[1]))
    for first, last in zip(found[0], found[2], strict=True):
        torch.testing.assert_close(first, last, rtol=1e-3, atol=1e-4)


def test_methods_that_choose_anew_take_whole_gradients(folders, tmp_path):
    """By default; asked for, sampled gradients are refused."""
    options = {"method": "repeat-d3", "budget": 40}
    run(config(folders, tmp_path / "a", "encoder", "sequence", **options))
    with pytest.raises(FinetuneError, match="sampled_backward=True needs a set that only grows"):
        run(
            config(folders, tmp_path / "b", "encoder", "sequence", sampled_backward=True, **options)
        )


def test_every_is_for_id3(folders, tmp_path):
    with pytest.raises(FinetuneError, match="--every is for the method id3, not for pafi"):
        config(folders, tmp_path, "encoder", "sequence", method="pafi", every=2)


def test_the_pool_is_chosen_and_the_rest_is_frozen(folders, tmp_path):
    options = {"method": "r-mask", "budget": 40, "rank": "linear", "steps": 2}
    result = run(config(folders, tmp_path / "out", "encoder", "sequence", **options))
    moved = load_delta(tmp_path / "out" / "delta.safetensors").sparse
    linear = {
        f"{name}.weight"
        for name, module in result.model.named_modules()
        if isinstance(module, torch.nn.Linear)
    }
    assert moved
    assert set(moved) <= linear
    frozen = {name for name, param in result.model.named_parameters() if not param.requires_grad}
    assert not any(name in linear for name in frozen)
    assert any("embeddings" in name for name in frozen)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": "lin(ear"}, r"--rank.*or a regular expression"),
        ({"rank": "nowhere"}, r"rank='nowhere' leaves no parameter"),
        ({"rank": "linear", "method": "full", "budget": None}, "nothing competes for a budget"),
    ],
)
def test_a_pool_that_cannot_be_is_refused(folders, tmp_path, settings, message):
    with pytest.raises(FinetuneError, match=message):
        run(config(folders, tmp_path / "out", "encoder", "sequence", **settings))

"""`--lr auto`: the rate is that of the curvature on the entries that the job trains."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers", reason="the main job needs the extra 'finetune'")
pytest.importorskip("datasets", reason="the main job needs the extra 'finetune'")
pytest.importorskip("accelerate", reason="the main job needs the extra 'finetune'")

from finetune_jobs import config, make_folders

from sparse_optim.delta import load_delta
from sparse_optim.finetune import FinetuneConfig, FinetuneError
from sparse_optim.finetune.auto_rate import mask_of
from sparse_optim.finetune.config import parse_rate
from sparse_optim.finetune.inputs import load_base, load_inputs
from sparse_optim.finetune.job import run
from sparse_optim.finetune.trainer_setup import method_request
from sparse_optim.finetune.validate import check_method

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, str]:
    return make_folders(tmp_path_factory.mktemp("tiny"))


def job(folders, output, **settings) -> FinetuneConfig:
    options = {"steps": 4, "budget": 40, "lr": "auto", **settings}
    return config(folders, output, "encoder", "sequence", **options)


def test_a_job_finds_its_rate_writes_it_down_and_resumes_with_it(folders, tmp_path, capsys):
    from rich.console import Console

    whole = job(folders, tmp_path / "whole", save_every=2)
    rate = run(whole, Console(width=200)).metrics["used"]["lr"]
    assert f"learning rate {rate:.2g}: " in capsys.readouterr().out
    assert f"lr: {rate}" in (tmp_path / "whole" / "config.yaml").read_text()
    checkpoint = tmp_path / "whole" / "checkpoints" / "checkpoint-2"
    resumed = run(job(folders, tmp_path / "resumed", save_every=2, resume=checkpoint))
    assert resumed.metrics["used"]["lr"] == rate
    deltas = [load_delta(tmp_path / name / "delta.safetensors") for name in ("whole", "resumed")]
    for name, values in deltas[0].sparse.items():
        assert torch.equal(values.value, deltas[1].sparse[name].value), name
    given = run(job(folders, tmp_path / "given", lr=rate))  # as if the user had given it
    for name, param in given.model.state_dict().items():
        assert torch.equal(param, resumed.model.state_dict()[name]), name


def request_of(folders, tmp_path, method, **settings):
    made = job(folders, tmp_path / "out", method=method, **settings)
    inputs = load_inputs(made)
    loaded = load_base(made, inputs)
    collate = inputs.task.collator(inputs.tokenizer, loaded.model)
    columns = ["input_ids", "attention_mask", "labels"]
    rows = inputs.train_set.select_columns(columns)
    batches = [collate([rows[i] for i in range(start, start + 4)]) for start in (0, 4)]
    request = method_request(made, loaded, loaded.model, 4, lambda: batches)
    return request, batches


def test_the_mask_of_id3_is_the_top_of_the_first_gradient(folders, tmp_path):
    request, batches = request_of(folders, tmp_path, "id3")
    before = {name: param.detach().clone() for name, param in request.named}
    request.model.eval()
    request.model(**batches[0]).loss.backward()
    ranked = [(name, param.grad.abs()) for name, param in request.ranked if param.grad is not None]
    request.model.zero_grad()
    scores = torch.cat([grad.flatten() for _, grad in ranked])
    least = scores.topk(40).values[-1]
    expected = {name: grad.flatten() >= least for name, grad in ranked}
    mask = mask_of("id3", request, batches)
    assert sum(len(positions) for positions in mask.values()) == 40
    for name, positions in mask.items():
        assert positions.tolist() == expected[name].nonzero().flatten().tolist(), name
    assert all(torch.equal(param, before[name]) for name, param in request.named)


@pytest.mark.parametrize(
    ("method", "names"),
    [
        ("full", lambda name, fresh: name not in fresh),
        ("bitfit", lambda name, fresh: name.endswith("bias") and name not in fresh),
        ("frozen", lambda name, fresh: name in fresh),
    ],
)
def test_the_masks_of_dense_methods_are_whole_tensors(folders, tmp_path, method, names):
    request, batches = request_of(folders, tmp_path, method, budget=None)
    mask = mask_of(method, request, batches)
    assert {name: len(positions) for name, positions in mask.items()} == {
        name: param.numel() for name, param in request.named if names(name, request.fresh)
    }


@pytest.mark.parametrize("method", ["stochastic-tuning", "top-tuning", "dps", "dps-mix"])
def test_methods_that_follow_earlier_steps_are_refused(folders, tmp_path, method):
    with pytest.raises(FinetuneError, match=f"--lr auto: {method} chooses entries by earlier"):
        check_method(job(folders, tmp_path, method=method))


def test_a_rate_is_a_number_or_auto(tmp_path):
    assert (parse_rate("5e-4"), parse_rate("auto")) == (5e-4, "auto")
    with pytest.raises(FinetuneError, match="--lr: expected a number such as 5e-4, or auto"):
        parse_rate("fast")
    with pytest.raises(FinetuneError, match="--lr must be a number or auto, got 'fast'"):
        FinetuneConfig("m", "d", tmp_path, lr="fast")

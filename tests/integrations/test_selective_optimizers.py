"""Reading the toolkit's summaries: against assigning by hand, hostile and damaged files.

The stand-in of its class has the toolkit's module and name while a file is written, and is gone
when the file is read. Faults planted by hand: strides in reverse, values not sorted with positions.
"""

from __future__ import annotations

import copy
import dataclasses
import pickle
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("transformers", reason="the command loads its models")

from tiny_models import save_encoder
from transformers import BertModel
from typer.testing import CliRunner

from sparse_optim import apply_delta, load_delta
from sparse_optim.cli.main import app
from sparse_optim.delta import DeltaError
from sparse_optim.integrations import read_summary

CONV = 1  # the place of conv.weight among the parameters
MODULE = "selective_optimizers.load_store"


@dataclasses.dataclass
class SelectivePeftSummary:
    values: list[Any]
    pointers: list[Any]
    shapes: list[Any]
    bn_metadata: list[Any]
    budget_used: int


SelectivePeftSummary.__module__ = MODULE


class Net(nn.Module):
    """Matrices, a scalar, a convolution, tied weights and a BatchNorm with statistics."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv1d(3, 4, 2)
        self.norm = nn.BatchNorm1d(4)
        self.scale = nn.Parameter(torch.tensor(2.0))
        self.first, self.second = nn.Linear(5, 6), nn.Linear(5, 6)
        self.second.weight = self.first.weight


def summary_of(tuned: nn.Module, masks: dict[str, torch.Tensor]) -> SelectivePeftSummary:
    """What the toolkit makes of a model and the masks of what was chosen."""
    values, pointers, shapes = [], [], []
    for name, param in tuned.named_parameters():
        mask = masks.get(name)
        values.append(None if mask is None else param.detach()[mask])
        pointers.append(None if mask is None else mask.nonzero())
        shapes.append(param.shape)
    norms = [module for module in tuned.modules() if isinstance(module, nn.BatchNorm1d)]
    parts = ("running_mean", "running_var", "num_batches_tracked")
    saved = [{part: getattr(module, part).clone() for part in parts} for module in norms]
    used = sum(int(mask.sum()) for mask in masks.values())
    return SelectivePeftSummary(values, pointers, shapes, saved, used)


def write(summary: Any, path: Path) -> Path:
    """torch.save, with the toolkit's module there for as long as that takes."""
    package, module = types.ModuleType("selective_optimizers"), types.ModuleType(MODULE)
    module.SelectivePeftSummary = SelectivePeftSummary
    sys.modules |= {"selective_optimizers": package, MODULE: module}
    try:
        torch.save(summary, path)
    finally:
        del sys.modules["selective_optimizers"], sys.modules[MODULE]
    return path


def trained() -> tuple[Net, dict[str, torch.Tensor]]:
    """A fine-tuned net, and the masks of what was chosen."""
    tuned = Net()
    draw = torch.Generator().manual_seed(1)
    masks = {
        name: torch.rand(param.shape, generator=draw) < 0.4
        for name, param in tuned.named_parameters()
        if name != "first.bias"
    }
    masks["scale"] = torch.tensor(True)
    masks["norm.bias"][:] = False
    with torch.no_grad():
        for name, mask in masks.items():
            tuned.get_parameter(name)[mask] += torch.randn(int(mask.sum()), generator=draw)
    tuned.norm(torch.randn(8, 4, 3, generator=draw))  # moves the statistics
    return tuned, masks


def test_applied_it_is_the_tuned_model(tmp_path):
    tuned, masks = trained()
    base = Net()
    before = copy.deepcopy(base.state_dict())
    summary = summary_of(tuned, masks)
    for column in (summary.values, summary.pointers):  # in any order
        column[CONV] = column[CONV].flip(0)
    delta = read_summary(write(summary, tmp_path / "summary.pt"), base)
    assert all(torch.equal(before[name], now) for name, now in base.state_dict().items())
    assert delta.num_entries == sum(int(mask.sum()) for mask in masks.values())
    assert "norm.bias" not in delta.sparse  # nothing was chosen
    assert delta.tied == {"second.weight": "first.weight"}
    apply_delta(base, delta)
    for name, tensor in tuned.state_dict().items():
        assert torch.equal(base.state_dict()[name], tensor), name
    other = Net()
    with torch.no_grad():
        other.conv.weight[0, 0, 0] += 1
    with pytest.raises(DeltaError, match=r"conv.weight"):
        apply_delta(other, delta)


class Code:
    """Pickled, it is a call."""

    def __reduce__(self):
        return (open, ("it-ran", "w"))


def put(field, value, place=CONV):
    def change(summary):
        getattr(summary, field)[place] = value

    return change


def twice(summary):
    summary.pointers[CONV][1] = summary.pointers[CONV][0]


def outside(summary):
    summary.pointers[CONV][1, 2] = 2


def negative(summary):
    summary.pointers[CONV][1, 2] = -1


def expanded(summary):
    """A petabyte in four bytes."""
    summary.values[CONV] = torch.zeros(1).expand(10**15)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (twice, r"conv.weight: index \[.*\] is there twice"),
        (outside, r"conv.weight: index \[.* 2\] is outside of its shape \(4, 3, 2\)"),
        (negative, r"conv.weight: index \[.* -1\] is outside"),
        (expanded, "conv.weight: values of shape .* do not fit"),
        (put("values", None), "conv.weight: expected a tensor of values and one of indices"),
        (put("values", "text"), "conv.weight: expected a tensor of values"),
        (put("values", torch.zeros(2, device="meta")), "expected a tensor of values"),
        (put("values", torch.zeros(2).double()), "file has torch.float64, the model torch.f"),
        (put("pointers", torch.zeros(1, 3)), "indices of shape .* do not fit"),
        (put("shapes", torch.Size([4])), r"file has shape \(4,\), the model \(4, 3, 2\)"),
        (put("bn_metadata", {}, 0), "norm: expected running_mean"),
        (lambda s: s.bn_metadata[0].update(running_var=torch.zeros(3)), "norm.running_var does"),
        (lambda s: s.bn_metadata.clear(), "bn_metadata: 0 in the file, and the model has 1 Batch"),
        (lambda s: s.values.pop(), "values: 7 in the file, and the model has 8 parameters"),
        (lambda s: setattr(s, "pointers", 3), "pointers: no list in the file"),
        (lambda s: setattr(s, "budget_used", 1), "it claims 1 entries and has"),
        (lambda s: setattr(s, "budget_used", torch.ones(2)), r"it claims tensor\(\[1"),
        (lambda s: delattr(s, "shapes"), "not a summary of selective_optimizers"),
        (put("values", Code()), "or it holds more than tensors"),
    ],
)
def test_a_file_that_does_not_fit_is_refused(tmp_path, monkeypatch, change, message):
    monkeypatch.chdir(tmp_path)
    summary = summary_of(*trained())
    change(summary)
    path = write(summary, tmp_path / "summary.pt")
    with pytest.raises(DeltaError, match=message) as caught:
        read_summary(path, Net())
    assert str(path) in str(caught.value)
    assert not (tmp_path / "it-ran").exists()


def test_other_and_damaged_files_are_refused(tmp_path):
    good = write(summary_of(*trained()), tmp_path / "summary.pt").read_bytes()
    torch.save({"w": torch.zeros(3)}, tmp_path / "weights.pt")
    (tmp_path / "cut.pt").write_bytes(good[: len(good) // 2])
    (tmp_path / "pickle.pt").write_bytes(pickle.dumps([1, 2]))
    (tmp_path / "empty.pt").write_bytes(b"")
    for name in ("weights", "cut", "pickle", "empty"):
        with pytest.raises(DeltaError, match=rf"{name}\.pt: not a summary"):
            read_summary(tmp_path / f"{name}.pt", Net())
    with pytest.raises(DeltaError, match="no such file"):
        read_summary(tmp_path / "nothing.pt", Net())


def test_the_command(tmp_path):
    folder = save_encoder(tmp_path / "encoder")
    tuned = BertModel.from_pretrained(folder)
    name = "encoder.layer.0.output.dense.weight"
    mask = torch.zeros(tuned.get_parameter(name).shape, dtype=torch.bool)
    mask[3, 5] = True
    with torch.no_grad():
        tuned.get_parameter(name)[mask] = 7.0
    path = write(summary_of(tuned, {name: mask}), tmp_path / "summary.pt")
    out = tmp_path / "delta.safetensors"
    command = ["import-summary", str(path), "-m", str(folder), "-o", str(out)]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    assert "1 entry in 1 parameter, " in done.output
    before = out.read_bytes()
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 1
    assert "exists; add --overwrite" in " ".join(done.output.split())
    assert out.read_bytes() == before
    assert CliRunner().invoke(app, [*command, "--overwrite"]).exit_code == 0
    base = BertModel.from_pretrained(folder)
    apply_delta(base, load_delta(out))
    assert torch.equal(base.get_parameter(name), tuned.get_parameter(name))
    # A head with random values: the delta would fit no model.
    done = CliRunner().invoke(app, [*command, "--overwrite", "--task", "sequence-classification"])
    assert done.exit_code == 1
    assert "has no classifier.bias, classifier.weight: the values would be random" in done.stderr
    done = CliRunner().invoke(app, [*command, "--dtype", "int8"])
    assert done.exit_code == 1
    assert "--dtype int8: expected one of float32" in done.stderr

"""Groups by name."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sparse_optim import IncrementalMaskedAdamW, param_groups


def model():
    made = nn.ModuleDict({"body": nn.Linear(4, 4), "classifier": nn.Linear(4, 2)})
    made["classifier2"] = nn.Linear(2, 2)
    return made


def names(groups):
    return {group["unmask"]: [name for name, _ in group["params"]] for group in groups}


def test_a_beginning_is_whole_parts_of_a_name():
    assert names(param_groups(model(), dense="classifier")) == {
        "rank": ["body.weight", "body.bias", "classifier2.weight", "classifier2.bias"],
        "all": ["classifier.weight", "classifier.bias"],
    }
    assert names(param_groups(model(), dense=["classifier.bias", "classifier2"]))["all"] == [
        "classifier.bias", "classifier2.weight", "classifier2.bias",
    ]  # fmt: skip


def test_a_function_chooses_what_competes_and_the_rest_stays_frozen():
    made = model()
    made["body"].bias.requires_grad_(False)
    groups = param_groups(made, rank=lambda name, param: param.ndim == 2, dense="classifier")
    assert names(groups) == {
        "rank": ["body.weight", "classifier2.weight"],
        "all": ["classifier.weight", "classifier.bias"],
        "none": ["classifier2.bias"],
    }
    before = {name: param.detach().clone() for name, param in made.named_parameters()}
    optimizer = IncrementalMaskedAdamW(groups, lr=0.1, budget=3, total_steps=1)
    for param in made.parameters():
        param.grad = torch.ones_like(param) if param.requires_grad else None
    optimizer.step()
    moved = {name: int((param != before[name]).sum()) for name, param in made.named_parameters()}
    assert moved["body.weight"] + moved["classifier2.weight"] == 3
    assert (moved["classifier.weight"], moved["classifier.bias"]) == (8, 2)
    assert (moved["classifier2.bias"], moved["body.bias"]) == (0, 0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dense": "head"}, "begins with 'head', but with body, classifier, classifier2"),
        ({"dense": ["body", "classifier", "classifier2"]}, "no parameter competes"),
        ({"rank": lambda name, param: False}, "no parameter competes"),
        ({"rank": "linear"}, "expected 'all' or a function"),
    ],
)
def test_what_leaves_nothing_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        param_groups(model(), **options)

"""A small classifier, its batches, and every calibration score by name."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import Tensor, nn
from torch.nn import functional

from sparse_optim.calibration import child_tuning_d, fisher, grasp, snip, synflow

CLASSES = 3


class Classifier(nn.Module):
    """Two layers and dropout, called as transformers models are."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.body = nn.Linear(4, 5)
        self.dropout = nn.Dropout(0.5)
        self.head = nn.Linear(5, CLASSES)
        self.unused = nn.Linear(2, 2, bias=False)
        self.to(dtype)

    def forward(self, inputs: Tensor, labels: Tensor | None = None) -> SimpleNamespace:
        logits = self.head(self.dropout(torch.tanh(self.body(inputs))))
        loss = None if labels is None else functional.cross_entropy(logits, labels)
        return SimpleNamespace(loss=loss, logits=logits)


def make_model(dtype: torch.dtype = torch.float32) -> Classifier:
    torch.manual_seed(0)
    model = Classifier(dtype)
    model.head.bias.requires_grad_(False)
    return model


def make_batches(sizes=(4, 3, 1), dtype: torch.dtype = torch.float32) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        {
            "inputs": torch.randn(size, 4, generator=generator).to(dtype),
            "labels": torch.randint(CLASSES, (size,), generator=generator),
        }
        for size in sizes
    ]


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: param for name, param in model.named_parameters() if param.requires_grad}


def gradient(value: Tensor, params: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    grads = torch.autograd.grad(value, list(params.values()), retain_graph=True, allow_unused=True)
    return {
        name: torch.zeros_like(param) if grad is None else grad
        for (name, param), grad in zip(params.items(), grads, strict=True)
    }


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert list(found) == list(expected)
    for name, score in found.items():
        assert score.dtype == torch.float32
        assert not score.requires_grad
        assert bool((score >= 0).all()), name
        torch.testing.assert_close(score, expected[name].float(), rtol=1e-5, atol=1e-8)
        assert name == "unused.weight" or bool((score > 0).any()), name


SCORES = {
    "fisher": fisher,
    "expect": lambda *args, **more: fisher(*args, sample_type="expect", **more),
    "child_tuning_d": child_tuning_d,
    "snip": snip,
    "grasp": grasp,
    "synflow": lambda model, batches, **more: synflow(
        model, lambda model: model(next(iter(batches))["inputs"]).logits, **more
    ),
}

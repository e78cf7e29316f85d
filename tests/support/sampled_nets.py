"""Small models with layers that can sample, and runs of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from sparse_optim import IncrementalMaskedAdamW, MaskedAdamW

WORDS, WIDTH = 50, 16


class Block(nn.Module):
    """Tied embeddings, a layer that is used twice, a norm, an odd width, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, WIDTH, padding_idx=0)
        self.up = nn.Linear(WIDTH, 37)
        self.down = nn.Linear(37, WIDTH, bias=False)
        self.norm = nn.LayerNorm(WIDTH)
        self.out = nn.Linear(WIDTH, WORDS, bias=False)
        self.out.weight = self.words.weight
        self.head = nn.Linear(WORDS, 3)

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.words(ids)
        for _ in range(2):
            hidden = hidden + self.down(torch.tanh(self.up(hidden)))
        return self.head(self.out(self.norm(hidden)).mean(1))


def new_model(
    build: Callable[[], nn.Module] = Block, dtype: torch.dtype = torch.float32
) -> nn.Module:
    torch.manual_seed(0)
    return build().to(dtype)


def optimizer_of(model: nn.Module, sampled: bool, **options: Any) -> MaskedAdamW:
    """Ours over the whole model, the head trained densely."""
    head = [item for item in model.named_parameters() if item[0].startswith("head")]
    body = [item for item in model.named_parameters() if not item[0].startswith("head")]
    groups = [{"params": body}, *([{"params": head, "unmask": "all"}] if head else [])]
    given = {
        "lr": 0.01, "budget": 200, "total_steps": 12, "every": 4, "max_grad_norm": 1.0,
        "norm": "active", **options,
    }  # fmt: skip
    return IncrementalMaskedAdamW(
        groups, model=model, sampled_backward=sampled, **given, unmask_steps=1.0
    )


def loss_of(model: nn.Module, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, WORDS, (4, 7), generator=generator)
    labels = torch.randint(0, 3, (4,), generator=generator)
    return nn.functional.cross_entropy(model(ids).float(), labels)


def train(
    model: nn.Module, optimizer: MaskedAdamW, steps: int, micro_batches: int = 1, first: int = 0
) -> None:
    for step in range(first, first + steps):
        for micro_batch in range(micro_batches):
            loss_of(model, 100 * step + micro_batch).backward()
        optimizer.step()
        optimizer.zero_grad()


def go_quiet(model: nn.Module, optimizer: MaskedAdamW) -> None:
    """Train up to a step that is followed by quiet ones."""
    train(model, optimizer, 1)
    assert not optimizer.engine.loud

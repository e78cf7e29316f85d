"""A small net with what makes backward passes differ, and optimizers over it."""

from __future__ import annotations

import torch
from op_cases import assert_same_bits
from torch import Tensor, nn

from sparse_optim import IncrementalMaskedAdamW, MaskedAdamW

CLASSES = 5


class Net(nn.Module):
    """Tied weights, a parameter used in every third step, tensors below and above a tile."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.embedding = nn.Embedding(60, 24)
        self.rare = nn.Parameter(torch.randn(24) / 5)
        self.layers = nn.ModuleList(nn.Linear(24, 24) for _ in range(3))
        self.norm = nn.LayerNorm(24)
        self.tied = nn.Linear(24, 60, bias=False)
        self.tied.weight = self.embedding.weight
        self.head = nn.Linear(60, CLASSES)
        self.to(dtype)

    def forward(self, tokens: Tensor, rare: bool = True) -> Tensor:
        hidden = self.embedding(tokens).mean(1)
        if rare:
            hidden = hidden + self.rare
        for layer in self.layers:
            hidden = hidden + torch.tanh(layer(hidden))
        return self.head(self.tied(self.norm(hidden)))


def new_net(dtype: torch.dtype = torch.float32) -> Net:
    torch.manual_seed(0)
    return Net(dtype)


def build(net: Net, fuse: bool, **options) -> MaskedAdamW:
    """Body ranked, head dense."""
    head = list(net.head.named_parameters())
    body = [item for item in net.named_parameters() if not item[0].startswith("head")]
    options = {"budget": 300, "total_steps": 90, "lr": 0.01, "max_grad_norm": 0.5, **options}
    return IncrementalMaskedAdamW(
        [{"params": body}, {"params": head, "unmask": "all"}], fuse_backward=fuse, **options
    )


def loss_of(net: nn.Module, generator: torch.Generator, **options) -> Tensor:
    tokens = torch.randint(60, (8, 6), generator=generator)
    labels = torch.randint(CLASSES, (8,), generator=generator)
    return nn.functional.cross_entropy(net(tokens, **options).float(), labels)


def state_of(optimizer: MaskedAdamW) -> list[Tensor]:
    """All that two runs must have in common."""
    active = optimizer._active
    count = int(active.progress[1])
    names = ("position", "exp_avg", "exp_avg_sq", "unmask_step", "master")
    held = [getattr(active, name)[:count].clone() for name in names]
    work = [optimizer.grad_norm, optimizer._work.grad_factor, optimizer._work.threshold]
    params = [param.detach() for group in optimizer.param_groups for param in group["params"]]
    return [tensor.clone() for tensor in [*held, active.offsets, active.progress, *work, *params]]


def assert_same_state(got: MaskedAdamW, expected: MaskedAdamW, step: int = 0) -> None:
    for number, pair in enumerate(zip(state_of(got), state_of(expected), strict=True)):
        assert_same_bits(*pair, what=f"step {step}, tensor {number}")


def assert_pool_is_free(optimizer: MaskedAdamW) -> None:
    assert all(param.grad is None for param in optimizer._pool)


def backward(net: nn.Module, seed: int = 0, **options) -> None:
    loss_of(net, torch.Generator().manual_seed(seed), **options).backward()

"""A small net with what makes backward passes differ, and optimizers over it."""

from __future__ import annotations

import math

import torch
from op_cases import assert_same_bits
from torch import Tensor, nn

from sparse_optim import IncrementalMaskedAdamW, MaskedAdamW
from sparse_optim.optim.grad_scaler import GradScaler

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


class SmallNet(nn.Module):
    """The same in three tensors, none of them dense, for kernels that are emulated."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.embedding = nn.Embedding(60, 8)
        self.rare = nn.Parameter(torch.randn(8) / 5)
        self.layer = nn.Linear(8, 19, bias=False)
        self.to(dtype)

    def forward(self, tokens: Tensor, rare: bool = True) -> Tensor:
        hidden = self.embedding(tokens).mean(1)
        if rare:
            hidden = hidden + self.rare
        hidden = hidden + torch.tanh(self.layer(hidden))[:, :8]
        return nn.functional.linear(hidden, self.embedding.weight)  # tied


def new_net(dtype: torch.dtype = torch.float32, kind: type[nn.Module] = Net) -> nn.Module:
    torch.manual_seed(0)
    return kind(dtype)


def build(net: nn.Module, fuse: bool, **options) -> MaskedAdamW:
    """Body ranked, head (where there is one) dense."""
    head = [item for item in net.named_parameters() if item[0].startswith("head")]
    body = [item for item in net.named_parameters() if not item[0].startswith("head")]
    options = {"budget": 300, "total_steps": 90, "lr": 0.01, "max_grad_norm": 0.5, **options}
    groups = [{"params": body}, *([{"params": head, "unmask": "all"}] if head else [])]
    return IncrementalMaskedAdamW(groups, fuse_backward=fuse, **options, unmask_steps=1.0)


def loss_of(net: nn.Module, generator: torch.Generator, **options) -> Tensor:
    tokens = torch.randint(60, (8, 6), generator=generator)
    labels = torch.randint(CLASSES, (8,), generator=generator)
    return nn.functional.cross_entropy(net(tokens, **options).float(), labels)


def state_of(optimizer: MaskedAdamW) -> list[Tensor]:
    """All that two runs must have in common: norms and clip factor, too."""
    active, work = optimizer.engine.active, optimizer.engine.work
    count = int(active.progress[1])
    names = ("position", "exp_avg", "exp_avg_sq", "unmask_step", "master")
    held = [getattr(active, name)[:count] for name in names]
    kept = [active.offsets, active.progress, work.new.threshold]
    params = [param.detach() for group in optimizer.param_groups for param in group["params"]]
    every = [work.norms, optimizer.grad_norm, work.scalars.grad_factor, *held, *kept, *params]
    return [tensor.clone() for tensor in every]


def assert_same_state(got: MaskedAdamW, expected: MaskedAdamW, step: int = 0) -> None:
    for number, pair in enumerate(zip(state_of(got), state_of(expected), strict=True)):
        assert_same_bits(*pair, what=f"step {step}, tensor {number}")


def as_on_a_device(optimizer: MaskedAdamW) -> None:
    """Let the host read no counts of candidates, as where it would have to wait for a GPU."""
    candidates = optimizer._fused_backward._candidates
    candidates._on_host, candidates._slots = False, torch.arange(candidates._max_quota)


def train_both(
    dtype: torch.dtype,
    steps: int,
    overflows: tuple[int, ...] = (),
    kind: type[nn.Module] = Net,
    on_device: bool = False,
    **options,
) -> list[MaskedAdamW]:
    """Train with and without, compared after every step; overflows bring loss scaling."""
    nets = [new_net(dtype, kind) for _ in range(2)]
    optimizers = [
        build(net, fuse, **options) for net, fuse in zip(nets, (True, False), strict=True)
    ]
    if on_device:
        as_on_a_device(optimizers[0])
    scalers = [
        GradScaler("cpu", init_scale=256.0, growth_interval=7, enabled=bool(overflows))
        for _ in nets
    ]
    for step in range(steps):
        for net, optimizer, scaler in zip(nets, optimizers, scalers, strict=True):
            loss = loss_of(net, torch.Generator().manual_seed(step), rare=step % 3 == 0)
            scaler.scale(loss * (math.inf if step in overflows else 1.0)).backward()
            if optimizer.fuse_backward:
                assert_pool_is_free(optimizer)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        assert_same_state(*optimizers, step)
        assert scalers[0].get_scale() == scalers[1].get_scale()
    return optimizers


def assert_pool_is_free(optimizer: MaskedAdamW) -> None:
    assert all(param.grad is None for param in optimizer.engine.pool.params)


def backward(net: nn.Module, seed: int = 0, **options) -> None:
    loss_of(net, torch.Generator().manual_seed(seed), **options).backward()

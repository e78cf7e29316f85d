"""A small run that publishes, and models that receive."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from delta_cases import identical
from torch import Tensor, nn

from sparse_optim import D3, Increment, MaskedAdamW
from sparse_optim.delta._fingerprint import fingerprint
from sparse_optim.publish import Manifest, Patch, TensorSpec, WeightPublisher
from sparse_optim.publish._digest import digest_of

STEPS = 12


class Net(nn.Module):
    """Tied weights, a buffer that moves, a head that is trained densely."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words = nn.Embedding(9, 8)
        self.norm = nn.BatchNorm1d(8)
        self.body = nn.Linear(8, 8)
        self.out = nn.Linear(8, 9, bias=False)
        self.out.weight = self.words.weight
        self.head = nn.Linear(9, 3)
        self.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.out(self.body(self.norm(self.words(x))).tanh()))


class Run:
    """A net, its optimizer and publisher.

    Args:
        publisher: further arguments of the publisher.
        options: of the optimizer.
    """

    def __init__(
        self,
        dtype: torch.dtype = torch.float32,
        publisher: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> None:
        self.net = Net(dtype)
        named = list(self.net.named_parameters())
        groups: list[dict[str, Any]] = [
            {"params": [(n, p) for n, p in named if not n.startswith("head")]},
            {"params": [(n, p) for n, p in named if n.startswith("head")], "unmask": "all"},
        ]
        given = {"importance": D3(), "selection": Increment(60, STEPS, unmask_steps=8)}
        self.optimizer = MaskedAdamW(groups, lr=0.05, **{**given, **options})
        self.publisher = WeightPublisher(self.optimizer, self.net, **(publisher or {}))
        self.taken = 0

    def step(self) -> None:
        """Train once."""
        words = torch.randint(9, (6,), generator=torch.Generator().manual_seed(self.taken))
        self.net(words).float().square().mean().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.taken += 1

    def next(self) -> Patch:
        """Train once and publish."""
        self.step()
        return self.publisher.patch()


def states(net: nn.Module | Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A copy of the tensors by name."""
    found = net.state_dict() if isinstance(net, nn.Module) else net
    return {name: tensor.clone() for name, tensor in found.items()}


def assert_same(
    first: nn.Module | Mapping[str, Tensor], second: nn.Module | Mapping[str, Tensor]
) -> None:
    """Bit for bit."""
    one, other = states(first), states(second)
    assert one.keys() == other.keys()
    for name in one:
        if one[name].is_floating_point():
            assert identical(one[name], other[name]), name
        else:
            assert torch.equal(one[name], other[name]), name


def whole_patch(
    version: int,
    base: Mapping[str, Tensor],
    changes: Mapping[str, tuple[Tensor, Tensor]],
    key: bytes | None = None,
) -> Patch:
    """A whole patch of given positions and values over the tensors in `base`."""
    manifest = Manifest(
        tuple(
            TensorSpec(name, tuple(tensor.shape), tensor.dtype, fingerprint(tensor))
            for name, tensor in base.items()
        ),
        (),
        (),
        {},
    )
    empty = torch.empty(0, dtype=torch.int64)
    given = [changes.get(name, (empty, base[name].new_empty(0))) for name in base]
    patch = Patch(
        run="by hand",
        version=version,
        digest="",
        parent=manifest.digest,
        new=torch.tensor([position.numel() for position, _ in given], dtype=torch.int32),
        position=torch.cat([position for position, _ in given]).int(),
        value=torch.cat([value.view(torch.uint8) for _, value in given]),
        dense=torch.empty(0, dtype=torch.uint8),
        manifest=manifest,
    )
    return signed(patch, key)


def signed(patch: Patch, key: bytes | None = None) -> Patch:
    """A whole patch with the digest of its contents."""
    return replace(patch, digest=digest_of(patch, key))


BASE = {"a": torch.zeros(3, 4), "b": torch.ones(5)}


def change(positions: list[int], value: float = 7.0) -> tuple[Tensor, Tensor]:
    """The same value at some positions."""
    return torch.tensor(positions), torch.full((len(positions),), value)

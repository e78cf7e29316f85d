"""The adapters by name. Their functions are imported on use: names and help need no torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sparse_optim._lazy import on_call

if TYPE_CHECKING:
    from torch import nn

DEFAULT_RATE = 2e-3  # as the rates of `methods`: the best of LoRA on MiniLM


@dataclass(frozen=True)
class AdapterRequest:
    """What to attach to a model.

    Args:
        rank: rank of LoRA or DoRA, width of the bottleneck; 0 for kinds without a rank.
        whole: names of modules to train whole.
        alpha: LoRA and DoRA scale the product of A and B by alpha / rank. None: 2 rank.
        targets: names, or ends of names, of the Linear modules for LoRA or DoRA. Empty: all.
    """

    rank: int
    whole: list[str]
    alpha: float | None = None
    targets: tuple[str, ...] = ()


@dataclass(frozen=True)
class Adapter:
    """A kind of adapter.

    Args:
        attach: (model, request) -> the adapted model.
        rank: the default; None if this kind has no rank.
        about: a description for the help.
        places: whether `--adapter-alpha` and `--adapter-targets` apply to it.
    """

    attach: Callable[[nn.Module, AdapterRequest], nn.Module]
    rank: int | None
    about: str
    places: bool = False


def _kind(name: str, rank: int | None, about: str, places: bool = False) -> Adapter:
    return Adapter(on_call("sparse_optim.finetune.adapters", name), rank, about, places)


ADAPTERS = {
    "lora": _kind("lora", 8, "LoRA on all Linear modules, alpha = 2 rank", places=True),
    "dora": _kind("dora", 8, "LoRA with magnitudes (DoRA)", places=True),
    "ia3": _kind("ia3", None, "(IA)3 scaling vectors"),
    "pfeiffer": _kind("pfeiffer", 64, "bottleneck after each feed-forward block"),
    "houlsby": _kind("houlsby", 64, "bottlenecks after attention and feed-forward of each layer"),
}

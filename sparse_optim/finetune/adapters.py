"""Adapters of a job: put one on the base model, save it as what it is."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from sparse_optim.finetune.errors import FinetuneError
from sparse_optim.integrations.adapters import adapter_groups
from sparse_optim.integrations.bottleneck import add_bottlenecks, save_bottlenecks
from sparse_optim.integrations.peft_package import import_peft

DEFAULT_RATE = 5e-4  # dense adapters, too, want ten times the rate of full fine-tuning


@dataclass(frozen=True)
class Adapter:
    """A kind of adapter.

    Args:
        attach: (model, rank, names of modules to train whole) -> adapted model.
        rank: the default; None where there is no rank.
        about: for the help.
    """

    attach: Callable[[nn.Module, int, list[str]], nn.Module]
    rank: int | None
    about: str


def lora(model: nn.Module, rank: int, whole: list[str], **options: Any) -> nn.Module:
    """LoRA on every Linear that is not trained whole, scaling 2."""
    peft = import_peft()
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    # The output layer of a language model is as large as its embeddings, and often tied to them.
    output = getattr(model, "get_output_embeddings", lambda: None)()
    targets = [
        name
        for name in linear
        if name not in whole and (output is None or model.get_submodule(name) is not output)
    ]
    config = peft.LoraConfig(
        r=rank,
        lora_alpha=2 * rank,
        target_modules=targets,
        modules_to_save=whole or None,
        **options,
    )
    return peft.get_peft_model(model, config)


def dora(model: nn.Module, rank: int, whole: list[str]) -> nn.Module:
    """LoRA, and a magnitude for each row of the base's weights."""
    return lora(model, rank, whole, use_dora=True)


def ia3(model: nn.Module, rank: int, whole: list[str]) -> nn.Module:
    """(IA)3 where peft places it in this architecture."""
    peft = import_peft()
    return peft.get_peft_model(model, peft.IA3Config(modules_to_save=whole or None))


def pfeiffer(model: nn.Module, rank: int, whole: list[str]) -> nn.Module:
    """A bottleneck after each feed-forward block."""
    add_bottlenecks(model, rank)
    for name in whole:
        model.get_submodule(name).requires_grad_(True)
    return model


ADAPTERS = {
    "lora": Adapter(lora, 8, "LoRA on all Linear modules, alpha = 2 rank"),
    "dora": Adapter(dora, 8, "LoRA with magnitudes (DoRA)"),
    "ia3": Adapter(ia3, None, "(IA)3 scaling vectors"),
    "pfeiffer": Adapter(pfeiffer, 64, "bottleneck after each feed-forward block"),
}


def attach_adapter(
    model: nn.Module, kind: str, rank: int | None, fresh: frozenset[str]
) -> tuple[Any, frozenset[str]]:
    """The adapted model, its base frozen, and the names of parameters to train densely.

    The model is a PeftModel, or with bottlenecks the one given. Modules that own a fresh
    parameter are trained whole.

    Raises:
        FinetuneError: peft is missing, or has no place for this adapter in the architecture.
    """
    whole = sorted({name.rpartition(".")[0] for name in fresh})
    if "" in whole:
        raise FinetuneError("--adapter cannot train a parameter of the model itself: see --dense")
    try:
        with warnings.catch_warnings():
            # peft asks transformers for a name that transformers deprecates.
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
            adapted = ADAPTERS[kind].attach(model, rank or ADAPTERS[kind].rank or 0, whole)
    except (ModuleNotFoundError, ValueError) as error:
        raise FinetuneError(f"--adapter {kind}: {error}") from error
    dense = [group["params"] for group in adapter_groups(adapted) if group["unmask"] == "all"]
    return adapted, frozenset(name for params in dense for name, _ in params)


def save_adapter(model: nn.Module, folder: Path) -> None:
    """Write the adapter: peft's own files, or those of `save_bottlenecks`."""
    if hasattr(model, "peft_config"):
        # Embeddings are trained only as modules_to_save; "auto" would ask the hub about them.
        model.save_pretrained(str(folder), save_embedding_layers=False)  # type: ignore[operator]
    else:
        save_bottlenecks(model, folder)

"""Put an adapter on the base model, and save it in its own format."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from torch import nn

from sparse_optim.finetune.adapter_kinds import ADAPTERS, AdapterRequest
from sparse_optim.finetune.errors import FinetuneError
from sparse_optim.integrations.adapters import adapter_groups
from sparse_optim.integrations.bottleneck import Placement, add_bottlenecks, save_bottlenecks
from sparse_optim.integrations.peft_package import import_peft, in_transformers


def lora(model: nn.Module, request: AdapterRequest, **options: Any) -> nn.Module:
    """Put LoRA on the requested Linear modules, or on all that are not trained whole."""
    peft = import_peft()
    config = peft.LoraConfig(
        r=request.rank,
        lora_alpha=2 * request.rank if request.alpha is None else request.alpha,
        target_modules=lora_targets(model, request),
        modules_to_save=request.whole or None,
        **options,
    )
    adapted: nn.Module = peft.get_peft_model(model, config)
    return adapted


def lora_targets(model: nn.Module, request: AdapterRequest) -> list[str]:
    """Names of the Linear modules that get an adapter.

    Raises:
        ValueError: no Linear module's name ends in a target.
    """
    # The output layer of a language model is as large as its embeddings, and often tied to them.
    output = getattr(model, "get_output_embeddings", lambda: None)()
    linear = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name not in request.whole and module is not output
    ]
    for target in request.targets:
        if not any(f".{name}".endswith(f".{target}") for name in linear):
            ends = ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in linear))
            raise ValueError(
                f"--adapter-targets: no Linear module's name ends in {target!r}; they end in {ends}"
            )
    ends_asked_for = tuple(f".{target}" for target in request.targets) or ("",)
    return [name for name in linear if f".{name}".endswith(ends_asked_for)]


def dora(model: nn.Module, request: AdapterRequest) -> nn.Module:
    """Put DoRA on the model: LoRA, and a magnitude for each row of the base's weights."""
    return lora(model, request, use_dora=True)


def ia3(model: nn.Module, request: AdapterRequest) -> nn.Module:
    """Put (IA)3 where peft places it in this architecture."""
    peft = import_peft()
    config = peft.IA3Config(modules_to_save=request.whole or None)
    adapted: nn.Module = peft.get_peft_model(model, config)
    return adapted


def pfeiffer(model: nn.Module, request: AdapterRequest) -> nn.Module:
    """Put a bottleneck after each feed-forward block."""
    return bottlenecks(model, request, "pfeiffer")


def houlsby(model: nn.Module, request: AdapterRequest) -> nn.Module:
    """Put a bottleneck after each attention and after each feed-forward block."""
    return bottlenecks(model, request, "houlsby")


def bottlenecks(model: nn.Module, request: AdapterRequest, placement: Placement) -> nn.Module:
    """Put bottlenecks there; modules that are trained whole stay trainable."""
    add_bottlenecks(model, request.rank, placement=placement)
    for name in request.whole:
        model.get_submodule(name).requires_grad_(True)
    return model


def attach_adapter(
    model: nn.Module,
    kind: str,
    rank: int | None,
    fresh: frozenset[str],
    alpha: float | None = None,
    targets: tuple[str, ...] = (),
) -> tuple[Any, frozenset[str]]:
    """Adapt a model and freeze its base; return it with the names of parameters to train densely.

    Returns a PeftModel, or for bottlenecks the given model. Modules that own a fresh parameter are
    trained whole.

    Raises:
        FinetuneError: peft is missing, or does not know where to put the adapter in this model.
    """
    whole = sorted({name.rpartition(".")[0] for name in fresh})
    if "" in whole:
        raise FinetuneError(
            "--adapter cannot train a parameter that the model itself owns: change --dense"
        )
    try:
        with warnings.catch_warnings():
            # peft asks transformers for a name that transformers deprecates.
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
            request = AdapterRequest(rank or ADAPTERS[kind].rank or 0, whole, alpha, targets)
            adapted = ADAPTERS[kind].attach(model, request)
    except (ModuleNotFoundError, ValueError) as error:
        raise FinetuneError(f"--adapter {kind}: {error}") from error
    dense = [group["params"] for group in adapter_groups(adapted) if group["unmask"] == "all"]
    return adapted, frozenset(name for params in dense for name, _ in params)


def save_adapter(model: nn.Module, folder: Path) -> None:
    """Write the adapter with peft, or with `save_bottlenecks`."""
    if hasattr(model, "peft_config"):
        base = model.get_base_model()  # type: ignore[operator]
        if not in_transformers(base):
            # `AutoModelFor...` would put the adapter on the standard class of the base's files:
            # with this configuration beside it, it says that the class is another.
            base.config.save_pretrained(folder)
        # Embeddings are trained only as modules_to_save; "auto" would ask the hub about them.
        model.save_pretrained(str(folder), save_embedding_layers=False)  # type: ignore[operator]
    else:
        save_bottlenecks(model, folder)

"""Find the adapter's parameters in an adapted model, and group them for the optimizer.

A module that holds adapter weights names them in `adapter_layer_names`: peft's convention, which
our bottleneck follows, so that nothing here imports peft. The weights and their initial values:

    LoRA    lora_A random, lora_B zero
    DoRA    as LoRA, and lora_magnitude_vector = the norms of the base's rows
    (IA)3   ia3_l one
    bottleneck (Pfeiffer)    down and up random, their biases zero

`modules_to_save` (a fresh head) is not part of the adapter: it is trained whole.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

# A product with these replaces a sum: zero switches the feature off, it does not prune the adapter.
MULTIPLIERS = ("lora_magnitude_vector", "ia3_l")


def adapter_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters of the adapters in `model`, trainable or not, by their names in the model."""
    held: set[int] = set()
    for module in model.modules():
        if hasattr(module, "original_module"):  # peft's wrapper of a module that is trained whole
            continue
        for attribute in getattr(module, "adapter_layer_names", ()):
            weights = getattr(module, attribute, None)
            if isinstance(weights, nn.Module):
                held.update(id(param) for param in weights.parameters())
            elif isinstance(weights, nn.Parameter):
                held.add(id(weights))
    return {name: param for name, param in model.named_parameters() if id(param) in held}


def adapter_groups(model: nn.Module) -> list[dict[str, Any]]:
    """Param groups of an adapted model, for `IncrementalMaskedAdamW` and `MaskedAdamW`.

    The adapter's entries are ranked (`unmask="rank"`). Everything else that requires a gradient
    (`modules_to_save`, a head, biases under LoRA's `bias=`) is trained densely (`unmask="all"`),
    outside the budget. The base, which requires no gradient, is in no group and keeps its bits.

    Args:
        model: a `peft.PeftModel`, a model with adapters injected by peft, or one with
            `add_bottlenecks`.

    Returns:
        One or two groups of named parameters; add "lr" and other options to them as you like.

    Raises:
        ValueError: the model has no adapter layers, or none of their weights is trainable.

    Examples:
        ```python
        model = get_peft_model(base, LoraConfig(r=8, modules_to_save=["classifier"]))
        optimizer = IncrementalMaskedAdamW(adapter_groups(model), budget=0.1, total_steps=1000)
        ```

    Reference: Agarwal et al. 2025, TACL 13:1767-1788, section 5 (ID3 on LoRA and adapters).
    """
    adapter = adapter_parameters(model)
    if not adapter:
        raise ValueError(
            f"{type(model).__name__} has no adapter layers: use peft.get_peft_model (LoRA, DoRA, "
            "(IA)3, ...; prompt methods have none) or sparse_optim.integrations.add_bottlenecks"
        )
    trainable = [(name, param) for name, param in model.named_parameters() if param.requires_grad]
    ranked = [(name, param) for name, param in trainable if name in adapter]
    if not ranked:
        raise ValueError(
            "no adapter weight requires a gradient: load the adapter with "
            "PeftModel.from_pretrained(..., is_trainable=True), or activate it by set_adapter"
        )
    whole = [(name, param) for name, param in trainable if name not in adapter]
    groups: list[dict[str, Any]] = [{"params": ranked, "unmask": "rank"}]
    return [*groups, {"params": whole, "unmask": "all"}] if whole else groups


@torch.no_grad()
def zero_inactive_(model: nn.Module, active: Mapping[str, Tensor]) -> int:
    """Set every entry of the adapter that is not active to zero, in place.

        param.flat[i] <- 0 for every i that is not in active[name]

    SparseAdapter does this once, BEFORE training. We do not by default: an entry that is not
    unmasked keeps its initial value. A call after training changes what the model computes:
    evaluate again. A delta does not record it: to rebuild the model, zero the same entries of a
    fresh adapter before or after applying the delta, which only has active entries. Between steps,
    call `optimizer.refresh()` after it, so that `delta()` accepts these writes.

    Args:
        model: as for `adapter_groups`.
        active: flat positions by parameter name: `optimizer.active_entries()`, or
            `{name: values.position for name, values in delta.sparse.items()}`. A tensor without
            an item has no active entry.

    Returns:
        Number of entries set to zero.

    Raises:
        ValueError: `active` names a parameter that is not the adapter's, or the adapter multiplies
            (DoRA's magnitudes, (IA)3): zero would switch features off. The model is unchanged.

    Reference: He et al. 2022, SparseAdapter, Findings of EMNLP, section 3.
    """
    params = adapter_parameters(model)
    strange = active.keys() - params.keys()
    if strange:
        raise ValueError(f"active: {min(strange)!r} is not a parameter of the model's adapter")
    for name in params:
        factor = next((part for part in MULTIPLIERS if part in name), None)
        if factor is not None:
            raise ValueError(
                f"{name}: {factor} multiplies the base's output, so zeroing it switches "
                "features off; zero_inactive_ is for LoRA and bottleneck adapters"
            )
    zeroed = 0
    for name, param in params.items():
        inactive = torch.ones(param.numel(), dtype=torch.bool, device=param.device)
        inactive[active.get(name, torch.empty(0)).long().to(param.device)] = False
        param.masked_fill_(inactive.view(param.shape), 0)
        zeroed += int(inactive.sum())
    return zeroed

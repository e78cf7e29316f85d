"""A delta as a SHiRA adapter: sparse differences that peft adds to the base's Linear weights.

    weight <- base + sparse(shira_indices, shira_weight),    shira_weight = trained - base

For a Linear of n inputs and m outputs peft stores exactly r * (m + n) entries, r being the same in
all layers: we choose the smallest r that fits every layer and fill up with zeros. An entry takes 12
bytes (two int32 indices, a float32 value). Modules that SHiRA cannot express (embeddings, norms,
Linears with a changed bias) can be stored whole, as peft's `modules_to_save`.

Reference: Bhardwaj et al. 2024, Sparse High Rank Adapters, NeurIPS; peft's ShiraConfig.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from sparse_optim.delta import Delta, DeltaError, SparseValues, merge
from sparse_optim.delta._names import match_names, renamed
from sparse_optim.files import replacing
from sparse_optim.integrations.peft_package import base_class, import_peft

WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."  # of every name in a peft file
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
SHOWN = 3  # modules that a message names


@dataclass(frozen=True)
class ShiraExport:
    """The result of `export_shira`.

    Attributes:
        r: r of the ShiraConfig.
        layers: Linear modules with sparse entries.
        entries: number of changed entries in them.
        stored: number of entries in the file, with the zeros that fill up each layer to
            r * (m + n).
        whole: modules stored whole.
    """

    r: int
    layers: tuple[str, ...]
    entries: int
    stored: int
    whole: tuple[str, ...]


def export_shira(
    delta: Delta,
    base: nn.Module,
    folder: str | os.PathLike[str],
    *,
    r: int | None = None,
    allow_whole: bool = False,
) -> ShiraExport:
    """Write a delta as a peft adapter folder (adapter_config.json, adapter_model.safetensors).

    `PeftModel.from_pretrained(base, folder)` then computes what base + delta computes, up to the
    rounding of base + (trained - base). Modules with dense tensors in the delta (a fresh head)
    are stored whole.

    Args:
        delta: a delta over a plain model. Over an adapter, use `PeftModel.save_pretrained` instead.
        base: the model that was fine-tuned, of the same class; it is not changed.
        folder: must not exist, or be empty. It appears whole or not at all.
        r: r of the ShiraConfig (default: the smallest that fits every layer).
        allow_whole: store modules that SHiRA cannot express whole, instead of raising an error.

    Raises:
        DeltaError: another base, an increment, tied weights, a module that needs `allow_whole`, an
            r that is too small, nothing for SHiRA to hold. Nothing is written.
        ModuleNotFoundError: peft is not installed.
    """
    peft = import_peft()
    out = Path(folder)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise DeltaError(f"{out}: expected a new or empty folder: choose another name")
    if any(name.startswith(PREFIX) for name in (*delta.sparse, *delta.dense)):
        raise DeltaError(
            "this delta is over a peft adapter: apply it to the adapted model, and save that by "
            "PeftModel.save_pretrained"
        )
    delta = renamed(delta, match_names(delta, base.state_dict(), live=True))
    merged = merge(delta, base.state_dict())
    modules = dict(base.named_modules())
    changed = _changed_modules(delta, modules)
    _check_tied(base, changed)
    r, layers = _layers(delta, modules, changed, r, allow_whole)
    whole = sorted(changed.keys() - set(layers))
    _check_names(modules, layers, whole)
    tensors: dict[str, Tensor] = {}
    for name in layers:
        values, weight = delta.sparse[f"{name}.weight"], modules[name].get_parameter("weight")
        tensors |= _shira_tensors(PREFIX + name, values, weight, r)
    for key in (f"{name}.{part}" for name in whole for part in modules[name].state_dict()):
        tensors[PREFIX + key] = merged[key].detach().cpu().contiguous()
    config = peft.ShiraConfig(
        r=r,
        target_modules=layers,
        modules_to_save=whole or None,
        base_model_name_or_path=getattr(base, "name_or_path", None) or None,
        inference_mode=True,
        auto_mapping=base_class(base),
    )
    _write(config, tensors, out)
    return ShiraExport(
        r=r,
        layers=tuple(layers),
        entries=sum(delta.sparse[f"{name}.weight"].num_entries for name in layers),
        stored=sum(r * sum(_shape(modules[name])) for name in layers),
        whole=tuple(whole),
    )


def _changed_modules(delta: Delta, modules: Mapping[str, nn.Module]) -> dict[str, set[str]]:
    """Names of the changed tensors, by the module that owns them."""
    changed: dict[str, set[str]] = {}
    names = [name for name, values in delta.sparse.items() if values.num_entries]
    for name in (*names, *delta.dense):
        owner = name.rpartition(".")[0]
        if not owner or owner not in modules:
            raise DeltaError(
                f"{name!r}: the base has no module {owner!r}: load the class that was fine-tuned"
            )
        if next(modules[owner].children(), None) is not None:
            raise DeltaError(
                f"{name!r} belongs to {owner!r}, which holds further modules: peft can neither "
                "adapt it nor store it alone"
            )
        changed.setdefault(owner, set()).add(name)
    return changed


def _check_tied(base: nn.Module, changed: Mapping[str, Collection[str]]) -> None:
    """Raise DeltaError if a changed tensor belongs to two modules: peft would untie them."""
    names: dict[int, list[str]] = {}
    for name, param in base.named_parameters(remove_duplicate=False):
        names.setdefault(id(param), []).append(name)
    for tied in names.values():
        if len(tied) > 1 and any(name in group for group in changed.values() for name in tied):
            raise DeltaError(
                f"{' and '.join(map(repr, tied))} are tied, and a peft adapter would change only "
                "one of them: fine-tune with them in an unmask='none' group, or merge the delta "
                "(sparse-optim apply)"
            )


def _layers(
    delta: Delta,
    modules: Mapping[str, nn.Module],
    changed: Mapping[str, Collection[str]],
    r: int | None,
    allow_whole: bool,
) -> tuple[int, list[str]]:
    """r, and the modules that become SHiRA layers; the other changed ones are stored whole."""
    obstacles = {
        name: _obstacle(modules[name], delta, keys)
        for name, keys in sorted(changed.items())
        if not any(key in delta.dense for key in keys)
    }
    needs = {
        name: _smallest_r(modules[name], delta, name)
        for name, found in obstacles.items()
        if found is None
    }
    if not needs:
        raise DeltaError(
            "SHiRA stores only changed entries of Linear weights, and there are none "
            f"({_listed(obstacles)}): fine-tune with only such weights in the pool, or merge the "
            "delta (sparse-optim apply)"
        )
    largest = max(needs, key=lambda name: needs[name])
    r = needs[largest] if r is None else r
    if r < needs[largest]:
        raise DeltaError(f"r={r} is too small: {largest} needs r={needs[largest]}")
    for name in needs:
        if r > _largest_r(modules[name]):
            obstacles[name] = f"holds at most r={_largest_r(modules[name])}, and r is {r}"
    refused = {name: found for name, found in obstacles.items() if found is not None}
    if refused and not allow_whole:
        raise DeltaError(_refusal(refused, modules))
    layers = [name for name in needs if name not in refused]
    if not layers:
        raise DeltaError(f"r={r} is larger than any layer allows: leave out r")
    return r, layers


def _obstacle(module: nn.Module, delta: Delta, keys: Collection[str]) -> str | None:
    """Why SHiRA cannot express the changes of a module, or None."""
    if not isinstance(module, nn.Linear):
        kind = type(module).__name__
        return f"{'an' if kind[0] in 'AEIOU' else 'a'} {kind}, not a Linear"
    (key, *others) = keys
    if others or not key.endswith(".weight"):
        return "its bias changed"
    if module.weight.dtype not in FLOATS:
        return f"its weight is {module.weight.dtype}"
    if _smallest_r(module, delta, key.removesuffix(".weight")) > _largest_r(module):
        return f"too small for its {delta.sparse[key].num_entries} changed entries"
    return None


def _smallest_r(linear: nn.Module, delta: Delta, name: str) -> int:
    """The smallest r with r * (m + n) >= the changed entries."""
    return -(-delta.sparse[f"{name}.weight"].num_entries // sum(_shape(linear)))


def _shape(linear: nn.Module) -> tuple[int, int]:
    """Outputs and inputs of a Linear."""
    outputs, inputs = linear.get_parameter("weight").shape
    return outputs, inputs


def _largest_r(linear: nn.Module) -> int:
    """The largest r with r * (m + n) <= m * n."""
    outputs, inputs = _shape(linear)
    return int(outputs * inputs // (outputs + inputs))


def _refusal(refused: Mapping[str, str], modules: Mapping[str, nn.Module]) -> str:
    entries = sum(param.numel() for name in refused for param in modules[name].parameters())
    return (
        f"SHiRA stores only changed entries of Linear weights, not those of {len(refused)} modules "
        f"({_listed(refused)}). Store these whole ({entries} entries; allow_whole=True, --whole), "
        "or fine-tune with them in an unmask='none' group"
    )


def _listed(reasons: Mapping[str, str | None]) -> str:
    listed = "; ".join(f"{name}: {why}" for name, why in list(reasons.items())[:SHOWN])
    return listed + (f"; {len(reasons) - SHOWN} more" if len(reasons) > SHOWN else "")


def _check_names(
    modules: Mapping[str, nn.Module], layers: Collection[str], whole: Collection[str]
) -> None:
    """Raise if peft, which matches ends of names, would adapt a further module."""
    for wanted, dot in ((layers, "."), (whole, "")):
        for end in wanted:
            for name in modules:
                if name not in wanted and name.endswith(dot + end):
                    raise DeltaError(f"peft would take {name!r} for {end!r}: merge the delta")


def _shira_tensors(name: str, values: SparseValues, weight: Tensor, r: int) -> dict[str, Tensor]:
    """A layer's values, (count,), float32, and indices (row, column), (2, count), int32, ascending;
    count = r * (m + n). The first unchanged entries, with zeros, fill it up."""
    count, columns = r * sum(weight.shape), weight.shape[1]
    unchanged = torch.ones(weight.numel(), dtype=torch.bool)
    unchanged[values.position] = False
    filling = unchanged.nonzero().view(-1)[: count - values.num_entries]
    base = weight.detach().cpu().reshape(-1)[values.position]
    difference = values.value.double() - base.double()
    position, order = torch.cat([values.position, filling]).sort()
    padded = torch.cat([difference.float(), torch.zeros(filling.numel())])[order]
    indices = torch.stack([position // columns, position % columns]).to(torch.int32)
    return {f"{name}.shira_weight": padded, f"{name}.shira_indices": indices}


def _write(config: Any, tensors: dict[str, Tensor], out: Path) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    with replacing(out) as temporary:
        config.save_pretrained(str(temporary))
        save_file(tensors, temporary / WEIGHTS, {"format": "pt"})

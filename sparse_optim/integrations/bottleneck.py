"""Bottleneck adapters, one in each layer, after the feed-forward block (Pfeiffer's placement).

    output <- output + up(relu(down(output)))        down: width -> rank, up: rank -> width

The base keeps its modules and names; the adapter of Linear "x" is the submodule "x.adapter". The
package `adapters` has more kinds, but needs transformers 4.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sparse_optim.integrations.adapters import adapter_parameters

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
INIT_STD = 0.02  # of the weights, as in BERT and the package `adapters`

# Ends of the names of output projections of feed-forward blocks: BERT and similar models,
# DistilBERT, Llama and similar models, OPT and BART, T5, GPT-NeoX.
OUTPUT_PROJECTIONS = (
    *("output.dense", "ffn.lin2", "mlp.down_proj", "fc2", "DenseReluDense.wo", "dense_4h_to_h"),
)
ATTENTION_OUTPUT = "attention.output.dense"  # BERT's other "output.dense"


class BottleneckAdapter(nn.Module):
    """x + up(relu(down(x))), weights drawn from N(0, 0.02^2), biases zero.

    Args:
        width: features of x.
        rank: features of the bottleneck, >= 1.
        like: gives dtype and device.

    Reference: Houlsby et al. 2019, ICML; placement: Pfeiffer et al. 2021, AdapterFusion, EACL.
        Differences: x is the projection's output before dropout, residual and norm, where the
        package `adapters` feeds the normalised sum.
    """

    adapter_layer_names = ("down", "up")

    def __init__(self, width: int, rank: int, like: Tensor) -> None:
        super().__init__()
        self.down = nn.Linear(width, rank, dtype=like.dtype, device=like.device)
        self.up = nn.Linear(rank, width, dtype=like.dtype, device=like.device)
        for layer in (self.down, self.up):
            nn.init.normal_(layer.weight, std=INIT_STD)
            nn.init.zeros_(layer.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        """Map hidden, (..., width), to the same shape."""
        output: Tensor = hidden + self.up(torch.relu(self.down(hidden)))
        return output


def add_bottlenecks(
    model: nn.Module, rank: int, target_modules: Iterable[str] = OUTPUT_PROJECTIONS
) -> list[str]:
    """Put an adapter after each output projection of a feed-forward block, and freeze the base.

    A head is frozen as well: set `requires_grad_(True)` on it afterwards to train it.

    Args:
        model: changed in place.
        rank: features of the bottleneck, >= 1.
        target_modules: names, or ends of names, of Linear modules.

    Returns:
        Names of the modules that now have an adapter.

    Raises:
        ValueError: a rank below 1, no Linear with such a name, or the model has adapters. The
            model is unchanged.
    """
    ends = tuple(target_modules)
    if rank < 1:
        raise ValueError(f"rank must be at least 1, got {rank}")
    if any(isinstance(module, BottleneckAdapter) for module in model.modules()):
        raise ValueError("the model has bottleneck adapters already; start from the base")
    found = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and any(name == end or name.endswith("." + end) for end in ends)
        and (name in ends or not name.endswith(ATTENTION_OUTPUT))
    }
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no Linear with a name that ends in {', '.join(ends)}: set "
            "target_modules to the output projections of its feed-forward blocks"
        )
    model.requires_grad_(False)
    for module in found.values():
        module.add_module("adapter", BottleneckAdapter(module.out_features, rank, module.weight))
        module.register_forward_hook(_add_adapter)
    return list(found)


def save_bottlenecks(model: nn.Module, folder: str | os.PathLike[str]) -> None:
    """Write the adapters, and every other trainable parameter (a head), to a folder.

    Raises:
        ValueError: the model has no bottleneck adapters.
    """
    held = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, BottleneckAdapter)
    }
    if not held:
        raise ValueError("the model has no bottleneck adapters; see add_bottlenecks")
    adapter = adapter_parameters(model)
    tensors = {
        name: param.detach().contiguous()
        for name, param in model.named_parameters()
        if name in adapter or param.requires_grad
    }
    config = {
        "adapter_type": "bottleneck",
        "rank": next(iter(held.values())).down.out_features,
        "target_modules": [name.removesuffix(".adapter") for name in held],
    }
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    save_file(tensors, target / WEIGHTS, {"format": "pt"})
    (target / CONFIG).write_text(json.dumps(config, indent=2) + "\n")


def load_bottlenecks(model: nn.Module, folder: str | os.PathLike[str]) -> None:
    """Add the adapters of a folder to their base model, with the saved values, and a saved head.

    As after `add_bottlenecks`, only the adapters are trainable.

    Raises:
        ValueError: another kind of adapter, or names or shapes that the model does not have. The
            model is unchanged.
    """
    config = json.loads((Path(folder) / CONFIG).read_text())
    if config.get("adapter_type") != "bottleneck":
        raise ValueError(f"{folder} holds no bottleneck adapter; for peft's, use PeftModel")
    tensors = load_file(Path(folder) / WEIGHTS)
    widths = {name: m.out_features for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    shapes = {name: tuple(param.shape) for name, param in model.named_parameters()}
    rank = config["rank"]
    for name in config["target_modules"]:
        shapes[f"{name}.adapter.down.weight"] = (rank, widths.get(name, 0))
        shapes[f"{name}.adapter.down.bias"] = (rank,)
        shapes[f"{name}.adapter.up.weight"] = (widths.get(name, 0), rank)
        shapes[f"{name}.adapter.up.bias"] = (widths.get(name, 0),)
    for name, tensor in tensors.items():
        if shapes.get(name) != tuple(tensor.shape):
            raise ValueError(
                f"{folder} does not fit {type(model).__name__}: {name} is {tuple(tensor.shape)} in "
                f"the file, {shapes.get(name, 'not there')} in the model; build the model as it "
                "was trained (for a head: the same number of labels)"
            )
    add_bottlenecks(model, rank, config["target_modules"])
    params = dict(model.named_parameters())
    with torch.no_grad():
        for name, tensor in tensors.items():
            params[name].copy_(tensor)


def _add_adapter(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    adapted: Tensor = module.get_submodule("adapter")(output)
    return adapted

"""Bottleneck adapters: after the feed-forward block of each layer (Pfeiffer's placement), or also
after its attention (Houlsby's placement).

    output <- output + up(relu(down(output)))        down: width -> rank, up: rank -> width

The base keeps its modules and names; the adapter of Linear "x" is the submodule "x.adapter". The
package `adapters` has more kinds, but needs transformers 4.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Literal, cast

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sparse_optim.integrations.adapters import adapter_parameters

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
INIT_STD = 0.02  # of the weights, as in BERT and the package `adapters`

# Ends of the names of output projections of feed-forward blocks: BERT and similar models,
# DistilBERT, Llama and similar models, OPT, BART and ViT, T5, GPT-NeoX.
OUTPUT_PROJECTIONS = (
    *("output.dense", "ffn.lin2", "mlp.down_proj", "fc2", "DenseReluDense.wo", "dense_4h_to_h"),
)
ATTENTION_OUTPUT = "attention.output.dense"  # BERT's other "output.dense"
# Of attention: the same models (and MPNet, Phi); of encoder-decoders also the cross-attention.
ATTENTION_PROJECTIONS = (
    *(ATTENTION_OUTPUT, "crossattention.output.dense", "attention.out_lin", "o_proj"),
    *("encoder_attn.out_proj", "SelfAttention.o", "EncDecAttention.o", "attention.dense"),
    *("self_attn.out_proj", "attn.o", "self_attn.dense"),
)
Placement = Literal["pfeiffer", "houlsby"]
PLACEMENTS: dict[Placement, dict[str, tuple[str, ...]]] = {
    "pfeiffer": {"feed-forward blocks": OUTPUT_PROJECTIONS},
    "houlsby": {
        "feed-forward blocks": OUTPUT_PROJECTIONS,
        "attention": ATTENTION_PROJECTIONS,
    },
}


class BottleneckAdapter(nn.Module):
    """x + up(relu(down(x))), weights drawn from N(0, 0.02^2), biases zero.

    Args:
        width: features of x.
        rank: features of the bottleneck, >= 1.
        like: gives dtype and device.

    Reference: Houlsby et al. 2019, Parameter-Efficient Transfer Learning for NLP, ICML, section 2.1
        and Figure 2; the placement "pfeiffer": Pfeiffer et al. 2021, AdapterFusion, EACL.
        Differences: x is the projection's output before dropout, residual and norm, where the
        package `adapters` feeds the normalised sum for "pfeiffer"; Houlsby et al. also train the
        norms (name them with `--dense`, or set `requires_grad_`), with weights of deviation 0.01.
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
    model: nn.Module,
    rank: int,
    target_modules: Iterable[str] | None = None,
    *,
    placement: Placement = "pfeiffer",
) -> list[str]:
    """Put an adapter after output projections of each layer, and freeze the base.

    A head is frozen as well: set `requires_grad_(True)` on it afterwards to train it.

    Args:
        model: changed in place.
        rank: features of the bottleneck, >= 1.
        target_modules: names, or ends of names, of Linear modules, in place of `placement`.
        placement: "pfeiffer": one adapter a layer, after the feed-forward block; "houlsby": two,
            after attention and after the feed-forward block.

    Returns:
        Names of the modules that now have an adapter.

    Raises:
        ValueError: a rank below 1, no Linear with such a name, or the model has adapters. The
            model is unchanged.
    """
    if rank < 1:
        raise ValueError(f"rank must be at least 1, got {rank}")
    if placement not in PLACEMENTS:
        raise ValueError(f"placement must be one of {', '.join(PLACEMENTS)}, got {placement!r}")
    if any(isinstance(module, BottleneckAdapter) for module in model.modules()):
        raise ValueError("the model has bottleneck adapters already; start from the base")
    groups = PLACEMENTS[placement] if target_modules is None else {"": tuple(target_modules)}
    wanted: set[str] = set()
    for what, ends in groups.items():
        found = _find_linear(model, ends)
        if not found:
            of = f"the output projections of its {what}" if what else "names that it has"
            raise ValueError(
                f"{type(model).__name__} has no Linear with a name that ends in "
                f"{', '.join(ends)}: set target_modules to {of}"
            )
        wanted |= found
    model.requires_grad_(False)
    chosen = [item for item in model.named_modules() if item[0] in wanted]
    for _, module in chosen:
        linear = cast(nn.Linear, module)
        linear.add_module("adapter", BottleneckAdapter(linear.out_features, rank, linear.weight))
        linear.register_forward_hook(_add_adapter)
    return [name for name, _ in chosen]


def _find_linear(model: nn.Module, ends: tuple[str, ...]) -> set[str]:
    """Names of Linear modules that end so; "output.dense" alone does not take BERT's attention."""
    found = set()
    for name, module in model.named_modules():
        fitting = [end for end in ends if f".{name}".endswith(f".{end}")]
        if name.endswith(ATTENTION_OUTPUT):
            fitting = [end for end in fitting if end.endswith(ATTENTION_OUTPUT)]
        if fitting and isinstance(module, nn.Linear):
            found.add(name)
    return found


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

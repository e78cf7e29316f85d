"""Arrange what a delta changes as layers x modules: for tables and pictures. Pure functions."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from sparse_optim.analysis.measures import split_layer
from sparse_optim.delta import Change

Layer = tuple[int, ...]

# Swin and ResNet have blocks in stages, "layers.1.blocks.0": their layer is (1, 0).
NESTED = re.compile(r"^(?:blocks|layers)\.(\d+)\.")
# The experts of a layer are one module, "experts.*".
EXPERT = re.compile(r"(?<![^.])(experts?[._])\d+(?=\.)")
KIND = re.compile(r"\.(weight|bias)$")  # both belong to one module


@dataclass(frozen=True)
class ChangeMap:
    """What a delta changes in a stack of layers.

    Attributes:
        stack: what stands before the layer's number in names, "bert.encoder.layer".
        layers: ascending.
        modules: names without the layer, in the model's order, "attention.self.query".
        cells: by (layer, module); none where the delta has no tensor.
    """

    stack: str
    layers: tuple[Layer, ...]
    modules: tuple[str, ...]
    cells: Mapping[tuple[Layer, str], Change]

    @property
    def total(self) -> Change:
        """Of all layers."""
        return total(self.cells.values())


def change_maps(changes: Mapping[str, Change]) -> tuple[list[ChangeMap], dict[str, Change]]:
    """Arrange changes, by tensor, as one map for each stack of several layers (an encoder and a
    decoder have one each), and the tensors outside such stacks by name.

    The weight and the bias of a module share a cell, and so do all experts of a layer.

    Examples:
        >>> names = ["h.0.mlp.weight", "h.0.mlp.bias", "h.1.mlp.weight", "h.1.mlp.bias"]
        >>> changes = {name: Change(entries, 8) for entries, name in enumerate(names)}
        >>> maps, others = change_maps(changes | {"head.weight": Change(5, 8)})
        >>> maps[0].stack, maps[0].layers, maps[0].modules
        ('h', ((0,), (1,)), ('mlp',))
        >>> maps[0].cells[(1,), "mlp"].share, others["head.weight"].share
        (0.3125, 0.625)
    """
    places = {name: place_of(name) for name in changes}
    layers: dict[str, set[Layer]] = {}
    for stack, layer, _ in places.values():
        if layer:
            layers.setdefault(stack, set()).add(layer)
    maps = []
    for stack, found in layers.items():
        if len(found) < 2:
            continue
        cells: dict[tuple[Layer, str], Change] = {}
        for name, (of, layer, module) in places.items():
            if layer and of == stack:
                before = cells.get((layer, module), Change(0, 0))
                cells[layer, module] = before + changes[name]
        by_layer = [[module for of, module in cells if of == layer] for layer in sorted(found)]
        maps.append(ChangeMap(stack, tuple(sorted(found)), tuple(_in_order(by_layer)), cells))
    mapped = {each.stack for each in maps}
    others = {
        name: change
        for name, change in changes.items()
        if not places[name][1] or places[name][0] not in mapped
    }
    return maps, others


def _in_order(by_layer: Iterable[Sequence[str]]) -> list[str]:
    """The modules of all layers in one order: a delta may lack some of each layer."""
    found: list[str] = []
    for modules in sorted(by_layer, key=len, reverse=True):
        at = 0
        for module in modules:
            if module not in found:
                found.insert(at, module)
            at = found.index(module) + 1
    return found


def place_of(name: str) -> tuple[str, Layer, str]:
    """Stack, layer (empty: in none) and module of a parameter's name.

    Examples:
        >>> place_of("bert.encoder.layer.3.output.dense.bias")
        ('bert.encoder.layer', (3,), 'output.dense')
        >>> place_of("model.layers.0.mlp.experts.17.w1.weight")
        ('model.layers', (0,), 'mlp.experts.*.w1')
        >>> place_of("swin.encoder.layers.2.blocks.5.layernorm_before.weight")
        ('swin.encoder.layers', (2, 5), 'layernorm_before')
        >>> place_of("pooler.dense.weight")
        ('', (), 'pooler.dense')
    """
    stack, layer, module = split_layer(name)
    module = module_of(module)
    if layer is None:
        return "", (), module
    nested = NESTED.match(module)
    if nested is None:
        return stack, (layer,), module or "weight"
    return stack, (layer, int(nested[1])), module[nested.end() :]


def module_of(name: str) -> str:
    """A name without its layer and without ".weight" or ".bias": modules of all layers are one.

    Examples:
        >>> module_of("h.mlp.bias"), module_of("experts.3.w1.weight"), module_of("cls_token")
        ('h.mlp', 'experts.*.w1', 'cls_token')
    """
    return EXPERT.sub(r"\1*", KIND.sub("", name))


def module_name(name: str) -> str:
    """The module of a parameter in all layers, with its stack.

    Examples:
        >>> module_name("bert.encoder.layer.3.output.dense.bias"), module_name("pooler.weight")
        ('bert.encoder.layer.*.output.dense', 'pooler')
    """
    stack, layer, module = place_of(name)
    return ".".join(filter(None, (stack, "*" if layer else "", module)))


def short_names(names: Iterable[str]) -> dict[str, str]:
    """The shortest ends of dotted names that tell them apart.

    Examples:
        >>> short_names(["self.query", "self.output.dense", "output.dense", "mlp.fc"])
        {'self.query': 'query', 'self.output.dense': 'self.output.dense', \
'output.dense': 'output.dense', 'mlp.fc': 'fc'}
    """
    parts = {name: name.split(".") for name in names}
    ends = Counter(".".join(words[at:]) for words in parts.values() for at in range(len(words)))
    short = {}
    for name, words in parts.items():
        unique = [
            end for at in range(len(words) - 1, -1, -1) if ends[end := ".".join(words[at:])] == 1
        ]
        short[name] = unique[0] if unique else name
    return short


def total(changes: Iterable[Change]) -> Change:
    """Several changes added up."""
    return sum(changes, Change(0, 0))

"""Tensor sparsity, sparsity entropy and allocation of a set of active entries. Pure functions."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

LAYER = re.compile(r"(?:^|\.)(\d+)(?:\.|$)")


def tensor_sparsity(counts: Mapping[str, int]) -> float:
    """Share of the tensors that have no active entry.

        |{j : P_j and A are disjoint}| / M

    Args:
        counts: active entries of each of the M tensors.

    Raises:
        ValueError: there is no tensor.

    Examples:
        >>> tensor_sparsity({"a": 3, "b": 0, "c": 0, "d": 1})
        0.5

    Reference: Agarwal et al. 2025, section 6, Figure 8 (defined there as a number, drawn as a
    share).
    """
    if not counts:
        raise ValueError("tensor_sparsity of no tensors; counts is empty")
    return sum(count == 0 for count in counts.values()) / len(counts)


def sparsity_entropy(counts: Mapping[str, int], sizes: Mapping[str, int]) -> float:
    """Entropy, in nats, of how active entries spread over the tensors.

        s_j = |P_j and A| / |P_j|,  q_j = s_j / sum_i s_i,  entropy = -sum_j q_j ln q_j

    0 where one tensor holds all active entries (and where there is none), ln M where every tensor
    has the same share.

    Args:
        counts: active entries of each of the M tensors.
        sizes: entries of each tensor.

    Raises:
        ValueError: counts and sizes have different names, or a count exceeds its size.

    Examples:
        >>> round(sparsity_entropy({"a": 2, "b": 4}, {"a": 10, "b": 20}), 6)
        0.693147

    Reference: Agarwal et al. 2025, section 6, Figure 9 (which names no base of the logarithm).
    """
    if counts.keys() != sizes.keys():
        raise ValueError(f"counts and sizes differ in {sorted(counts.keys() ^ sizes.keys())[:3]}")
    for name, count in counts.items():
        if not 0 <= count <= sizes[name]:
            raise ValueError(f"{name} has {sizes[name]} entries, of which {count} are active")
    shares = [counts[name] / sizes[name] for name in counts if counts[name]]
    total = sum(shares)
    return sum(share / total * math.log(total / share) for share in shares)


@dataclass(frozen=True)
class AllocationGrid:
    """Active entries by module (rows) and layer (columns).

    Attributes:
        modules: names without the number of the layer, in the model's order.
        layers: numbers of the layers, ascending; None, first, is "in no layer".
        active, size: (modules, layers), float64; NaN where there is no such tensor.
    """

    modules: list[str]
    layers: list[int | None]
    active: np.ndarray
    size: np.ndarray


def allocation_grid(counts: Mapping[str, int], sizes: Mapping[str, int]) -> AllocationGrid:
    """Arrange counts as layers x modules; tensors that share a cell are added up.

    The layer is the first number in a name: "encoder.layer.3.output.dense.weight" is module
    "output.dense.weight" of layer 3. Where two stacks have layers, modules keep their stack's name.

    Reference: Agarwal et al. 2025, section 6, Figure 7.
    """
    places = {name: split_layer(name) for name in counts}
    stacks = {stack for stack, layer, _ in places.values() if layer is not None}

    def title(stack: str, module: str) -> str:
        return f"{stack}.*.{module}" if len(stacks) > 1 and stack else module

    cells = {name: (title(stack, module), layer) for name, (stack, layer, module) in places.items()}
    modules = list(dict.fromkeys(module for module, _ in cells.values()))
    found = {layer for _, layer in cells.values()}
    layers = sorted(found, key=lambda layer: -1 if layer is None else layer)
    active = np.full((len(modules), len(layers)), np.nan)
    size = active.copy()
    for name, (module, layer) in cells.items():
        cell = modules.index(module), layers.index(layer)
        active[cell] = np.nan_to_num(active[cell]) + counts[name]
        size[cell] = np.nan_to_num(size[cell]) + sizes[name]
    return AllocationGrid(modules, layers, active, size)


def split_layer(name: str) -> tuple[str, int | None, str]:
    """Stack, layer and module of a parameter's name.

    Examples:
        >>> split_layer("bert.encoder.layer.3.output.dense.bias")
        ('bert.encoder.layer', 3, 'output.dense.bias')
        >>> split_layer("bert.pooler.dense.bias")
        ('', None, 'bert.pooler.dense.bias')
    """
    match = LAYER.search(name)
    if match is None:
        return "", None, name
    return name[: match.start()], int(match[1]), name[match.end() :]

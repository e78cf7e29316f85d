"""Move batches to the model's device, split them into samples, show a progress bar."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor


def map_tensors(batch: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """The batch with `function` applied to its tensors; mappings become plain dicts."""
    if isinstance(batch, Tensor):
        return function(batch)
    if isinstance(batch, Mapping):
        return {name: map_tensors(item, function) for name, item in batch.items()}
    if isinstance(batch, (list, tuple)):
        return [map_tensors(item, function) for item in batch]
    return batch


def on_device(batches: Iterable[Any], device: torch.device) -> Iterator[Any]:
    """The batches, on the device.

    Raises:
        ValueError: there are none.
    """
    empty = True
    for batch in batches:
        empty = False
        yield map_tensors(batch, lambda tensor: tensor.to(device))
    if empty:
        raise ValueError(
            "batches is empty: a calibration pass needs data (an iterator that has been read is "
            "empty as well; give a DataLoader or a list)"
        )


def single_samples(batch: Any) -> Iterator[Any]:
    """The samples of a batch, each as a batch of one.

    Tensors are cut along their first dimension; 0-dim tensors and other values are kept whole.

    Raises:
        ValueError: the tensors have different numbers of samples, or there is no tensor.
    """
    sizes: set[int] = set()

    def note_size(tensor: Tensor) -> Tensor:
        sizes.update(tensor.shape[:1])
        return tensor

    map_tensors(batch, note_size)
    if len(sizes) != 1:
        raise ValueError(
            "cannot split a batch into samples: the first dimensions of its tensors are "
            f"{sorted(sizes)}; expected the number of samples in each"
        )
    for row in range(sizes.pop()):
        yield map_tensors(batch, partial(_cut, row))


def _cut(row: int, tensor: Tensor) -> Tensor:
    return tensor[row : row + 1] if tensor.ndim else tensor


def tracked(items: Iterable[Any], total: int | None, title: str, show: bool) -> Iterator[Any]:
    """Yield the items; show a bar if stderr is a terminal and rich is installed."""
    if not (show and sys.stderr.isatty()):
        yield from items
        return
    try:
        from rich.console import Console
        from rich.progress import track
    except ModuleNotFoundError:
        yield from items
        return
    console = Console(stderr=True)
    yield from track(items, title, total=total, console=console, transient=True)

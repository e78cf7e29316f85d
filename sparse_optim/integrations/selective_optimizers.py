"""Read what the package `selective_optimizers` saves: the toolkit of ID3's authors.

Its `write_summary_to_disk` pickles a dataclass by `torch.save`:

    values       for each of model.parameters(): (k,) values of the chosen entries, or None
    pointers     for each: (k, dimensions) int64 indices of these entries, or None
    shapes       for each: the shape of the parameter, or None
    bn_metadata  for each BatchNorm of model.modules(): running mean, variance, batches seen
    budget_used  chosen entries in all

It has no names and does not say which base it belongs to, so the base model is needed to read it.

Reference: selective-optimizers 0.4 (PyPI, MIT), module load_store.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparse_optim.delta import Delta, DeltaError, SparseValues
from sparse_optim.delta._fingerprint import fingerprint
from sparse_optim.delta._wrappers import plain_names

PICKLED_NAME = "selective_optimizers.load_store.SelectivePeftSummary"
FIELDS = frozenset({"values", "pointers", "shapes", "bn_metadata", "budget_used"})
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)  # those that the toolkit saves
STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


class _Summary:
    """Takes the place of the toolkit's class: only the fields of the file are put into it."""


def read_summary(path: str | os.PathLike[str], model: nn.Module) -> Delta:
    """The delta of a summary, over the model that was fine-tuned.

    Only tensors, numbers and lists are read: no code of the file runs, and the toolkit need not be
    installed.

    Args:
        path: a file that `write_summary_to_disk` wrote.
        model: the base as it was before training, of the same class and in the same dtype. It is
            not changed. The order of its parameters gives names to those of the file; whether the
            values are those of this base, the file does not say.

    Raises:
        DeltaError: no such file, another kind of file, a damaged one, or one of another model.

    Example::

        delta = read_summary("summary.pt", model)
        save_delta(delta, "delta.safetensors")
    """
    fields = _load(Path(path))
    try:
        return _delta_of(fields, model)
    except DeltaError as error:
        raise DeltaError(f"{path}: {error}") from error


def _load(path: Path) -> dict[str, Any]:
    """The fields of the pickled dataclass."""
    if not path.is_file():
        raise DeltaError(f"{path}: no such file")
    try:
        with torch.serialization.safe_globals([(_Summary, PICKLED_NAME)]):
            summary = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file may raise any kind
        # torch's own message advises weights_only=False, which would run the file's code
        raise DeltaError(
            f"{path}: not a summary of selective_optimizers, or damaged, or it holds more than "
            "tensors and numbers"
        ) from error
    if not isinstance(summary, _Summary) or vars(summary).keys() != FIELDS:
        raise DeltaError(f"{path}: not a summary of selective_optimizers")
    return vars(summary)


def _delta_of(fields: dict[str, Any], model: nn.Module) -> Delta:
    named = list(model.named_parameters())
    known = model.named_parameters(remove_duplicate=False)
    plain = plain_names(name for part in (known, model.named_buffers()) for name, _ in part)
    for field in ("values", "pointers", "shapes"):
        _check_list(field, fields[field], len(named), "parameters")
    sparse: dict[str, SparseValues] = {}
    prints: dict[str, str] = {}
    columns = zip(fields["values"], fields["pointers"], fields["shapes"], strict=True)
    for (name, param), (value, pointer, shape) in zip(named, columns, strict=True):
        if shape is not None and shape != param.shape:
            raise DeltaError(
                f"{name}: the file has shape {_short(shape)}, the model {tuple(param.shape)}: give "
                "the model that was fine-tuned"
            )
        if value is None and pointer is None:
            continue
        _check_chosen(name, param, value, pointer)
        if value.numel():
            sparse[plain[name]] = _sparse(name, param, value, pointer)
            prints[plain[name]] = fingerprint(param)
    entries = sum(values.num_entries for values in sparse.values())
    claimed = fields["budget_used"]
    if not isinstance(claimed, int) or claimed != entries:
        raise DeltaError(
            f"it claims {_short(claimed)} entries and has {entries}: damaged, or the "
            "optimizer trained parameters that are not the model's"
        )
    return Delta(
        sparse=sparse,
        dense=_statistics(fields["bn_metadata"], model, plain),
        fingerprints=prints,
        method={"name": "selective_optimizers", "budget_used": entries},
        tied=_tied(model, plain, sparse),
    )


def _sparse(name: str, param: Tensor, value: Tensor, pointer: Tensor) -> SparseValues:
    """The entries in the order of their positions."""
    sizes = torch.tensor(param.shape, dtype=torch.int64)
    outside = (pointer < 0) | (pointer >= sizes)
    if bool(outside.any()):
        wrong = pointer[outside.any(1)][0].tolist()
        raise DeltaError(f"{name}: index {wrong} is outside of its shape {tuple(param.shape)}")
    strides = torch.tensor(torch.empty(param.shape, device="meta").stride(), dtype=torch.int64)
    position, order = (pointer * strides).sum(1).sort()
    twice = position[1:] == position[:-1]
    if bool(twice.any()):
        wrong = pointer[order[1:][twice][0]].tolist()
        raise DeltaError(f"{name}: index {wrong} is there twice")
    return SparseValues(tuple(param.shape), param.dtype, position, value[order])


def _check_chosen(name: str, param: Tensor, value: Any, pointer: Any) -> None:
    """Check kinds and sizes before anything of their size is computed."""
    if not (_is_plain(value) and _is_plain(pointer)):
        raise DeltaError(f"{name}: expected a tensor of values and one of indices: damaged")
    if value.dtype != param.dtype:
        raise DeltaError(
            f"{name}: the file has {value.dtype}, the model {param.dtype}: load the model in the "
            "dtype in which it was fine-tuned"
        )
    count = value.numel()
    if (
        value.dim() != 1
        or count > param.numel()
        or pointer.dtype != torch.int64
        or tuple(pointer.shape) != (count, param.dim())
    ):
        raise DeltaError(
            f"{name}: values of shape {tuple(value.shape)} and indices of shape "
            f"{tuple(pointer.shape)} do not fit a parameter of shape {tuple(param.shape)}: damaged"
        )


def _statistics(saved: Any, model: nn.Module, plain: dict[str, str]) -> dict[str, Tensor]:
    """The buffers of the BatchNorm modules, whole."""
    norms = [item for item in model.named_modules() if isinstance(item[1], BATCH_NORMS)]
    _check_list("bn_metadata", saved, len(norms), "BatchNorm modules")
    found: dict[str, Tensor] = {}
    for (name, module), tensors in zip(norms, saved, strict=True):
        if not isinstance(tensors, dict) or tensors.keys() != set(STATISTICS):
            raise DeltaError(f"{name}: expected {', '.join(STATISTICS)}: damaged")
        for part in STATISTICS:
            here, value = getattr(module, part), tensors[part]
            if (
                here is None
                or not _is_plain(value)
                or (value.shape, value.dtype) != (here.shape, here.dtype)
            ):
                raise DeltaError(f"{name}.{part} does not fit the one of the model")
            key = f"{name}.{part}" if name else part
            found[plain[key]] = value
    return found


def _tied(
    model: nn.Module, plain: dict[str, str], sparse: dict[str, SparseValues]
) -> dict[str, str]:
    """Further names of the parameters that changed."""
    first = {id(param): plain[name] for name, param in model.named_parameters()}
    every = model.named_parameters(remove_duplicate=False)
    names = {plain[name]: first[id(param)] for name, param in every}
    return {alias: name for alias, name in names.items() if alias != name and name in sparse}


def _is_plain(value: Any) -> bool:
    """Whether this is a tensor with data in memory."""
    is_tensor = isinstance(value, Tensor)
    return is_tensor and value.layout is torch.strided and value.device.type == "cpu"


def _check_list(field: str, found: Any, expected: int, of: str) -> None:
    if not isinstance(found, list) or len(found) != expected:
        count = len(found) if isinstance(found, list) else "no list"
        raise DeltaError(
            f"{field}: {count} in the file, and the model has {expected} {of}: give the model that "
            "was fine-tuned, with its head"
        )


def _short(value: Any) -> str:
    """A value of a stranger's file for a message, in one line."""
    shown = repr(tuple(value) if isinstance(value, torch.Size) else value)
    return " ".join(shown.split())[:80]

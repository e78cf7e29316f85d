"""Where a checkpoint's tensors lie in the memory of a model that serves them.

A tensor of the checkpoint is a view of the model's memory: a parameter itself, some rows of a fused
one, a transposed one, every third block of an interleaved one. Entry i of the checkpoint's tensor
(C order) is entry i of the view (C order), and its offset in memory follows from the strides.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor

from sparse_optim.delta._tensors import Model, bits, storage_key, version_of
from sparse_optim.delta._types import plain_tensors
from sparse_optim.publish._manifest import PatchError, TensorSpec

Views = Mapping[str, Tensor | Sequence[Tensor]]
Mark = tuple[int, tuple[int, ...], torch.dtype, int]  # of a view: address, strides, dtype, version


class Target:
    """One view of the model's memory, written entry by entry.

    Args:
        view: any strides; no two entries in one place.
    """

    def __init__(self, view: Tensor) -> None:
        with torch.inference_mode(False):  # or only code in inference mode could write the view
            self.view = view.detach()
            ends = zip(view.shape, view.stride(), strict=True)
            span = sum((size - 1) * stride for size, stride in ends) + 1 if view.numel() else 0
            self.memory = bits(self.view).as_strided((span,), (1,))

    def places(self, position: Tensor) -> Tensor:
        """Where the entries at flat positions, (n,) int32, lie in memory: (n,), int64."""
        position = position.to(self.view.device).long()
        if self.view.is_contiguous():
            return position
        places = torch.zeros_like(position)
        for size, stride in reversed([*zip(self.view.shape, self.view.stride(), strict=True)]):
            places += position % size * stride
            position = position // size
        return places

    def read(self, places: Tensor) -> Tensor:
        """The values there, on the host."""
        return self.memory.gather(0, places).cpu().view(self.view.dtype)

    def write(self, places: Tensor, value: Tensor) -> None:
        """Write values; `view._version` moves."""
        self.memory.scatter_(0, places, bits(value).to(self.view.device))

    def write_whole(self, value: Tensor) -> None:
        """Write every entry."""
        bits(self.view).copy_(bits(value))


class Located:
    """A tensor of the checkpoint in a model.

    Args:
        spec: of the tensor.
        names: its own, and those of tensors tied to it.
        views: the model's.

    Attributes:
        targets: where it lies, more than once if the model has copies.

    Raises:
        PatchError: nowhere, or it does not fit.
    """

    def __init__(self, spec: TensorSpec, names: Sequence[str], views: Views) -> None:
        found: dict[object, Tensor] = {}
        for view in _given(names, views):
            found.setdefault(storage_key(view), view)
        if not found:
            raise PatchError(
                f"{spec.name!r} is not in the model: give WeightReceiver a dict of the "
                "checkpoint's names and the model's tensors, or views of them (runtime_views)"
            )
        for view in found.values():
            _check_fits(spec, view)
        self.spec, self._names = spec, names
        self.targets = [Target(view) for view in found.values()]
        self.note(views)

    def anew(self, views: Views) -> Located:
        """The same tensor in what the model holds now; raises as the constructor."""
        return Located(self.spec, self._names, views)

    def note(self, views: Views) -> None:
        """Remember that the model's tensors are as they should be."""
        self._marks = self._found(views)

    def is_noted(self, views: Views) -> bool:
        """Whether the tensors are the same memory, not written since in a way that torch counts."""
        return self._marks == self._found(views)

    def _found(self, views: Views) -> list[Mark]:
        return [
            (
                view.data_ptr(),
                view.stride(),
                view.dtype,
                version_of(view),
            )
            for view in _given(self._names, views)
        ]


def _given(names: Sequence[str], views: Views) -> list[Tensor]:
    given = [views.get(name, ()) for name in names]
    return [each for some in given for each in ((some,) if isinstance(some, Tensor) else some)]


def check_disjoint(located: Sequence[Located]) -> None:
    """Raise PatchError if two entries of a run's tensors lie in one place of the model's memory."""
    targets = [
        (target.memory.data_ptr(), target, each.spec.name)
        for each in located
        for target in each.targets
        if target.memory.numel()
    ]
    targets.sort(key=lambda entry: entry[0])
    index = 0
    while index < len(targets):
        (first, target, _), beyond = targets[index], index + 1
        end = first + target.memory.nbytes
        while beyond < len(targets) and targets[beyond][0] < end:
            end = max(end, targets[beyond][0] + targets[beyond][1].memory.nbytes)
            beyond += 1
        if beyond > index + 1 or not target.view.is_contiguous():
            _check_group(targets[index:beyond], first, end)
        index = beyond


def _check_group(targets: list[tuple[int, Target, str]], first: int, end: int) -> None:
    """Mark the entries of tensors that lie between two addresses, one tensor after the other."""
    width = targets[0][1].view.itemsize
    taken = torch.zeros((end - first) // width, dtype=torch.bool)
    for address, target, name in targets:
        offset, odd = divmod(address - first, width)
        view = taken.as_strided(target.view.shape, target.view.stride(), offset)
        before = int(taken.sum())
        shared = bool(odd) or target.view.itemsize != width or bool(view.any())
        view.fill_(True)
        if shared or int(taken.sum()) != before + view.numel():
            raise PatchError(
                f"{name!r} shares memory with another tensor of the run, or with itself, in this "
                "model only: untie the weights, or mend the views"
            )


def runtime_views(
    model: Model,
    shapes: Mapping[str, tuple[int, ...]],
    packed: Mapping[str, Sequence[str]] | None = None,
    transposed: Collection[str] = (),
) -> dict[str, Tensor]:
    """The views of a model whose modules are fused or transposed, by the checkpoint's names.

    Other layouts need no more than a dict of views of your own, such as
    `{"attention.query.weight": qkv.weight.view(heads, 3, width, -1)[:, 0]}`.

    Args:
        model: that serves: a module, or its tensors by name.
        shapes: of all tensors of the checkpoint by name: `manifest.shapes` of a whole patch that
            was published with `model`.
        packed: name of a fused module -> names of its parts, whose rows follow one another: as
            vLLM's `packed_modules_mapping`, {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}.
        transposed: names of modules, fused ones by their fused name, whose weights the model holds
            transposed, such as GPT-2's Conv1D.

    Returns:
        A view for each name that the model has. Views do not follow a model that moves: give
        `WeightReceiver` a function that makes them, `lambda: runtime_views(model, shapes, packed)`.

    Raises:
        ValueError: a fused tensor has other rows than its parts, the shape of a part is missing, or
            a transposed weight has more than two dimensions.
        TypeError: a string in place of several names.
    """
    for label, names in (("transposed", transposed), *(packed or {}).items()):
        if isinstance(names, str):
            raise TypeError(f"{label}: expected several names, got {names!r}: write ({names!r},)")
    tensors, views = plain_tensors(model), {}
    fused_of = {part: fused for fused, parts in (packed or {}).items() for part in parts}
    for name, shape in shapes.items():
        pieces = name.split(".")
        part = next((piece for piece in pieces if piece in fused_of), "")
        source = name
        if name not in tensors and part:
            source = _with(pieces, part, fused_of[part])
            beside = [_with(pieces, part, each) for each in (packed or {})[fused_of[part]]]
        if source not in tensors:
            continue
        whole = tensors[source].detach()
        if any(piece in transposed for piece in source.split(".")):
            if whole.dim() > 2:
                raise ValueError(f"transposed: {source!r} has {whole.dim()} dimensions")
            whole = whole.t()
        if source != name:
            missing = [each for each in beside if not shapes.get(each)]
            if missing:
                raise ValueError(
                    f"shapes: {missing[0]!r}, a part of {source!r}, has none or is a scalar: give "
                    "the shapes of all tensors of the checkpoint"
                )
            rows = [shapes[each][0] for each in beside]
            first = sum(rows[: beside.index(name)])
            if whole.shape[0] != sum(rows):
                raise ValueError(
                    f"packed: {source!r} has {whole.shape[0]} rows, its parts {rows} together "
                    f"{sum(rows)}"
                )
            whole = whole.narrow(0, first, shape[0])
        views[name] = whole
    return views


def _with(pieces: Sequence[str], old: str, new: str) -> str:
    return ".".join(new if piece == old else piece for piece in pieces)


def _check_fits(spec: TensorSpec, view: Tensor) -> None:
    plain = type(view).__torch_dispatch__ is Tensor.__torch_dispatch__
    if not plain or view.layout is not torch.strided or view.device.type == "meta":
        raise PatchError(
            f"{spec.name!r}: expected a plain strided tensor with data, got {type(view).__name__}, "
            f"layout {view.layout}, device {view.device}"
        )
    if view.dtype != spec.dtype:
        raise PatchError(
            f"{spec.name!r} is {view.dtype} here and {spec.dtype} in the patch: publish with "
            f"WeightPublisher(dtype={view.dtype})"
        )
    # A view of other shape is in order where a fingerprint tells whether it is the right one.
    if view.numel() != spec.numel or (not spec.fingerprint and tuple(view.shape) != spec.shape):
        raise PatchError(
            f"{spec.name!r} has shape {tuple(view.shape)} here and {spec.shape} in the patch: "
            "build the model as it was fine-tuned (for a head: the same number of labels)"
        )
    if view.is_inference() and not torch.is_inference_mode_enabled():
        raise PatchError(f"{spec.name!r} was made in inference mode: receive in inference mode")
    if any(stride == 0 < size - 1 for size, stride in zip(view.shape, view.stride(), strict=True)):
        raise PatchError(f"{spec.name!r} is expanded: its entries share memory; clone it")

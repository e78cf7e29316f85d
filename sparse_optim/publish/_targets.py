"""Where a checkpoint's tensors lie in the memory of a model that serves them.

A tensor of the checkpoint is a view of the model's memory: a parameter itself, some rows of a fused
one, a transposed one, every third block of an interleaved one. Entry i of the checkpoint's tensor
(C order) is entry i of the view (C order), and its place in memory follows from the strides.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor

from sparse_optim.delta._tensors import Model, bits, storage_key
from sparse_optim.delta._types import plain_tensors
from sparse_optim.publish._manifest import PatchError, TensorSpec

Views = Mapping[str, Tensor | Sequence[Tensor]]
Mark = tuple[int, int, int]  # of a tensor: object, address, version


class Target:
    """One view of the model's memory, written entry by entry.

    Args:
        view: any strides; no two entries in one place.
    """

    def __init__(self, view: Tensor) -> None:
        self.view = view.detach()
        ends = zip(view.shape, view.stride(), strict=True)
        span = sum((size - 1) * stride for size, stride in ends) + 1 if view.numel() else 0
        self._memory = bits(self.view).as_strided((span,), (1,))

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
        return self._memory.gather(0, places).cpu().view(self.view.dtype)

    def write(self, places: Tensor, value: Tensor) -> None:
        """Write values; `view._version` moves."""
        self._memory.scatter_(0, places, bits(value).to(self.view.device))

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
        """Whether nobody has written, replaced or moved the tensors since."""
        return self._marks == self._found(views)

    def _found(self, views: Views) -> list[Mark]:
        return [
            (id(view), view.data_ptr(), 0 if view.is_inference() else view._version)
            for view in _given(self._names, views)
        ]


def _given(names: Sequence[str], views: Views) -> list[Tensor]:
    given = [views.get(name, ()) for name in names]
    return [each for some in given for each in ((some,) if isinstance(some, Tensor) else some)]


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
        shapes: of the checkpoint's tensors, `patch.manifest.shapes` of a whole patch.
        packed: name of a fused module -> names of its parts, whose rows follow one another: as
            vLLM's `packed_modules_mapping`, {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}.
        transposed: names of modules, fused ones by their fused name, whose weights the model holds
            transposed, such as GPT-2's Conv1D.

    Returns:
        A view for each name that the model has; give it to `WeightReceiver`.

    Raises:
        ValueError: a fused tensor has other rows than its parts.
    """
    tensors, views = plain_tensors(model), {}
    fused_of = {part: fused for fused, parts in (packed or {}).items() for part in parts}
    for name, shape in shapes.items():
        pieces = name.split(".")
        part = next((piece for piece in pieces if piece in fused_of), "")
        source, first = name, 0
        if name not in tensors and part:
            source = _with(pieces, part, fused_of[part])
            beside = [_with(pieces, part, each) for each in (packed or {})[fused_of[part]]]
            rows = [shapes[each][0] if each in shapes else 0 for each in beside]
            first = sum(rows[: beside.index(name)])
        if source not in tensors:
            continue
        whole = tensors[source].detach()
        if any(piece in transposed for piece in source.split(".")):
            whole = whole.t()
        if source != name:
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

"""Patches of what an optimizer has moved."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from sparse_optim.delta._fingerprint import fingerprint
from sparse_optim.delta._tensors import DTYPE_CODES, Model, bytes_of
from sparse_optim.delta._types import plain_tensors
from sparse_optim.optim.masked_adamw import MaskedAdamW
from sparse_optim.optim.readout import Layout, Moved
from sparse_optim.optim.whole import whole_of
from sparse_optim.publish._digest import check_key, digest_of
from sparse_optim.publish._manifest import Manifest, TensorSpec
from sparse_optim.publish._patch import Patch
from sparse_optim.publish._stage import entry_keys


class WeightPublisher:
    """Publishes the weights that an optimizer moves, version by version.

    A patch takes the values of the active entries out of the model: no copy of the model is kept
    and nothing is compared. It has two bytes an active entry in bfloat16 and six a new one, and
    whole tensors of groups with unmask="all" and of moving buffers. Holds the newest version on
    the host, six bytes an active entry.

    Args:
        optimizer: with sharded parameters, all processes call `patch` together.
        model: gives names and buffers, as in `MaskedAdamW.delta`.
        key: a secret of 1 to 64 bytes that the receivers share. Without it a receiver detects
            accidents; with it also patches that someone else has made.
        version: of the last patch that an earlier process published, so that numbers go on.
        dtype: of the receivers' weights, where it is not the trainer's: values are rounded to it.
        base: the base's tensors by name; with `dtype` a run that has taken steps needs them.

    Raises:
        ValueError: the key, version or dtype is none.

    Examples:
        ```python
        publisher = WeightPublisher(optimizer, model)
        for batch in batches:
            train(batch)
            send(publisher.patch().to_bytes())
        ```
    """

    def __init__(
        self,
        optimizer: MaskedAdamW,
        model: nn.Module | None = None,
        *,
        key: bytes | None = None,
        version: int = 0,
        dtype: torch.dtype | None = None,
        base: Model | None = None,
    ) -> None:
        if dtype is not None and not (dtype.is_floating_point and dtype in DTYPE_CODES):
            raise ValueError(f"dtype: expected a floating-point dtype, got {dtype}")
        if version < 0:
            raise ValueError(f"version: expected at least 0, got {version}")
        self._optimizer, self._model, self._key = optimizer, model, check_key(key)
        self._dtype, self._base, self._first = dtype, base, version
        self._described: tuple[Layout, Manifest, list[Tensor]] | None = None
        # The newest version as a whole patch, and the optimizer's steps until then. One attribute,
        # since a thread that serves `whole` may read it while `patch` runs.
        self._newest: tuple[Patch, int] | None = None
        if dtype is not None:
            self._describe(optimizer.moved().step)

    @property
    def version(self) -> int:
        """Of the last patch."""
        return self._first if self._newest is None else self._newest[0].version

    def patch(self) -> Patch:
        """The next version, as what has changed since the last one.

        The first patch is whole, and so is one after parameters have joined the optimizer or
        `load_state_dict` has taken entries back.

        Raises:
            RuntimeError, ValueError: as `MaskedAdamW.delta`. Nothing is published then.
        """
        moved = self._optimizer.moved()
        layout, manifest = self._describe(moved.step)
        position = moved.position.to("cpu", copy=True)
        whole = Patch(
            version=self.version + 1,
            digest="",
            parent=manifest.digest,
            new=torch.tensor(moved.offsets, dtype=torch.int32).diff(),
            position=position,
            value=_bytes(moved.values, self._dtype),
            dense=_bytes([whole_of(tensor) for tensor in layout.dense.values()], self._dtype),
            manifest=manifest,
        )
        whole = replace(whole, digest=digest_of(whole, self._key))
        before, self._newest = self._newest, (whole, moved.step)
        if before is None or before[0].parent != whole.parent:
            return whole
        last, step = before
        fresh = _new_entries(last, step, whole, moved)
        if fresh is None:
            return whole
        return replace(
            whole,
            parent=last.digest,
            new=torch.searchsorted(fresh, torch.tensor(moved.offsets)).diff().int(),
            position=position[fresh],
            manifest=None,
        )

    def whole(self) -> Patch:
        """The version of the last `patch`, for a receiver of any version, or none. Threads may call
        it at any time.

        Raises:
            ValueError: none was published.
        """
        if self._newest is None:
            raise ValueError("nothing is published yet: call patch() first")
        return self._newest[0]

    def _describe(self, step: int) -> tuple[Layout, Manifest]:
        """Names and manifest, made anew where tensors have joined or were replaced."""
        tensors = [param for group in self._optimizer.param_groups for param in group["params"]]
        tensors += () if self._model is None else self._model.buffers()
        known = self._described
        if known is None or [*map(id, tensors)] != [*map(id, known[2])]:
            layout = self._optimizer.layout(self._model)
            same = known is not None and _same(layout, known[0])
            manifest = known[1] if known and same else self._manifest(layout, step)
            # Before the first step, other weights may still be loaded.
            self._described = known = layout, manifest, tensors if step else []
        return known[0], known[1]

    def _manifest(self, layout: Layout, step: int) -> Manifest:
        prints = layout.fingerprints if self._dtype is None else self._rounded_base(layout, step)
        rows = zip(layout.names, layout.params, prints, strict=True)
        return Manifest(
            tuple(self._spec(name, param, text) for name, param, text in rows),
            tuple(self._spec(name, tensor) for name, tensor in layout.dense.items()),
            layout.tied,
        )

    def _spec(self, name: str, tensor: Tensor, text: str = "") -> TensorSpec:
        dtype = self._dtype if self._dtype and tensor.is_floating_point() else tensor.dtype
        return TensorSpec(name, tuple(tensor.shape), dtype, text)

    def _rounded_base(self, layout: Layout, step: int) -> tuple[str, ...]:
        """Fingerprints of the base in the receivers' dtype."""
        if self._base is not None:
            base = plain_tensors(self._base)
            missing = [name for name in layout.names if name not in base]
            if missing:
                raise ValueError(f"base: it has no {missing[0]!r}: give the model before training")
            tensors = [base[name] for name in layout.names]
            wrong = [
                name
                for name, tensor, text in zip(
                    layout.names, tensors, layout.fingerprints, strict=True
                )
                if fingerprint(tensor) != text
            ]
            if wrong:
                raise ValueError(f"base: {wrong[0]!r} is not what training began with")
        elif step:
            raise ValueError(
                "dtype: the optimizer has taken steps, so the model no longer holds the base: "
                "give base=, or build the publisher before the first step"
            )
        else:
            tensors = list(layout.params)
        return tuple(fingerprint(whole_of(tensor).to(self._dtype)) for tensor in tensors)


def _bytes(tensors: Sequence[Tensor], dtype: torch.dtype | None) -> Tensor:
    """The bytes of tensors one after the other on the host, floating-point ones in `dtype`."""
    if not tensors:
        return torch.empty(0, dtype=torch.uint8)
    if dtype is not None:
        tensors = [each.to(dtype) if each.is_floating_point() else each for each in tensors]
    if len({each.dtype for each in tensors}) > 1:
        tensors = [bytes_of(each) for each in tensors]
    flat = [each if each.dim() == 1 else each.reshape(-1) for each in tensors]
    return torch.cat(flat).detach().view(torch.uint8).cpu()


def _new_entries(last: Patch, step: int, whole: Patch, moved: Moved) -> Tensor | None:
    """Places of the entries that the last version, of `step`, did not have, (k,) int64, ascending;
    None if it had others, too."""
    if moved.unmask_step is not None:
        fresh = moved.unmask_step.cpu() > step
    else:
        fresh = ~torch.isin(entry_keys(whole), entry_keys(last), assume_unique=True)
    places = fresh.nonzero().view(-1)
    counts = torch.searchsorted(places, torch.tensor(moved.offsets)).diff()
    known = whole.position if not places.numel() else whole.position[~fresh]
    same = torch.equal(whole.new - counts, last.new) and torch.equal(known, last.position)
    return places if same else None


def _same(one: Layout, other: Layout) -> bool:
    """Whether two layouts have the same manifest."""
    shapes = [{name: each.shape for name, each in it.dense.items()} for it in (one, other)]
    return (
        one.names == other.names
        and one.fingerprints == other.fingerprints
        and one.tied == other.tied
        and shapes[0] == shapes[1]
    )

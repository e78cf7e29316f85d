"""Patches of what an optimizer has moved."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from sparse_optim.delta._fingerprint import fingerprint
from sparse_optim.delta._tensors import DTYPE_CODES, Model
from sparse_optim.delta._types import plain_tensors
from sparse_optim.optim.masked_adamw import MaskedAdamW
from sparse_optim.optim.readout import Layout, Moved
from sparse_optim.optim.whole import whole_of
from sparse_optim.publish._manifest import Manifest, TensorSpec
from sparse_optim.publish._patch import Patch
from sparse_optim.publish._state import check_key, digest_of


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
        self._described: tuple[Layout, Manifest] | None = None
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
        counts = torch.tensor(moved.offsets).diff()
        position = moved.position.to("cpu", copy=True)
        value = _bytes(moved.values, self._dtype)
        dense = _bytes([whole_of(tensor) for tensor in layout.dense.values()], self._dtype)
        version = self.version + 1
        digest = digest_of(manifest, self._key, version, counts, [position], [value], dense)
        whole = Patch(
            version, digest, manifest.digest, counts.int(), position, value, dense, manifest
        )
        before, self._newest = self._newest, (whole, moved.step)
        if before is None or before[0].parent != whole.parent:
            return whole
        last, step = before
        fresh = _fresh(last, step, whole, moved)
        if fresh is None:
            return whole
        ends = torch.cat([counts.new_zeros(1), fresh.cumsum(0)])[moved.offsets]
        return Patch(version, digest, last.digest, ends.diff().int(), position[fresh], value, dense)

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
        layout = self._optimizer.layout(self._model)
        known = self._described
        if known is None or not _same(layout, known[0]):
            self._described = known = layout, self._manifest(layout, step)
        return layout, known[1]

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
    parts = [
        (each.to(dtype) if dtype and each.is_floating_point() else each)
        .detach()
        .reshape(-1)
        .view(torch.uint8)
        for each in tensors
    ]
    return torch.cat(parts).cpu() if parts else torch.empty(0, dtype=torch.uint8)


def _fresh(last: Patch, step: int, whole: Patch, moved: Moved) -> Tensor | None:
    """Which entries are not in the last version, (n,) bool; None if that has others, too."""
    if moved.unmask_step is not None:
        fresh = moved.unmask_step.cpu() > step
    else:
        before, now = _keys(last), _keys(whole)
        at = torch.searchsorted(before, now)
        fresh = before.new_ones(now.numel(), dtype=torch.bool)
        inside = at < before.numel()
        fresh[inside] = before[at[inside]] != now[inside]
    known = ~fresh
    ends = torch.cat([torch.zeros(1, dtype=torch.int64), known.cumsum(0)])[moved.offsets]
    if not torch.equal(ends.diff().int(), last.new):
        return None
    return fresh if torch.equal(whole.position[known], last.position) else None


def _keys(patch: Patch) -> Tensor:
    """(tensor, position) of each entry as one number, ascending."""
    tensor = torch.arange(patch.new.numel()).repeat_interleave(patch.new)
    return tensor << 32 | patch.position


def _same(one: Layout, other: Layout) -> bool:
    """Whether two layouts have the same manifest."""
    shapes = [{name: each.shape for name, each in it.dense.items()} for it in (one, other)]
    return (
        one.names == other.names
        and one.fingerprints == other.fingerprints
        and one.tied == other.tied
        and shapes[0] == shapes[1]
    )

"""Patches of what an optimizer has moved."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from sparse_optim.delta._fingerprint import fingerprint
from sparse_optim.delta._tensors import DTYPE_CODES, Model, bytes_of, version_of
from sparse_optim.delta._types import plain_tensors
from sparse_optim.optim.masked_adamw import MaskedAdamW
from sparse_optim.optim.readout import Layout, Moved
from sparse_optim.optim.whole import whole_of
from sparse_optim.publish._digest import check_key, digest_of
from sparse_optim.publish._manifest import Manifest, TensorSpec
from sparse_optim.publish._patch import MAX_DIGITS, Patch
from sparse_optim.publish._stage import entry_keys

MAX_VERSION = 10**MAX_DIGITS - 1
Mark = tuple[Tensor, torch.dtype, torch.Size]


class WeightPublisher:
    """Publishes the weights that an optimizer moves, version by version.

    A patch takes the values of the active entries out of the model: no copy of the model is kept
    and nothing is compared. It has two bytes an active entry in bfloat16 and six a new one, and
    whole tensors of groups with unmask="all" and of moving buffers. Holds the newest version on
    the host, six bytes an active entry.

    With `Repeat` and `Stochastic`, whose entries come and go, a patch has all that were ever
    active, and takes the time to read a bit for each entry of the model.

    Args:
        optimizer: with sharded parameters, all processes call `patch` together.
        model: gives names and moving buffers, as in `MaskedAdamW.delta`. Receivers then check that
            theirs holds the same in all other tensors, too; without it, only in those trained.
        run: name of the run, the same in all parts of a resumed one; a random one if None.
        key: a secret of 1 to 64 bytes that this run and its receivers share. Without one a receiver
            detects accidents; with one, also patches that someone else has made.
        version: of the last patch that an earlier part of the run published; numbers go on.
        dtype: of the receivers' weights, where it is not the trainer's: values are rounded to it.
        base: the base's tensors by name; needed with `dtype` once the optimizer has taken a step.

    Raises:
        TypeError: `optimizer` is not one of this package.
        ValueError: `key`, `version`, `dtype` or `base` is not as described.

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
        run: str | None = None,
        key: bytes | None = None,
        version: int = 0,
        dtype: torch.dtype | None = None,
        base: Model | None = None,
    ) -> None:
        if not isinstance(optimizer, MaskedAdamW):
            raise TypeError(
                f"optimizer: expected MaskedAdamW or IncrementalMaskedAdamW, got "
                f"{type(optimizer).__name__} (accelerate's wrapper has it as .optimizer)"
            )
        if dtype is not None and not (dtype.is_floating_point and dtype in DTYPE_CODES):
            raise ValueError(f"dtype: expected a floating-point dtype, got {dtype}")
        if not 0 <= version < MAX_VERSION:
            raise ValueError(f"version: expected 0 to {MAX_VERSION - 1}, got {version}")
        self._optimizer, self._model, self._key = optimizer, model, check_key(key)
        self._dtype, self._first, self._run = dtype, version, run or secrets.token_hex(8)
        self._rounded: dict[str, tuple[str, str]] = {}  # fingerprints of the base, and rounded
        # Names and manifest, and the tensors that they are of.
        self._described: tuple[Layout, Manifest, list[Mark]] | None = None
        self._versions: dict[str, int] = {}  # of the tensors that no patch carries
        # The newest version as a whole patch, and the optimizer's steps until then. One attribute,
        # since a thread that serves `whole` may read it while `patch` runs.
        self._newest: tuple[Patch, int] | None = None
        if dtype is not None:
            self._round(optimizer.layout(model), optimizer.moved().step, base)

    @property
    def version(self) -> int:
        """Of the last patch."""
        return self._first if self._newest is None else self._newest[0].version

    def patch(self) -> Patch:
        """The next version, as what has changed since the last one.

        The first patch is whole, and so is one after parameters have joined the optimizer or
        `load_state_dict` has taken entries back.

        Raises:
            RuntimeError, ValueError: as `MaskedAdamW.delta`, or other code has changed a tensor of
                `model` that is not trained. Nothing is published then.
        """
        moved = self._optimizer.moved()
        layout, manifest = self._describe(moved.step)
        position = moved.position.to("cpu", copy=True)
        whole = Patch(
            run=self._run,
            version=self.version + 1,
            digest="",
            parent=manifest.digest,
            new=torch.tensor(moved.offsets, dtype=torch.int32).diff(),
            position=position,
            value=_bytes(moved.runs, self._dtype),
            dense=_bytes([whole_of(tensor) for tensor in layout.dense.values()], self._dtype),
            manifest=manifest,
        )
        whole = replace(whole, digest=digest_of(whole, self._key))
        before, self._newest = self._newest, (whole, moved.step)
        if before is None or before[0].parent != whole.parent:
            return whole
        last, step = before
        added = _new_entries(last, step, whole, moved)
        if added is None:
            return whole
        return replace(
            whole,
            parent=last.digest,
            new=torch.searchsorted(added, torch.tensor(moved.offsets)).diff().int(),
            position=position[added],
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
        """Names and manifest, made anew where tensors have joined, changed or were replaced."""
        tensors = [param for group in self._optimizer.param_groups for param in group["params"]]
        tensors += () if self._model is None else self._model.buffers()
        marks = [(tensor, tensor.dtype, tensor.shape) for tensor in tensors]
        known = self._described
        if known is None or not _same(marks, known[2]):
            layout = self._optimizer.layout(self._model)
            known = layout, self._manifest(layout), marks
            self._versions = {name: version_of(tensor) for name, tensor in layout.fixed.items()}
            # Before the first step, other weights may still be loaded.
            self._described = known if step else None
        self._check_fixed(known[0], known[1])
        return known[0], known[1]

    def _check_fixed(self, layout: Layout, manifest: Manifest) -> None:
        """Raise RuntimeError if other code has changed a tensor that no patch carries."""
        for spec, tensor in zip(manifest.fixed, layout.fixed.values(), strict=True):
            if self._versions[spec.name] == version_of(tensor):
                continue
            if self._fingerprint(tensor) != spec.fingerprint:
                raise RuntimeError(
                    f"other code has changed {spec.name!r}, which the optimizer does not train, so "
                    "that receivers keep the old values: add it to a group with unmask='all', or "
                    "undo that"
                )
            self._versions[spec.name] = version_of(tensor)

    def _manifest(self, layout: Layout) -> Manifest:
        prints = [*layout.fingerprints]
        if self._dtype is not None:
            for index, name in enumerate(layout.names):
                before, rounded = self._rounded.get(name, ("", ""))
                if before != prints[index]:
                    raise ValueError(
                        f"dtype: {name!r} has joined or was loaded since the publisher was built: "
                        "build it after that, with base= if the optimizer has taken steps"
                    )
                prints[index] = rounded
        rows = zip(layout.names, layout.params, prints, strict=True)
        return Manifest(
            tuple(self._spec(name, param, text) for name, param, text in rows),
            tuple(self._spec(name, tensor) for name, tensor in layout.dense.items()),
            tuple(
                self._spec(name, tensor, self._fingerprint(tensor))
                for name, tensor in layout.fixed.items()
            ),
            layout.tied,
        )

    def _spec(self, name: str, tensor: Tensor, text: str = "") -> TensorSpec:
        dtype = self._dtype if self._dtype and tensor.is_floating_point() else tensor.dtype
        if dtype not in DTYPE_CODES:
            raise ValueError(f"{name!r} is {dtype}, which no patch can hold")
        return TensorSpec(name, tuple(tensor.shape), dtype, text)

    def _fingerprint(self, tensor: Tensor) -> str:
        """Of a tensor in the receivers' dtype."""
        whole = whole_of(tensor).detach()
        return fingerprint(_in_dtype(whole, self._dtype))

    def _round(self, layout: Layout, step: int, base: Model | None) -> None:
        """Take the fingerprints of the base in the receivers' dtype."""
        given = None if base is None else plain_tensors(base)
        if given is None and step:
            raise ValueError(
                "dtype: the optimizer has taken steps, so the model no longer holds the base: "
                "give base=, or build the publisher before the first step"
            )
        for name, param, text in zip(layout.names, layout.params, layout.fingerprints, strict=True):
            if given is not None and name not in given:
                raise ValueError(f"base: it has no {name!r}: give the model before training")
            tensor = param if given is None else given[name]
            if given is not None and fingerprint(tensor) != text:
                raise ValueError(f"base: {name!r} is not what training began with")
            self._rounded[name] = text, self._fingerprint(tensor)


def _same(some: list[Mark], others: list[Mark]) -> bool:
    return len(some) == len(others) and all(
        one[0] is other[0] and one[1:] == other[1:] for one, other in zip(some, others, strict=True)
    )


def _in_dtype(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    return tensor.to(dtype) if dtype and tensor.is_floating_point() else tensor


def _bytes(tensors: Sequence[Tensor], dtype: torch.dtype | None) -> Tensor:
    """The bytes of tensors one after the other on the host, floating-point ones in `dtype`."""
    if not tensors:
        return torch.empty(0, dtype=torch.uint8)
    if dtype is not None:
        tensors = [_in_dtype(each, dtype) for each in tensors]
    if len({each.dtype for each in tensors}) > 1:
        tensors = [bytes_of(each) for each in tensors]
    flat = [each if each.dim() == 1 else each.reshape(-1) for each in tensors]
    return torch.cat(flat).detach().view(torch.uint8).cpu()


def _new_entries(last: Patch, step: int, whole: Patch, moved: Moved) -> Tensor | None:
    """Places of the entries that the last version, of `step`, did not have, (k,) int64, ascending;
    None if it had others, too."""
    if moved.unmask_step is not None:
        is_new = moved.unmask_step.cpu() > step
    else:
        is_new = ~torch.isin(entry_keys(whole), entry_keys(last), assume_unique=True)
    places = is_new.nonzero().view(-1)
    counts = torch.searchsorted(places, torch.tensor(moved.offsets)).diff()
    known = whole.position if not places.numel() else whole.position[~is_new]
    same = torch.equal(whole.new - counts, last.new) and torch.equal(known, last.position)
    return places if same else None

"""A model that follows a publisher, one whole version at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hmac import compare_digest
from threading import RLock

import torch
from torch import Tensor, nn

from sparse_optim.delta._fingerprint import fingerprint
from sparse_optim.delta._tensors import bits, host_copy, same_bits
from sparse_optim.delta._types import plain_tensors
from sparse_optim.publish._manifest import Manifest, PatchError, TensorSpec
from sparse_optim.publish._patch import MissingVersionError, Patch
from sparse_optim.publish._state import (
    State,
    TensorPatch,
    check_key,
    dense_tensors,
    digest_of,
    split_values,
)
from sparse_optim.publish._targets import Located, Target, Views


@dataclass(frozen=True)
class Held:
    """A sparse tensor at one version.

    Attributes:
        located: where the tensor lies.
        position: (n,), int32, of the version's entries.
        places: of each target, where these entries lie in memory.
        original: (n,), the base's values of these entries.
    """

    located: Located
    position: Tensor
    places: list[Tensor]
    original: Tensor


class WeightReceiver:
    """Keeps the weights of a model equal to a publisher's, version by version.

    Every patch is checked in full before the first write: its chain, positions, and digest. A write
    that fails is undone. So the model holds the base or exactly one version. Holds about 24 bytes
    an entry in bfloat16.

    Threads may share it. Hold `lock` while you compute, if another thread receives.

    Args:
        model: with the base's values: a module, or a mapping of the checkpoint's names to tensors
            or views of any strides (see `runtime_views`), several for one name if it has copies.
        key: the publisher's.

    Attributes:
        version: that the model holds; 0 is the base.
        digest: of the version; equal to the publisher's if and only if the weights are.
        lock: held while the model is written.

    Raises:
        ValueError: the key is none.

    Examples:
        ```python
        receiver = WeightReceiver(model)
        try:
            receiver.receive(data)
        except MissingVersionError:  # it joined late, or a patch was lost
            receiver.receive(ask_for_whole())
        ```
    """

    def __init__(self, model: nn.Module | Views, *, key: bytes | None = None) -> None:
        self.lock = RLock()
        self._model, self._key = model, check_key(key)
        self._manifest: Manifest | None = None
        self._now: State | None = None  # None: the base
        self._before: State | None = None
        self._staged: tuple[Manifest, State] | None = None
        self._sparse: list[Held] = []
        self._dense: list[tuple[Located, list[Tensor]]] = []  # with each target's original

    @property
    def version(self) -> int:
        """That the model holds."""
        return 0 if self._now is None else self._now.version

    @property
    def digest(self) -> str:
        """Of the version; "" of the base."""
        return "" if self._now is None else self._now.digest

    def receive(self, patch: Patch | bytes) -> bool:
        """Stage a patch and commit it. Returns and raises as `stage` and `commit`."""
        with self.lock:
            wanted = self.stage(patch)
            if wanted:
                self.commit()
            return wanted

    def stage(self, patch: Patch | bytes) -> bool:
        """Check a patch in full and keep it for `commit`; the model is not touched.

        Returns:
            False where the model already holds this version or a later one: nothing is staged.

        Raises:
            MissingVersionError: it builds on a version that the model does not hold.
            PatchError: it is damaged, forged, or of another run.
        """
        with self.lock:
            self._staged = None
            patch = patch if isinstance(patch, Patch) else Patch.from_bytes(patch)
            if patch.version < self.version or patch.digest == self.digest:
                return False
            if patch.version == self.version:
                raise PatchError(
                    f"version {patch.version} of another run than the model's: reset() first"
                )
            if patch.manifest is not None:
                manifest = patch.manifest
                empty = torch.empty(0, dtype=torch.int32)
                positions: Sequence[Tensor] = [empty for _ in manifest.sparse]
            elif self._manifest is None or self._now is None or patch.parent != self._now.digest:
                raise MissingVersionError(
                    f"version {patch.version} builds on one that the model does not hold (it has "
                    f"{self.version}): give it a whole patch, WeightPublisher.whole()"
                )
            else:
                manifest, positions = self._manifest, self._now.positions
            self._staged = manifest, _next_state(manifest, positions, patch, self._key)
            return True

    def commit(self) -> None:
        """Write what was staged.

        Raises:
            PatchError: the model does not fit, does not hold the base, or other code has written
                it. It is as before.
            ValueError: nothing is staged.
        """
        with self.lock:
            if self._staged is None:
                raise ValueError("nothing is staged: stage(patch) first")
            manifest, state = self._staged
            self._staged = None
            if self._manifest is None:
                self._join(manifest)
            elif self._manifest.digest != manifest.digest:
                self._replace(manifest)
            before = self._now
            self._move(state)
            self._before = before

    def rollback(self) -> None:
        """Put the version back that the last `commit` replaced.

        Raises:
            ValueError: there is none: only one step back is kept.
            PatchError: other code has written the model. It is as before.
        """
        with self.lock:
            if self._before is None:
                raise ValueError("no earlier version is kept: reset() puts the base back")
            self._move(self._before)
            self._before = None

    def reset(self) -> None:
        """Put the base back. The next patch must be whole.

        Raises:
            PatchError: other code has written the model. It is as before.
        """
        with self.lock:
            if self._manifest is not None:
                self._move(None)
            self._manifest, self._sparse, self._dense = None, [], []
            self._before = self._staged = None

    def verify(self) -> None:
        """Read what was written, O(B).

        Raises:
            PatchError: the model does not hold the version.
        """
        with self.lock:
            if self._now is None:
                return
            self._check_unwritten()
            for held, value in zip(self._sparse, self._now.values, strict=True):
                for target, places in zip(held.located.targets, held.places, strict=True):
                    if not same_bits(target.read(places), value):
                        raise PatchError(_written(held.located.spec.name))
            for (located, _), wholes in zip(self._dense, self._wholes(self._now), strict=True):
                for target, whole in zip(located.targets, wholes, strict=True):
                    if not same_bits(target.view.cpu(), whole):
                        raise PatchError(_written(located.spec.name))

    def entries(self) -> Iterator[TensorPatch]:
        """The version tensor by tensor, as `Patch.entries` has it; nothing of the base."""
        with self.lock:
            if self._now is None or self._manifest is None:
                return iter(())
            return self._now.entries(self._manifest)

    def _views(self) -> Views:
        return plain_tensors(self._model) if isinstance(self._model, nn.Module) else self._model

    def _join(self, manifest: Manifest) -> None:
        """Find the tensors in the model, which holds the base, and check that it does."""
        views = self._views()
        names: dict[str, list[str]] = {}
        for alias, name in manifest.tied.items():
            names.setdefault(name, [name]).append(alias)
        sparse, dense = (
            [Located(spec, names.get(spec.name, [spec.name]), views) for spec in part]
            for part in (manifest.sparse, manifest.dense)
        )
        for located in sparse:
            for target in located.targets:
                if fingerprint(target.view) != located.spec.fingerprint:
                    raise PatchError(
                        f"{located.spec.name!r} is not that of the publisher's base: load the "
                        "weights with which its training began"
                    )
        none = torch.empty(0, dtype=torch.int64)
        self._sparse = [
            Held(
                located,
                none.int(),
                [none.to(target.view.device) for target in located.targets],
                torch.empty(0, dtype=located.spec.dtype),
            )
            for located in sparse
        ]
        self._dense = [
            (located, [host_copy(target.view) for target in located.targets]) for located in dense
        ]
        self._manifest, self._now, self._before = manifest, None, None

    def _replace(self, manifest: Manifest) -> None:
        """Go back to the base and on from there with other tensors."""
        kept = self._manifest, self._now, self._before, self._sparse, self._dense
        self._move(None)
        base = self._sparse, self._dense
        try:
            self._join(manifest)
        except BaseException:
            self._manifest, now, before = kept[:3]
            self._sparse, self._dense = base
            self._move(now)
            self._before = before
            raise

    def _move(self, state: State | None) -> None:
        """Bring the model from the version that it holds to another; None is the base."""
        self._check_unwritten()
        positions = (
            [held.position[:0] for held in self._sparse] if state is None else state.positions
        )
        before = self._sparse
        steps = [_next(held, at) for held, at in zip(before, positions, strict=True)]
        after, keep_all = [held for held, _ in steps], [keeps for _, keeps in steps]
        try:
            self._write(before, after, keep_all, state)
        except BaseException:  # also an interrupt: never leave half a version
            self._write(after, before, [False for _ in steps], self._now)
            self._note()
            raise
        self._sparse, self._now = after, state
        self._note()

    def _write(
        self, old: list[Held], new: list[Held], keep_all: list[bool], state: State | None
    ) -> None:
        """Write a version over another one, of which `keep_all` tensors lose no entry."""
        for index, (before, after) in enumerate(zip(old, new, strict=True)):
            for number, target in enumerate(after.located.targets):
                if after is not before and not keep_all[index]:
                    target.write(before.places[number], before.original)
                if state is not None:
                    target.write(after.places[number], state.values[index])
        for (located, _), wholes in zip(self._dense, self._wholes(state), strict=True):
            for target, whole in zip(located.targets, wholes, strict=True):
                target.write_whole(whole)

    def _wholes(self, state: State | None) -> list[list[Tensor]]:
        """Of each dense tensor, what each of its targets holds."""
        if state is None or self._manifest is None:
            return [originals for _, originals in self._dense]
        wholes = dense_tensors(self._manifest, state.dense)
        return [
            [whole for _ in located.targets]
            for (located, _), whole in zip(self._dense, wholes, strict=True)
        ]

    def _note(self) -> None:
        views = self._views()
        for located in self._located():
            located.note(views)

    def _located(self) -> list[Located]:
        return [*(held.located for held in self._sparse), *(located for located, _ in self._dense)]

    def _check_unwritten(self) -> None:
        """Raise PatchError if the tensors no longer hold the version. Reads only those that were
        written, replaced or moved since, and finds them anew.
        """
        views = self._views()
        for index, held in enumerate(self._sparse):
            if not held.located.is_noted(views):
                value = held.original if self._now is None else self._now.values[index]
                self._sparse[index] = _found_again(held, views, value)
        wholes = self._wholes(self._now)
        for index, (old, originals) in enumerate(self._dense):
            if not old.is_noted(views):
                located = old.anew(views)
                for target, whole in zip(located.targets, wholes[index], strict=True):
                    if not same_bits(target.view.cpu(), whole):
                        raise PatchError(_written(located.spec.name))
                self._dense[index] = located, originals


def _next(held: Held, position: Tensor) -> tuple[Held, bool]:
    """A tensor at another version, not written yet; whether it keeps all entries."""
    if position is held.position:
        return held, True
    at = torch.searchsorted(held.position, position)
    known = at < held.position.numel()
    known[known.clone()] = held.position[at[known]] == position[known]
    original = bits(held.original.new_empty(position.numel()))
    original[known] = bits(held.original)[at[known]]
    fresh = position[~known]
    if fresh.numel():
        target = held.located.targets[0]
        original[~known] = bits(target.read(target.places(fresh)))
    places = [target.places(position) for target in held.located.targets]
    following = Held(held.located, position, places, original.view(held.original.dtype))
    return following, position.numel() - fresh.numel() == held.position.numel()


def _found_again(held: Held, views: Views, value: Tensor) -> Held:
    located = held.located.anew(views)
    places = [target.places(held.position) for target in located.targets]
    for target, at in zip(located.targets, places, strict=True):
        base = Target(target.view.clone(memory_format=torch.contiguous_format))
        base.write(base.places(held.position), held.original)
        if (
            not same_bits(target.read(at), value)
            or fingerprint(base.view) != located.spec.fingerprint
        ):
            raise PatchError(_written(located.spec.name))
    return Held(located, held.position, places, held.original)


def _written(name: str) -> str:
    return (
        f"other code has changed {name!r} since the last version (training, load_state_dict, a "
        "delta): undo that first, or load the base again and build a new WeightReceiver"
    )


def _next_state(
    manifest: Manifest, positions: Sequence[Tensor], patch: Patch, key: bytes | None
) -> State:
    """The version that a patch makes of another one with these positions.

    Raises:
        PatchError: it does not fit, or its digest is another one.
    """
    new = patch.new.tolist()
    if len(new) != len(manifest.sparse):
        raise PatchError(f"it has {len(new)} sparse tensors, expected {len(manifest.sparse)}")
    merged = [
        _merged(spec, old, fresh)
        for spec, old, fresh in zip(
            manifest.sparse, positions, patch.position.split(new), strict=True
        )
    ]
    counts = [each.numel() for each in merged]
    values = split_values(manifest, counts, patch.value)
    dense_tensors(manifest, patch.dense)  # checks its length
    sizes = torch.tensor(counts)
    digest = digest_of(manifest, key, patch.version, sizes, merged, values, patch.dense)
    if not compare_digest(digest, patch.digest):
        raise PatchError(
            f"version {patch.version} is damaged or forged, or was made with another key: its "
            "digest is not that of its contents; ask for it again"
        )
    return State(patch.version, digest, merged, values, patch.dense)


def _merged(spec: TensorSpec, old: Tensor, new: Tensor) -> Tensor:
    """Positions with new ones among them, ascending."""
    if not new.numel():
        return old
    merged = torch.cat([old, new]).sort().values if old.numel() else new
    if int(merged[0]) < 0 or int(merged[-1]) >= spec.numel or bool((merged.diff() <= 0).any()):
        raise PatchError(
            f"{spec.name!r}: positions that come twice, in another order, or are not below "
            f"{spec.numel}"
        )
    return merged

"""A model that follows a publisher, one whole version at a time."""

from __future__ import annotations

from threading import RLock

from torch import Tensor, nn

from sparse_optim.delta._tensors import host_copy, same_bits
from sparse_optim.delta._types import plain_tensors
from sparse_optim.publish._digest import check_key
from sparse_optim.publish._held import Held, written
from sparse_optim.publish._manifest import PatchError
from sparse_optim.publish._patch import MissingVersionError, Patch
from sparse_optim.publish._stage import base_of, check_whole, grown
from sparse_optim.publish._targets import Located, Views


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
        self._now: Patch | None = None  # the version, as a whole patch; None before the first one
        self._before: Patch | None = None
        self._staged: tuple[Patch, Tensor | None] | None = None  # and which entries are new
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
                whole, fresh = patch, None
            elif self._now is None or patch.parent != self._now.digest:
                raise MissingVersionError(
                    f"version {patch.version} builds on one that the model does not hold (it has "
                    f"{self.version}): give it a whole patch, WeightPublisher.whole()"
                )
            else:
                whole, fresh = grown(self._now, patch)
            check_whole(whole, self._key)
            self._staged = whole, fresh
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
            (whole, fresh), self._staged = self._staged, None
            if self._now is None:
                self._join(whole)
            elif self._now.parent != whole.parent:
                self._replace(whole)
            before = self._now
            self._move(whole, fresh)
            self._before = before if before and before.version else None

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
            if self._now is not None:
                self._move(base_of(self._now))
            self._now, self._before, self._staged = None, None, None
            self._sparse, self._dense = [], []

    def verify(self) -> None:
        """Read what was written, O(B).

        Raises:
            PatchError: the model does not hold the version.
        """
        with self.lock:
            if self._now is None:
                return
            self._check_unwritten()
            for held, value in zip(self._sparse, self._now.values(), strict=True):
                for target, places in zip(held.located.targets, held.places, strict=True):
                    if not same_bits(target.read(places), value):
                        raise PatchError(written(held.located.spec.name))
            for (located, _), wholes in zip(self._dense, self._wholes(self._now), strict=True):
                for target, whole in zip(located.targets, wholes, strict=True):
                    if not same_bits(target.view.cpu(), whole):
                        raise PatchError(written(located.spec.name))

    def whole(self) -> Patch:
        """The version as a whole patch, for other receivers: what `WeightPublisher.whole` gives.

        Raises:
            ValueError: the model holds the base.
        """
        with self.lock:
            if self._now is None or not self._now.version:
                raise ValueError("the model holds the base: there is nothing to pass on")
            return self._now

    def _views(self) -> Views:
        return plain_tensors(self._model) if isinstance(self._model, nn.Module) else self._model

    def _join(self, whole: Patch) -> None:
        """Find a run's tensors in the model, which holds the base, and check that it does."""
        views, manifest = self._views(), whole.layout
        names: dict[str, list[str]] = {}
        for alias, name in manifest.tied.items():
            names.setdefault(name, [name]).append(alias)
        sparse, dense = (
            [Located(spec, names.get(spec.name, [spec.name]), views) for spec in part]
            for part in (manifest.sparse, manifest.dense)
        )
        self._sparse = [Held.base(located) for located in sparse]
        self._dense = [
            (located, [host_copy(target.view) for target in located.targets]) for located in dense
        ]
        self._now, self._before = base_of(whole), None

    def _replace(self, whole: Patch) -> None:
        """Go back to the base and on from there with other tensors."""
        assert self._now is not None
        now, before = self._now, self._before
        self._move(base_of(now))
        sparse, dense, base = self._sparse, self._dense, self._now
        try:
            self._join(whole)
        except BaseException:
            self._sparse, self._dense, self._now = sparse, dense, base
            self._move(now)
            self._before = before
            raise

    def _move(self, whole: Patch, fresh: Tensor | None = None) -> None:
        """Bring the model from the version that it holds to another one.

        Args:
            fresh: (n,), bool, which of its entries are new; None where others may be gone.
        """
        now = self._check_unwritten()
        before, counts = self._sparse, whole.new.tolist()
        after = [
            held.at(position, new)
            for held, position, new in zip(
                before,
                whole.position.split(counts),
                (None for _ in counts) if fresh is None else fresh.split(counts),
                strict=True,
            )
        ]
        try:
            self._write(before, after, whole, keep_all=fresh is not None)
        except BaseException:  # also an interrupt: never leave half a version
            self._write(after, before, now, keep_all=False)
            self._note()
            raise
        self._sparse, self._now = after, whole
        self._note()

    def _write(self, old: list[Held], new: list[Held], whole: Patch, *, keep_all: bool) -> None:
        """Write a version over another one; `keep_all`: it has all entries of that one."""
        for before, after, value in zip(old, new, whole.values(), strict=True):
            for number, target in enumerate(after.located.targets):
                if not keep_all and after is not before:
                    target.write(before.places[number], before.original)
                target.write(after.places[number], value)
        for (located, _), wholes in zip(self._dense, self._wholes(whole), strict=True):
            for target, tensor in zip(located.targets, wholes, strict=True):
                target.write_whole(tensor)

    def _wholes(self, version: Patch) -> list[list[Tensor]]:
        """Of each dense tensor, what each of its targets holds."""
        if not version.version:
            return [originals for _, originals in self._dense]
        return [
            [whole for _ in located.targets]
            for (located, _), whole in zip(self._dense, version.wholes(), strict=True)
        ]

    def _note(self) -> None:
        views = self._views()
        for located in self._located():
            located.note(views)

    def _located(self) -> list[Located]:
        return [*(held.located for held in self._sparse), *(located for located, _ in self._dense)]

    def _check_unwritten(self) -> Patch:
        """The version; PatchError if the tensors no longer hold it. Reads only those that were
        written, replaced or moved since, and finds them anew.
        """
        views, now = self._views(), self._now
        assert now is not None
        for index, held in enumerate(self._sparse):
            if not held.located.is_noted(views):
                self._sparse[index] = held.anew(views, now.values()[index])
        for index, (old, originals) in enumerate(self._dense):
            if not old.is_noted(views):
                located, wholes = old.anew(views), self._wholes(now)[index]
                found = [target.view.cpu() for target in located.targets]
                if len(found) != len(wholes) or not all(map(same_bits, found, wholes)):
                    raise PatchError(written(located.spec.name))
                self._dense[index] = located, originals
        return now

"""A model that follows a publisher, one whole version at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from threading import RLock

from torch import Tensor, nn

from sparse_optim.delta._tensors import host_copy, same_bits
from sparse_optim.delta._types import plain_tensors
from sparse_optim.publish._digest import check_key
from sparse_optim.publish._held import Held, outside_write
from sparse_optim.publish._manifest import PatchError
from sparse_optim.publish._patch import MissingVersionError, Patch
from sparse_optim.publish._stage import apply_increment, base_of, check_whole
from sparse_optim.publish._targets import Located, Views, check_disjoint


class WeightReceiver:
    """Keeps the weights of a model equal to a publisher's, version by version.

    Every patch is checked in full before the first write: its chain, positions and digest. A write
    that fails is undone. So the model holds the base or exactly one version, bit for bit.

    What other code writes is noticed at the next patch if torch counts it (`tensor._version`);
    writes through `.data`, or to tensors of inference mode, are found by `verify` alone.

    Holds about 26 bytes an entry in bfloat16. Threads may share it: hold `lock` while you compute,
    if another thread receives.

    Args:
        model: that holds the base: a module; or a mapping of the checkpoint's names to tensors or
            views of any strides (see `runtime_views`), several for one name if the model has
            copies; or a function that returns such a mapping, called for each patch.
        key: the publisher's.

    Attributes:
        version: that the model holds; 0 is the base.
        digest: of the version, the same in all models that hold it; "" of the base.
        lock: held while the model is written.

    Raises:
        TypeError: `model` is none of these.
        ValueError: `key` is not 1 to 64 bytes.

    Examples:
        ```python
        receiver = WeightReceiver(model)
        try:
            receiver.receive(data)
        except MissingVersionError:  # it joined late, or a patch was lost
            receiver.receive(ask_for_whole())
        ```
    """

    def __init__(
        self, model: nn.Module | Views | Callable[[], Views], *, key: bytes | None = None
    ) -> None:
        if not (isinstance(model, Mapping) or callable(model)):
            raise TypeError(
                f"model: expected a module, a mapping of tensors, or a function that returns one, "
                f"got {type(model).__name__}"
            )
        self.lock = RLock()
        self._model, self._key = model, check_key(key)
        self._now: Patch | None = None  # the version, as a whole patch; None before the first one
        self._before: Patch | None = None
        self._staged: tuple[Patch, Tensor | None] | None = None  # and which entries are new
        self._sparse: list[Held] = []
        self._dense: list[tuple[Located, list[Tensor]]] = []  # with each target's original
        self._fixed: list[Held] = []  # that no version changes

    @property
    def version(self) -> int:
        """That the model holds."""
        return 0 if self._now is None else self._now.version

    @property
    def digest(self) -> str:
        """Of the version; "" of the base."""
        return "" if self._now is None else self._now.digest

    def receive(self, patch: Patch | bytes | bytearray | memoryview) -> bool:
        """Stage a patch and commit it. Returns and raises as `stage` and `commit`."""
        with self.lock:
            wanted = self.stage(patch)
            if wanted:
                self.commit()
            return wanted

    def stage(self, patch: Patch | bytes | bytearray | memoryview) -> bool:
        """Check a patch in full and keep it for `commit`; the model is not touched.

        Returns:
            False where the model already holds this version or a later one: nothing is staged.

        Raises:
            MissingVersionError: it builds on a version that the model does not hold.
            PatchError: it is damaged, forged, or of another run.
            TypeError: it is neither a Patch nor bytes.
        """
        with self.lock:
            self._staged = None
            if isinstance(patch, bytes | bytearray | memoryview):
                patch = Patch.from_bytes(patch)
            if not isinstance(patch, Patch):
                raise TypeError(f"patch: expected a Patch or its bytes, got {type(patch).__name__}")
            if self._now is not None and patch.version <= self.version:
                same_run = patch.run == self._now.run
                if not same_run or (patch.version == self.version and patch.digest != self.digest):
                    raise PatchError(
                        f"version {patch.version} of run {patch.run!r}, but the model holds "
                        f"{self.version} of run {self._now.run!r}: reset() first, or publish with "
                        "WeightPublisher(version=...) if one goes on from the other"
                    )
                return False
            if patch.manifest is not None:
                whole, is_new = patch, None
            elif self._now is None or patch.parent != self._now.digest:
                raise MissingVersionError(
                    f"version {patch.version} builds on one that the model does not hold (it has "
                    f"{self.version}): give it a whole patch, WeightPublisher.whole()"
                )
            else:
                whole, is_new = apply_increment(self._now, patch)
            check_whole(whole, self._key)
            self._staged = whole, is_new
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
            (whole, is_new), self._staged = self._staged, None
            before = self._now
            if before is not None and before.parent != whole.parent:
                self._exchange(whole)
            else:
                if before is None:
                    self._join(whole)
                self._move(whole, is_new)
            same_tensors = before is not None and before.parent == whole.parent
            self._before = before if before and before.version and same_tensors else None

    def rollback(self) -> None:
        """Go back to the version before the last `commit`.

        Raises:
            ValueError: there is none: only one step back is kept.
            PatchError: other code has written the model. It is as before.
        """
        with self.lock:
            if self._before is None:
                raise ValueError("no earlier version is kept: reset() puts the base back")
            self._move(self._before)
            self._before = self._staged = None

    def reset(self) -> None:
        """Put the base back. The next patch must be whole.

        Raises:
            PatchError: other code has written the model. It is as before.
        """
        with self.lock:
            if self._now is not None:
                self._move(base_of(self._now))
            self._now, self._before, self._staged = None, None, None
            self._sparse, self._dense, self._fixed = [], [], []

    def verify(self) -> None:
        """Read all tensors of the run and compare them with base and version.

        Raises:
            PatchError: the model does not hold the version.
        """
        with self.lock:
            if self._now is None:
                return
            self._check_unwritten()
            for held, value in zip(self._sparse, self._now.values(), strict=True):
                held.check(value)
            for held in self._fixed:
                held.check(held.original)
            for (located, _), wholes in zip(self._dense, self._wholes(self._now), strict=True):
                _check_dense(located, wholes)

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
        if isinstance(self._model, nn.Module):
            return plain_tensors(self._model)
        return self._model if isinstance(self._model, Mapping) else self._model()

    def _join(self, whole: Patch) -> None:
        """Find a run's tensors in the model, which holds the base, and check that it does."""
        views, manifest = self._views(), whole.full_manifest
        names: dict[str, list[str]] = {}
        for alias, name in manifest.tied.items():
            names.setdefault(name, [name]).append(alias)
        sparse, dense = (
            [Located(spec, names.get(spec.name, [spec.name]), views) for spec in part]
            for part in (manifest.sparse, manifest.dense)
        )
        check_disjoint([*sparse, *dense])
        self._fixed = [
            Held.base(Located(spec, [spec.name], views))
            for spec in manifest.fixed
            if spec.name in views
        ]
        self._sparse = [Held.base(located) for located in sparse]
        self._dense = [
            (located, [host_copy(target.view) for target in located.targets]) for located in dense
        ]
        self._now, self._before = base_of(whole), None

    def _exchange(self, whole: Patch) -> None:
        """Go back to the base, and on from there to a version with other tensors."""
        assert self._now is not None
        now, before = self._now, self._before
        self._move(base_of(now))
        base = self._sparse, self._dense, self._fixed, self._now
        try:
            self._join(whole)
            self._move(whole)
        except BaseException:
            self._sparse, self._dense, self._fixed, self._now = base
            self._move(now)
            self._before = before
            raise

    def _move(self, whole: Patch, is_new: Tensor | None = None) -> None:
        """Bring the model from the version that it holds to another one.

        Args:
            is_new: (n,), bool, which of its entries are new; None where others may be gone.
        """
        now = self._check_unwritten()
        before, counts = self._sparse, whole.new.tolist()
        after = [
            held.at(position, new)
            for held, position, new in zip(
                before,
                whole.position.split(counts),
                (None for _ in counts) if is_new is None else is_new.split(counts),
                strict=True,
            )
        ]
        try:
            self._write(before, after, whole, keep_all=is_new is not None)
            self._sparse, self._now = after, whole
            self._note()
        except BaseException:  # also an interrupt: never leave half a version
            self._write(after, before, now, keep_all=False)
            self._sparse, self._now = before, now
            self._note()
            raise

    def _write(self, old: list[Held], new: list[Held], whole: Patch, *, keep_all: bool) -> None:
        """Write a version over another one; `keep_all`: it has all entries of that one."""
        for before, after, value in zip(old, new, whole.values(), strict=True):
            for number, target in enumerate(after.located.targets):
                if not keep_all and after.places is not before.places:
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
        held = (each.located for each in (*self._sparse, *self._fixed))
        return [*held, *(located for located, _ in self._dense)]

    def _check_unwritten(self) -> Patch:
        """The version; PatchError if the tensors no longer hold it. Reads only those that were
        written, replaced or moved since, and finds them anew.
        """
        views, now = self._views(), self._now
        assert now is not None
        values: list[Tensor] = []
        for index, held in enumerate(self._sparse):
            if not held.located.is_noted(views):
                values = values or now.values()
                self._sparse[index] = held.found_again(views, values[index])
        for index, held in enumerate(self._fixed):
            if not held.located.is_noted(views):
                self._fixed[index] = held.found_again(views, held.original)
        wholes = self._wholes(now)
        for index, (old, originals) in enumerate(self._dense):
            if not old.is_noted(views):
                located = old.anew(views)
                _check_dense(located, wholes[index])
                self._dense[index] = located, originals
        return now


def _check_dense(located: Located, wholes: list[Tensor]) -> None:
    """Raise PatchError unless the targets of a dense tensor hold these."""
    found = [target.view.cpu() for target in located.targets]
    if len(found) != len(wholes) or not all(map(same_bits, found, wholes)):
        raise PatchError(outside_write(located.spec.name))

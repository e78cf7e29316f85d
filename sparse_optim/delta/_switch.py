"""Many deltas over one model, one of them in it at a time: a switch costs its entries.

A delta is checked once, when it joins: against the base's fingerprints, by writing it and taking it
out again. A switch then writes the originals of one delta and the values of the next, and reads
nothing but versions: tensors that other code has written since are checked in full first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from threading import Condition, local

from torch import Tensor

from sparse_optim.delta._apply import Write, checked_writes, one_thread_at_a_time
from sparse_optim.delta._exchange import Exchange
from sparse_optim.delta._fingerprint import fingerprint
from sparse_optim.delta._tensors import (
    Model,
    Tensors,
    gather,
    named_tensors,
    same_bits,
    scatter_,
    version_of,
)
from sparse_optim.delta._types import Delta, check_delta
from sparse_optim.delta._values import DeltaError
from sparse_optim.warn import warn_user

Mark = tuple[int, int, int]  # of a tensor: object, address, version


class Task:
    """A delta that was checked: what it writes, and what of the base it replaces.

    On a GPU, entries are swapped by one operation (`_exchange`); its first two swaps, in and out,
    are compared with what they should have written. Other entries, and whole tensors, are written
    one tensor after the other.
    """

    def __init__(
        self, writes: list[Write], originals: list[Write], fingerprints: dict[str, str]
    ) -> None:
        self.writes, self.originals, self.fingerprints = writes, originals, fingerprints
        self._exchange: Exchange | None = None
        self._unseen = 0  # swaps that are still compared
        self._trusted = True

    def enter(self, tensors: Tensors) -> None:
        """Write the delta into the model, which has the base's values."""
        self._bring(tensors, self.writes)

    def leave(self, tensors: Tensors) -> None:
        """Write the base's values into the model, which has the delta's."""
        self._bring(tensors, self.originals)

    def rewrite(self, tensors: Tensors, writes: list[Write]) -> None:
        """Write `self.writes` or `self.originals`, whatever the model holds."""
        self._exchange = None  # which of the two it holds is not known
        for write in writes:
            scatter_(tensors[write.name], write.position, write.value)

    def settle(self, tensors: Tensors) -> None:
        """Keep what is written tensor by tensor on the tensors' devices."""
        swapped = set() if self._exchange is None else self._exchange.names

        def moved(write: Write) -> Write:
            if write.name in swapped:
                return write
            at, place = tensors[write.name].device, write.position
            place = None if place is None else place.to(at)
            return replace(write, position=place, value=write.value.to(at))

        self.writes = [moved(write) for write in self.writes]
        self.originals = [moved(write) for write in self.originals]

    def fits(self, name: str, tensor: Tensor) -> bool:
        """Whether a tensor is that of the base, as far as the delta knows it."""
        if name in self.fingerprints:
            return fingerprint(tensor) == self.fingerprints[name]
        wholes = (write.value for write in self.originals if write.name == name)
        return all(same_bits(tensor.cpu().contiguous(), value.cpu()) for value in wholes)

    def _bring(self, tensors: Tensors, wanted: list[Write]) -> None:
        swapped: set[str] = set()
        if self._trusted:
            if self._exchange is None or not self._exchange.bind(tensors):
                self._exchange, self._unseen = Exchange(tensors, wanted), 2
                self._exchange.bind(tensors)
            self._exchange.swap(tensors)
            swapped = self._exchange.names
        for write in wanted:
            if write.name not in swapped:
                scatter_(tensors[write.name], write.position, write.value)
        if swapped and self._unseen:
            self._unseen -= 1
            self._compare(tensors, [write for write in wanted if write.name in swapped])

    def _compare(self, tensors: Tensors, wanted: list[Write]) -> None:
        wrong = [
            write.name
            for write in wanted
            if not same_bits(gather(tensors[write.name], write.position), write.value.cpu())
        ]
        if not wrong:
            return
        self._trusted = False
        self.rewrite(tensors, wanted)
        warn_user(
            f"switching entries of {wrong[0]!r} by one operation on {tensors[wrong[0]].device} did "
            "not give the delta's values; they are written tensor by tensor, which is slower. "
            "Report this, unless tensors of the model share memory",
            RuntimeWarning,
        )


class DeltaSwitcher:
    """Several deltas over one base, one of them (or none) in the model at a time.

    Threads may share it: switches, `add` and `remove` wait for one another, and for the `using`
    blocks of others. An error or an interrupt leaves in the model what was there before. Writes by
    other code are noticed where torch counts them: not those through `.data`, or to tensors of
    inference mode.
    Holds 12 to 16 bytes an entry of each delta; with the model on a GPU, these on the host and 8 on
    the GPU, where a switch is two kernels for all tensors (unrun on a GPU so far).

    Args:
        model: a module, or a mapping of tensors, that holds the base's values.
        deltas: name -> delta, as `add` takes them.

    Attributes:
        active: name of the delta that is in the model; None for the base.

    Raises:
        DeltaError: as `add`. The model is untouched.

    Examples:
        ```python
        tasks = DeltaSwitcher(model, {"sst2": load_delta(a), "cola": load_delta(b)})
        tasks.use("sst2")
        tasks.use(None)  # the base
        with tasks.using("cola"):  # another thread's switch waits until the block ends
            model(**batch)
        ```
    """

    def __init__(self, model: Model, deltas: Mapping[str, Delta] | None = None) -> None:
        self.active: str | None = None
        self._model = model
        self._tasks: dict[str, Task] = {}
        self._marks: dict[str, Mark] = {}
        self._turn = Condition()
        self._blocks: set[object] = set()  # that threads are in
        self._queue: list[object] = []  # of threads that wait, in the order in which they came
        self._mine = local()  # `blocks`: those of this thread
        for name, delta in (deltas or {}).items():
            self.add(name, delta)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the deltas."""
        return tuple(self._tasks)

    def add(self, name: str, delta: Delta) -> None:
        """Check a delta against the base and keep it for switches; takes the active one out.

        Raises:
            DeltaError: the name is taken, the delta does not fit the base (the model holds the base
                then), or this thread is in a `using` block.
            TypeError: `delta` is not a Delta.
        """
        check_delta(delta, f"delta {name!r}")
        with self._when_unread(f"add {name!r}"):
            if name in self._tasks:
                raise DeltaError(f"a delta {name!r} is there already: remove it first")
            if self.active is not None:
                self._switch(None)
            self._tasks[name] = self._checked(delta)
            self._note(named_tensors(self._model))

    def remove(self, name: str) -> None:
        """Forget a delta; if it is active, the model holds the base then.

        Raises:
            DeltaError: no such name, or this thread is in a `using` block.
        """
        with self._when_unread(f"remove {name!r}"):
            self._check_name(name)
            if self.active == name:
                self._switch(None)
            del self._tasks[name]

    def use(self, name: str | None) -> None:
        """Replace the current delta by delta `name` (None: the base alone).

        Raises:
            DeltaError: no such name, this thread is in a `using` block of another one, or other
                code has written the tensors since. The model is unchanged.
        """
        with self._with(name):
            pass

    @contextmanager
    def using(self, name: str | None) -> Iterator[None]:
        """A block in which delta `name` is in the model: threads with the same name share it, and
        others wait.

        Raises:
            DeltaError: as `use`.
        """
        block = object()
        try:
            try:
                with self._with(name):
                    self._blocks.add(block)
                    self._my_blocks.add(block)
                yield
            finally:
                self._leave(block)
        finally:  # once more, should an interrupt come in the line above
            self._leave(block)

    def _leave(self, block: object) -> None:
        with self._turn:
            self._blocks.discard(block)
            self._my_blocks.discard(block)
            self._turn.notify_all()

    @property
    def _my_blocks(self) -> set[object]:
        found: set[object] = vars(self._mine).setdefault("blocks", set())
        return found

    @contextmanager
    def _with(self, name: str | None) -> Iterator[None]:
        """Hold the lock, with delta `name` in the model."""
        self._check_name(name)
        if self._my_blocks:
            if self.active != name:
                raise DeltaError(
                    f"this thread is in a block with {self.active!r} in the model: end it before "
                    f"you use {name!r}"
                )
            with self._turn:
                yield
            return
        with self._at_turn(lambda: self.active == name or not self._blocks):
            self._check_name(name)  # or it was removed meanwhile
            if self.active != name:
                self._switch(name)
            yield

    @contextmanager
    def _when_unread(self, what: str) -> Iterator[None]:
        """Hold the lock while no thread is in a block."""
        if self._my_blocks:
            raise DeltaError(
                f"this thread is in a block with {self.active!r} in the model: end it before you "
                f"{what}"
            )
        with self._at_turn(lambda: not self._blocks):
            yield

    @contextmanager
    def _at_turn(self, may_go: Callable[[], bool]) -> Iterator[None]:
        """Hold the lock, after the threads that came before, once `may_go`."""
        ticket = object()
        with self._turn:
            try:
                try:
                    self._queue.append(ticket)
                    self._turn.wait_for(lambda: self._queue[0] is ticket and may_go())
                finally:
                    self._drop(ticket)
            finally:  # as in `using`
                self._drop(ticket)
            yield

    def _drop(self, ticket: object) -> None:
        self._queue = [other for other in self._queue if other is not ticket]
        self._turn.notify_all()

    @one_thread_at_a_time
    def _checked(self, delta: Delta) -> Task:
        """A delta that was in the model, which holds the base, and was taken out again."""
        tensors = named_tensors(self._model)
        writes, originals, _ = checked_writes(tensors, delta)
        known = {write.name for write in writes} & delta.fingerprints.keys()
        task = Task(writes, originals, {name: delta.fingerprints[name] for name in known})
        try:
            task.enter(tensors)
            task.leave(tensors)
            task.settle(tensors)
        except BaseException:
            task.rewrite(tensors, task.originals)
            self._note(tensors)
            raise
        return task

    @one_thread_at_a_time
    def _switch(self, name: str | None) -> None:
        tensors = named_tensors(self._model)
        was = self.active
        before = None if was is None else self._tasks[was]
        after = None if name is None else self._tasks[name]
        self._check_unchanged(tensors, before)
        try:
            if before:
                before.leave(tensors)
            if after:
                after.enter(tensors)
            self._note(tensors)
            self.active = name
        except BaseException:  # also an interrupt: never leave half a delta
            self.active = was
            if after:
                after.rewrite(tensors, after.originals)
            if before:
                before.rewrite(tensors, before.writes)
            self._note(tensors)
            raise

    def _check_unchanged(self, tensors: Tensors, active: Task | None) -> None:
        """Raise DeltaError if tensors of any delta no longer hold base or active delta.

        Reads only those that were written, replaced or moved since the last switch.
        """
        missing = self._marks.keys() - tensors.keys()
        if missing:
            raise DeltaError(f"{min(missing)!r} is no longer in the model")
        changed = {name for name, mark in self._marks.items() if mark != _mark(tensors[name])}
        if not changed:
            return
        here = {write.name: write for write in (active.writes if active else ())}
        base = {write.name: write for write in (active.originals if active else ())}
        for name in sorted(changed):
            tensor = tensors[name].detach()
            if name in here:
                wanted = here[name]
                if not same_bits(gather(tensor, wanted.position), wanted.value.cpu()):
                    raise DeltaError(_written(name))
                tensor = tensor.clone()
                scatter_(tensor, base[name].position, base[name].value)
            for task in self._tasks.values():
                if not task.fits(name, tensor):
                    raise DeltaError(_written(name))

    def _note(self, tensors: Tensors) -> None:
        """The tensors of all deltas are as this object left them."""
        names = {write.name for task in self._tasks.values() for write in task.writes}
        self._marks = {name: _mark(tensors[name]) for name in names}

    def _check_name(self, name: str | None) -> None:
        if name is not None and name not in self._tasks:
            raise DeltaError(f"no delta {name!r}: expected one of {sorted(self._tasks)}")


def _mark(tensor: Tensor) -> Mark:
    return id(tensor), tensor.data_ptr(), version_of(tensor)


def _written(name: str) -> str:
    return (
        f"other code has changed {name!r} since the last switch (training, load_state_dict, "
        "another delta): undo that first, or load the base again and build a new DeltaSwitcher"
    )

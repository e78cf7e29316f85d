"""Write a delta to a live model and revert it, or merge it into a state dict.

Everything is checked before the first write; a write that fails is rolled back. So either the
whole delta is in the model or the model is untouched. One thread at a time writes, whatever the
model: models may share tensors. To compute with the model while other threads switch deltas, hold
a lock of your own.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from functools import wraps
from threading import RLock
from types import TracebackType
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

from sparse_optim.delta._fingerprint import fingerprint
from sparse_optim.delta._names import match_names, renamed, untied
from sparse_optim.delta._tensors import (
    Model,
    Tensors,
    gather,
    host_copy,
    named_tensors,
    same_bits,
    scatter_,
    storage_key,
)
from sparse_optim.delta._types import Delta, check_delta
from sparse_optim.delta._values import DeltaError
from sparse_optim.warn import warn_user

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")
_writing = RLock()


def one_thread_at_a_time(
    function: Callable[_Arguments, _Result],
) -> Callable[_Arguments, _Result]:
    @wraps(function)
    def guarded(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> _Result:
        with _writing:
            return function(*args, **kwargs)

    return guarded


@dataclass(frozen=True, eq=False)
class Write:
    """tensor `name`.flat[position] <- value, or with position None: the whole tensor."""

    name: str
    shape: tuple[int, ...]
    position: Tensor | None
    value: Tensor


class AppliedDelta:
    """A delta that has been written to a model, and the original values that it replaced.

    As a context manager it reverts at exit, unless it has been reverted inside.

    Attributes:
        skipped: names of the delta that the model lacks (`strict=False` only).
        writes, originals: what was written, and what was there before.
    """

    def __init__(
        self, model: Model, writes: list[Write], originals: list[Write], skipped: tuple[str, ...]
    ) -> None:
        self.skipped, self.writes, self.originals = skipped, writes, originals
        self._model = model
        self._reverted = False

    @one_thread_at_a_time
    def revert(self) -> None:
        """Put the originals back, bit for bit. Tensors are looked up by name again, so the model
        may have moved to another device meanwhile.

        Raises:
            DeltaError: already reverted, or an entry no longer holds the delta's value (something
                was applied or trained on top: undo that first). The model is untouched.
        """
        if self._reverted:
            raise DeltaError("this delta was reverted already")
        tensors = named_tensors(self._model)
        _check_holds(tensors, self.writes)
        write_all(tensors, self.originals, undo=self.writes)
        self._reverted = True

    def __enter__(self) -> "AppliedDelta":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._reverted:
            return
        try:
            self.revert()
        except DeltaError as failure:
            if error is None:
                raise
            # The caller's own exception goes on, KeyboardInterrupt included.
            told = f"besides, the delta could not be reverted: {failure}"
            if hasattr(error, "add_note"):  # Python 3.11
                error.add_note(told)
            else:
                warn_user(told, RuntimeWarning)


@one_thread_at_a_time
def apply_delta(model: Model, delta: Delta, strict: bool = True) -> AppliedDelta:
    """Write a delta into a live model, in place.

        tensor.flat[position] <- value        for sparse parameters
        tensor <- value                       for dense ones

    Weights tied in the model are written once. Optimizers that cache bounds of weights see it by
    `tensor._version`.

    Args:
        model: a module, or a mapping of tensors; it must hold the base's values.
        strict: whether the model must have every name. With False, names that it lacks are
            skipped (an encoder without the delta's head); everything else is checked.

    Returns:
        A handle that holds the originals: `revert()`, or use it in a `with`.

    Raises:
        DeltaError: a name, shape, dtype, fingerprint or kind of storage does not fit, or `delta`
            is an increment. The model is untouched.
        TypeError: `delta` is not a Delta.
    """
    tensors = named_tensors(model)
    writes, originals, skipped = checked_writes(tensors, delta, strict)
    write_all(tensors, writes, undo=originals)
    return AppliedDelta(model, writes, originals, skipped)


def checked_writes(
    tensors: Tensors, delta: Delta, strict: bool = True
) -> tuple[list[Write], list[Write], tuple[str, ...]]:
    """What brings a delta into a live model, what takes it out again, and the names that the model
    lacks (`strict=False`). Nothing is written; raises as `apply_delta`."""
    check_delta(delta, "delta")
    delta, skipped = _fitted(tensors, delta, strict)
    writes = _writes(delta)
    check_base(tensors, delta, delta.sparse)
    for write in writes:
        if write.position is None:
            _check_target(tensors, write.name, write.shape, write.value.dtype)
    writes = _drop_tied(tensors, writes)
    return writes, _read_all(tensors, writes), skipped


@one_thread_at_a_time
def revert_delta(model: Model, delta: Delta, strict: bool = True) -> None:
    """Revert a delta with the original values that the delta itself stores.

    Args:
        model: a module, or a mapping of tensors, with the delta in it.
        strict: whether every dense tensor must have an original (a fresh head has none). With
            False those without stay as they are, and names that the model lacks are skipped.

    Raises:
        DeltaError: an original is not stored, the delta is not in the model, or the result would
            not be the base (by its fingerprints). The model is untouched.
    """
    check_delta(delta, "delta")
    tensors = named_tensors(model)
    delta, _ = _fitted(tensors, delta, strict)
    kept = () if strict else tuple(delta.dense.keys() - delta.dense_original.keys())
    writes = _writes(delta, kept)
    originals = [_stored_original(delta, write) for write in writes]
    _check_holds(tensors, writes)
    for write in originals:
        if write.position is not None:
            result = tensors[write.name].detach().clone()
            scatter_(result, write.position, write.value)
            if fingerprint(result) != delta.fingerprints[write.name]:
                raise DeltaError(
                    f"{write.name!r}: reverting would not give the delta's base: other entries "
                    "of this tensor were changed too"
                )
    write_all(tensors, originals, undo=writes)


def merge(delta: Delta, state_dict: Tensors) -> dict[str, Tensor]:
    """base + delta as a full state dict, bit for bit the trained model's.

    Args:
        state_dict: the base. It is not changed; the result shares its untouched tensors. Dense
            tensors replace those of the same name, of any shape, or are added. Names tied
            in the base stay tied. Names may differ by wrappers and one prefix, as in
            `merge_folder`.

    Raises:
        DeltaError: a sparse parameter is missing, or its shape, dtype or fingerprint differs, or
            `delta` is an increment.
    """
    check_delta(delta, "delta")
    tensors = named_tensors(state_dict)
    _require_whole(delta)
    naming = match_names(delta, tensors)
    tensors = {naming.base[name]: tensor for name, tensor in tensors.items()}
    delta = _untied(renamed(delta, naming), tensors)
    check_base(tensors, delta, delta.sparse)
    changed: dict[str, Tensor] = {}
    for name, values in delta.sparse.items():
        changed[name] = tensors[name].detach().clone()
        scatter_(changed[name], values.position, values.value)
    for name, tensor in delta.dense.items():
        changed[name] = host_copy(tensor)
        if name in tensors:
            changed[name] = changed[name].to(tensors[name].device)
    tied = {storage_key(tensors[name]): new for name, new in changed.items() if name in tensors}
    merged = {naming.base.get(name, name): value for name, value in state_dict.items()}
    for name, tensor in tensors.items():
        merged[name] = tied.get(storage_key(tensor), tensor)
    return merged | changed


def check_base(tensors: Tensors, delta: Delta, names: Collection[str]) -> None:
    """Raise DeltaError unless the sparse parameters `names` are those of the delta's base."""
    for name in names:
        _check_target(tensors, name, delta.sparse[name].shape, delta.sparse[name].dtype)
    wrong = [name for name in names if fingerprint(tensors[name]) != delta.fingerprints[name]]
    if wrong:
        raise DeltaError(
            f"not the base of this delta: {len(wrong)} of {len(names)} sparse parameters have "
            f"other values, the first is {wrong[0]!r}. Load the base that was fine-tuned, and "
            "revert other deltas before this one"
        )


def _require_whole(delta: Delta) -> None:
    if delta.parent is not None:
        raise DeltaError(
            f"an increment over delta {delta.parent}: compose it with that delta first"
        )


def _absent_message(absent: list[str], count: int) -> str:
    return (
        f"{len(absent)} of the delta's {count} tensors are not in the model, the first is "
        f"{absent[0]!r}: load the class of model that was fine-tuned"
    )


def _fitted(tensors: Tensors, delta: Delta, strict: bool) -> tuple[Delta, tuple[str, ...]]:
    """The delta with a live model's names; the names that the model lacks (`strict=False`)."""
    _require_whole(delta)
    names = (*delta.sparse, *delta.dense)
    naming = match_names(delta, tensors, live=True, partly=not strict)
    there = {ours: name for ours, name in naming.delta.items() if name in tensors}
    absent = [name for name in names if name not in there]
    if absent and (strict or not there):
        raise DeltaError(_absent_message(absent, len(names)))
    fitted = renamed(delta, replace(naming, delta=there))
    return _untied(fitted, tensors), tuple(absent)


def _untied(delta: Delta, tensors: Tensors) -> Delta:
    """The delta with the values of tied tensors under both names, where the base holds both."""
    copies = [
        alias
        for alias, name in delta.tied.items()
        if alias in tensors
        and name in tensors
        and storage_key(tensors[alias]) != storage_key(tensors[name])
        # A dense tensor has no fingerprint of the base: only an equal one is a copy.
        and (name in delta.sparse or same_bits(tensors[alias], tensors[name]))
    ]
    return untied(delta, copies)


def _writes(delta: Delta, skipped: Collection[str] = ()) -> list[Write]:
    sparse = [
        Write(name, values.shape, values.position, values.value)
        for name, values in delta.sparse.items()
    ]
    dense = [Write(name, tuple(whole.shape), None, whole) for name, whole in delta.dense.items()]
    return [write for write in (*sparse, *dense) if write.name not in skipped]


def _stored_original(delta: Delta, write: Write) -> Write:
    if write.position is None:
        original = delta.dense_original.get(write.name)
    else:
        original = delta.sparse[write.name].original
    if original is None:
        raise DeltaError(
            f"{write.name!r}: the delta stores no originals: revert by the handle of apply_delta, "
            "or load the base again"
        )
    return replace(write, value=original)


def _check_target(tensors: Tensors, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    tensor = tensors.get(name)
    if tensor is None:
        raise DeltaError(f"{name!r} is no longer in the model")
    if tuple(tensor.shape) != shape:
        raise DeltaError(
            f"{name!r}: the delta is for shape {shape}, the model has "
            f"{tuple(tensor.shape)}: build the model as it was fine-tuned (for a head: the same "
            "number of labels)"
        )
    if tensor.dtype != dtype:
        raise DeltaError(
            f"{name!r}: the delta is for {dtype}, the model has {tensor.dtype}: convert the delta, "
            f"delta.to({tensor.dtype}, base={dtype} base)"
        )
    plain = type(tensor).__torch_dispatch__ is Tensor.__torch_dispatch__
    if not plain or tensor.layout is not torch.strided or tensor.device.type == "meta":
        raise DeltaError(
            f"{name!r}: expected a plain strided tensor with data, got {type(tensor).__name__}, "
            f"layout {tensor.layout}, device {tensor.device}: gather or materialise it first"
        )
    strides = zip(tensor.shape, tensor.stride(), strict=True)
    if any(stride == 0 and size > 1 for size, stride in strides):
        raise DeltaError(f"{name!r}: an expanded tensor cannot be written entry by entry: clone it")
    if tensor.is_conj() or tensor.is_neg():
        raise DeltaError(f"{name!r}: a lazily conjugated or negated view: resolve it first")
    if tensor.is_inference() and not torch.is_inference_mode_enabled():
        raise DeltaError(f"{name!r}: made in inference mode: clone it, or apply in inference mode")


def _drop_tied(tensors: Tensors, writes: list[Write]) -> list[Write]:
    first: dict[object, Write] = {}
    for write in writes:
        known = first.setdefault(storage_key(tensors[write.name]), write)
        same_position = (
            known.position is write.position
            if known.position is None or write.position is None
            else torch.equal(known.position, write.position)
        )
        if not (same_position and same_bits(known.value, write.value)):
            raise DeltaError(
                f"{known.name!r} and {write.name!r} are tied in the model, but the delta holds "
                "different values for them: untie them first"
            )
    return list(first.values())


def _check_holds(tensors: Tensors, writes: list[Write]) -> None:
    for write in writes:
        _check_target(tensors, write.name, write.shape, write.value.dtype)
        if not same_bits(gather(tensors[write.name], write.position), write.value):
            raise DeltaError(
                f"{write.name!r} does not hold the delta's values: something was applied or "
                "trained on top of it, or it was reverted: undo that first"
            )


def _read_all(tensors: Tensors, writes: list[Write]) -> list[Write]:
    return [replace(write, value=gather(tensors[write.name], write.position)) for write in writes]


def write_all(tensors: Tensors, writes: list[Write], undo: list[Write]) -> None:
    """Write, and read again what was written; a failure undoes it.

    Raises:
        DeltaError: two of the tensors share memory and disagree.
    """
    try:
        for write in writes:
            scatter_(tensors[write.name], write.position, write.value)
        for write, now in zip(writes, _read_all(tensors, writes), strict=True):
            if not same_bits(write.value, now.value):
                raise DeltaError(
                    f"{write.name!r} shares memory with another tensor of the delta that has "
                    "other values there: untie them first"
                )
    except BaseException:  # Also an interrupt: never leave half a delta.
        for write in undo:
            scatter_(tensors[write.name], write.position, write.value)
        raise

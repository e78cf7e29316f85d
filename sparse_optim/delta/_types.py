"""The changes of a fine-tuning in memory: tensors only, no optimizer, no model, no file."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from sparse_optim.delta._fingerprint import fingerprint
from sparse_optim.delta._prefix import first_entries
from sparse_optim.delta._tensors import (
    DTYPE_CODES,
    Model,
    bits,
    gather,
    host_copy,
    named_tensors,
    same_bits,
    storage_key,
)
from sparse_optim.delta._values import (
    DeltaError,
    SparseValues,
    check_positions,
    check_shape,
    unchecked,
)
from sparse_optim.delta._wrappers import plain_names

_FINGERPRINT = re.compile("[0-9a-f]{32}")


def _check_fingerprint(label: str, text: object) -> None:
    if not isinstance(text, str) or not _FINGERPRINT.fullmatch(text):
        raise DeltaError(f"{label}: expected 32 lower-case hex digits, got {str(text)[:80]!r}")


def _check_name(name: object) -> None:
    if not isinstance(name, str) or not name or not name.isprintable():
        raise DeltaError(f"parameter name: expected printable text, got {str(name)[:80]!r}")


@dataclass(frozen=True, eq=False, repr=False)
class Delta:
    """The changes that fine-tuning made to a model.

        base with .flat[position] = value for `sparse`, and `dense` whole == the trained model

    bit for bit. The order of `sparse` is the parameter order (it breaks ties in `prefix`).
    Tensors are copied to the host; `method` is normalised to what JSON gives back.

    Args:
        sparse: changed entries by parameter name.
        dense: whole tensors by name: a fresh head, or a tensor that takes less space whole.
        fingerprints: `fingerprint` of the BASE's tensor, for every name in `sparse`.
        method: JSON values: the method's name and arguments.
        dense_original: the base's tensors for names in `dense`, so that they can be reverted.
        parent: content fingerprint of the delta that this one is an increment over, or None.
        removed: positions, (n,) int64, of the parent's entries that are no longer changed.
            Increments only.
        tied: further names of tensors in `sparse` or `dense`, which were one in the trained model.

    Raises:
        DeltaError: names the parameter and argument, what was expected, what arrived.
    """

    sparse: Mapping[str, SparseValues]
    dense: Mapping[str, Tensor] = field(default_factory=dict)
    fingerprints: Mapping[str, str] = field(default_factory=dict)
    method: Mapping[str, object] = field(default_factory=dict)
    dense_original: Mapping[str, Tensor] = field(default_factory=dict)
    parent: str | None = None
    removed: Mapping[str, Tensor] = field(default_factory=dict)
    tied: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in (*self.sparse, *self.dense):
            _check_name(name)
        both = self.sparse.keys() & self.dense.keys()
        if both:
            raise DeltaError(f"{min(both)!r}: expected in sparse or in dense, got it in both")
        self._check_fingerprints()
        self._check_dense()
        self._check_removed()
        try:
            method = json.loads(json.dumps(dict(self.method)))
        except (TypeError, ValueError, RecursionError) as error:
            raise DeltaError(f"method: expected values that JSON can hold: {error}") from error
        object.__setattr__(self, "method", method)
        self._check_tied()
        for label in ("sparse", "fingerprints", "tied"):
            object.__setattr__(self, label, dict(getattr(self, label)))
        for label in ("dense", "dense_original", "removed"):
            copies = {name: host_copy(tensor) for name, tensor in getattr(self, label).items()}
            object.__setattr__(self, label, copies)

    def _check_fingerprints(self) -> None:
        odd = self.sparse.keys() ^ self.fingerprints.keys()
        if odd:
            raise DeltaError(
                f"fingerprints: expected exactly the names in sparse; {min(odd)!r} is in only one "
                "of them: give fingerprint(base tensor) for every sparse parameter"
            )
        for name, text in self.fingerprints.items():
            _check_fingerprint(f"fingerprint of {name!r}", text)

    def _check_dense(self) -> None:
        for name, tensor in self.dense.items():
            check_shape(tuple(tensor.shape))
            if tensor.dtype not in DTYPE_CODES:
                raise DeltaError(f"dense {name!r}: safetensors cannot hold {tensor.dtype}")
        for name, original in self.dense_original.items():
            if name not in self.dense:
                raise DeltaError(f"dense_original {name!r}: expected a name that is in dense")
            tensor = self.dense[name]
            if original.shape != tensor.shape or original.dtype != tensor.dtype:
                raise DeltaError(
                    f"dense_original {name!r}: expected {tensor.dtype} {tuple(tensor.shape)} as in "
                    f"dense, got {original.dtype} {tuple(original.shape)}"
                )

    def _check_tied(self) -> None:
        for alias, name in self.tied.items():
            _check_name(alias)
            _check_name(name)
            if name not in self.sparse and name not in self.dense:
                raise DeltaError(f"tied {alias!r}: {str(name)[:80]!r} is not in sparse or dense")
            if alias in self.sparse or alias in self.dense:
                raise DeltaError(f"tied {alias!r}: it has values in sparse or dense")

    def _check_removed(self) -> None:
        if self.parent is not None:
            _check_fingerprint("parent", self.parent)
        elif self.removed:
            raise DeltaError("removed: only an increment (parent given) can remove entries")
        for name, position in self.removed.items():
            if name not in self.sparse:
                raise DeltaError(f"removed {name!r}: expected a name that is in sparse")
            check_positions(f"removed {name!r}", position, self.sparse[name].numel)
            if bool(torch.isin(position.cpu(), self.sparse[name].position).any()):
                raise DeltaError(f"removed {name!r}: a position is both removed and changed")

    def __repr__(self) -> str:
        return (
            f"Delta({self.num_entries} entries in {len(self.sparse)} parameters, "
            f"{len(self.dense)} dense tensors, {self.nbytes} bytes)"
        )

    @property
    def num_entries(self) -> int:
        """Sparse entries in all parameters; dense tensors are not counted."""
        return sum(values.num_entries for values in self.sparse.values())

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors in a file, without its header."""
        whole = (*self.dense.values(), *self.dense_original.values(), *self.removed.values())
        return sum(values.nbytes for values in self.sparse.values()) + sum(
            tensor.nbytes for tensor in whole
        )

    def prefix(self, budget: int) -> "Delta":
        """Keep the first `budget` entries in (unmask_step, parameter order, position) order.

        They keep their FINAL values: this is not the model as it was when that many entries were
        active. Prefixes are nested. A budget beyond `num_entries` keeps all. Dense tensors stay.

        Args:
            budget: entries to keep, >= 0.

        Raises:
            DeltaError: a negative budget, entries without `unmask_step`, or an increment.
        """
        if budget < 0:
            raise DeltaError(f"budget: expected >= 0, got {budget}")
        if self.parent is not None:
            raise DeltaError("an increment has no prefix: compose it with its parent first")
        for name, values in self.sparse.items():
            if values.unmask_step is None and values.num_entries:
                raise DeltaError(f"{name!r}: no unmask_step was stored, so there is no order")

        return unchecked(self, sparse=first_entries(self.sparse, budget))

    def to(self, dtype: torch.dtype, base: Model) -> "Delta":
        """The delta for a base that is served in another dtype (trained in float32, served in
        bfloat16).

            base.to(dtype) + delta.to(dtype, base) == (base + delta).to(dtype)      bit for bit

        Args:
            dtype: a floating-point dtype. Integer and boolean tensors stay as they are.
            base: the base in the dtype in which it was fine-tuned; its fingerprints are checked.
                Those of the result are of the converted base.

        Raises:
            DeltaError: another base, another kind of dtype, or an increment.
        """
        if self.parent is not None:
            raise DeltaError("an increment: compose it with its parent first")
        if not dtype.is_floating_point:
            raise DeltaError(f"dtype: expected a floating-point dtype, got {dtype}")
        tensors, sparse, prints = plain_tensors(base) | named_tensors(base), {}, {}
        further: dict[str, list[str]] = {}
        for alias, name in self.tied.items():
            further.setdefault(name, []).append(alias)
        for name, values in self.sparse.items():
            known = [each for each in (name, *further.get(name, ())) if each in tensors]
            if not known:
                raise DeltaError(f"{name!r} is not in the given base: load the class of the base")
            before = tensors[known[0]]
            if fingerprint(before) != self.fingerprints[name]:
                raise DeltaError(
                    f"{name!r} of the given base is not what was fine-tuned: give the base in "
                    f"{values.dtype}, as it was before training"
                )
            value, original = _cast(values.value, dtype), values.original
            sparse[name] = replace(
                values,
                dtype=value.dtype,
                value=value,
                original=None if original is None else _cast(original, dtype),
            )
            prints[name] = fingerprint(_cast(before, dtype))
        return replace(
            self,
            sparse=sparse,
            fingerprints=prints,
            dense={name: _cast(tensor, dtype) for name, tensor in self.dense.items()},
            dense_original={
                name: _cast(tensor, dtype) for name, tensor in self.dense_original.items()
            },
        )

    @classmethod
    def from_models(
        cls,
        base: Model,
        tuned: Model,
        store_original: bool = False,
        method: Mapping[str, object] | None = None,
    ) -> "Delta":
        """The difference between two models, bit by bit (NaN payloads and -0.0 count).

            sparse while changed * (position bytes + width) < numel * width, else dense

        that is, up to half of the entries in float32 and a third in bfloat16. (With originals:
        width counts twice on both sides.) A tensor that only `tuned` has, or that has another
        shape there, is dense. A tensor that only `base` has is ignored. Tensors tied in both models
        are stored once, under their first name. Names go without wrappers (torch.compile, DDP).

        Args:
            base, tuned: modules, state dicts, or any mapping of tensors.
            store_original: keep the base's values, so that `revert_delta` works.
            method: JSON values to record; {"name": "from_models"} when not given.

        Raises:
            DeltaError: a tensor changed its dtype (cast one of the models first), or is sharded.
        """
        base_tensors, tuned_tensors = plain_tensors(base), plain_tensors(tuned)
        sparse: dict[str, SparseValues] = {}
        dense: dict[str, Tensor] = {}
        dense_original: dict[str, Tensor] = {}
        seen: dict[object, str] = {}
        tied: dict[str, str] = {}
        for name, after in tuned_tensors.items():
            before = base_tensors.get(name)
            if any(hasattr(tensor, "full_tensor") for tensor in (before, after)):
                raise DeltaError(
                    f"{name!r} is a DTensor: give whole tensors, {{name: tensor.full_tensor()}}, "
                    "or take optimizer.delta()"
                )
            if before is None or before.shape != after.shape:
                dense[name] = after
                continue
            key = storage_key(before), storage_key(after)
            if key in seen:
                if seen[key] in sparse or seen[key] in dense:
                    tied[name] = seen[key]
                continue
            seen[key] = name
            values = changed_entries(name, before, after, store_original)
            if values is None or values.num_entries == 0:
                continue
            # Compared as they are in memory and in files with plain positions.
            entry = values.position_dtype.itemsize + (1 + store_original) * after.dtype.itemsize
            if values.num_entries * entry < (1 + store_original) * after.nbytes:
                sparse[name] = values
            else:
                dense[name] = after
                if store_original:
                    dense_original[name] = before
        return cls(
            sparse=sparse,
            dense=dense,
            fingerprints={name: fingerprint(base_tensors[name]) for name in sparse},
            method={"name": "from_models"} if method is None else method,
            dense_original=dense_original,
            tied=tied,
        )


def check_delta(value: object, label: str) -> None:
    """Raise TypeError for what is no delta, such as the path of one."""
    if not isinstance(value, Delta):
        raise TypeError(
            f"{label}: expected a Delta, got {type(value).__name__}; load_delta(path) reads a file"
        )


def plain_tensors(model: Model) -> dict[str, Tensor]:
    """The tensors of a module or mapping by their names without wrappers."""
    tensors = named_tensors(model)
    return {plain: tensors[name] for name, plain in plain_names(tensors).items()}


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.detach().to(dtype) if tensor.is_floating_point() else tensor.detach()


def changed_entries(
    name: str, before: Tensor, after: Tensor, store_original: bool
) -> SparseValues | None:
    """The entries of a tensor that have other bits than before; None if there are none.

    Raises:
        DeltaError: the dtypes differ, or safetensors cannot hold them.
    """
    if before.dtype != after.dtype:
        raise DeltaError(
            f"{name!r}: the base is {before.dtype}, the tuned model {after.dtype}: cast one of "
            "them to the other's dtype first"
        )
    if after.dtype not in DTYPE_CODES:
        raise DeltaError(f"{name!r}: safetensors cannot hold {after.dtype}")
    before, after = before.detach().cpu(), after.detach().cpu()
    if same_bits(before, after):
        return None
    position = (bits(before) != bits(after)).reshape(-1).nonzero().view(-1)
    return SparseValues(
        shape=tuple(after.shape),
        dtype=after.dtype,
        position=position,
        value=gather(after, position),
        original=gather(before, position) if store_original else None,
    )

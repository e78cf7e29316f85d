"""The arithmetic of a merge: what each delta adds to the base, and how that is combined.

    sum         theta = base + sum_i w_i tau_i                 tau_i = value_i - base
    ties        theta = base + mean of the w_i tau_i whose sign is that of sum_i w_i tau_i,
                after each tau_i lost all but its largest entries
    dare        sum, after each tau_i lost entries at random; those that stay are divided by density
    dare-ties   the mean of ties, after the losses of dare

Computed in float64 and rounded once to the parameter's dtype, to the nearest. An entry to which one
delta alone contributes, with weight 1, keeps that delta's bits.

References: task arithmetic, Ilharco et al. 2023, arXiv 2212.04089; TIES, Yadav et al. 2023,
arXiv 2306.01708; DARE, Yu et al. 2024, arXiv 2311.03099.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray
from torch import Tensor

from sparse_optim.delta._tensors import bits
from sparse_optim.delta._values import DeltaError
from sparse_optim.delta._vectors import (
    ONE_THREAD,
    Floats,
    Integers,
    Mask,
    TaskVector,
    as_floats,
    take,
)

METHODS = ("sum", "ties", "dare", "dare-ties")


@dataclass(frozen=True)
class Recipe:
    """How deltas are merged; checked when built.

    Attributes:
        method: one of METHODS.
        density: share of each delta's entries that stays; 1 for "sum".
        seed: of the entries that "dare" drops, else None.
    """

    method: str
    density: float
    seed: int | None

    @classmethod
    def of(cls, method: str, density: float | None, seed: int | None) -> "Recipe":
        """The settings with their defaults.

        Raises:
            DeltaError: an unknown method, or a setting that the method has no use for.
        """
        if method not in METHODS:
            raise DeltaError(f"method: expected one of {', '.join(METHODS)}, got {method!r}")
        at_random = method.startswith("dare")
        if density is None:
            if at_random:
                raise DeltaError(f"density: {method} needs the share of entries that stays")
            density = 1.0
        elif method == "sum":
            raise DeltaError("density: sum keeps all entries: use ties or dare")
        if not 0 < density <= 1:
            raise DeltaError(f"density: expected above 0 and up to 1, got {density}")
        if seed is not None and not at_random:
            raise DeltaError(f"seed: {method} draws no random numbers: use dare")
        return cls(method, float(density), (seed or 0) if at_random else None)

    @property
    def trims(self) -> bool:
        """Whether only the largest entries of each delta stay."""
        return self.seed is None and self.density < 1

    @property
    def elects(self) -> bool:
        """Whether only entries of the elected sign count, by their mean."""
        return self.method.endswith("ties")

    def scale(self, weight: float) -> float:
        """What the entries of a delta that stay are multiplied by."""
        return weight if self.seed is None else weight / self.density


@dataclass(frozen=True)
class Part:
    """What a delta contributes to a merge: n entries.

    Attributes:
        position: (n,), int64, ascending. Places in the flat range.
        base: (n,), the parameters' dtype.
        value: (n,), as `base`. What an entry becomes if only this delta contributes to it.
        added: (n,), float64. The scaled task vector; None: the task vector itself.
    """

    position: Integers
    base: Tensor
    value: Tensor
    added: Floats | None

    @classmethod
    def of(cls, vector: TaskVector, scale: float, keep: "Chooser | None") -> "Part":
        """A delta's task vector times `scale`, without what `keep` drops."""
        position, base, value = vector.position, vector.base, vector.value
        kept = keep and keep(vector.tau)
        if kept is not None:
            position, base, value = position[kept], take(base, kept), take(value, kept)
        if scale == 1:
            return cls(position, base, value, None)
        before = as_floats(base)
        added = scale * (as_floats(value) - before)
        return cls(position, base, rounded(before + added, base.dtype), added)


Counts = NDArray[np.int32]

# tau of the next group of parameters, (n,) float64 -> which entries stay, (n,) bool
Chooser = Callable[[Floats], Mask]


def keep_largest(taus: Sequence[Floats], density: float) -> Chooser | None:
    """round(density n) entries of all `taus` stay, at least one; the first of equal ones.

    None if all stay.

    Args:
        taus: the task vector by groups; the chooser is called with each of them in this order.
    """
    magnitude = np.abs(np.concatenate([np.zeros(0), *taus]))
    count = max(1, round(density * magnitude.size))
    if count >= magnitude.size:
        return None
    bound = np.partition(magnitude, -count)[-count]
    ties = count - int((magnitude > bound).sum())

    def keep(tau: Floats) -> Mask:
        nonlocal ties
        size = np.abs(tau)
        kept: Mask = size > bound
        equal = np.flatnonzero(size == bound)[:ties]
        kept[equal] = True
        ties -= equal.size
        return kept

    return keep


def keep_at_random(density: float, key: str) -> Chooser:
    """Each entry stays with probability `density`: a function of the arguments and its place."""
    generator = np.random.Philox(key=xxhash.xxh3_128_intdigest(key.encode()))

    def keep(tau: Floats) -> Mask:
        uniform = (generator.random_raw(tau.size) >> np.uint64(11)) * 2.0**-53
        kept: Mask = uniform < density
        return kept

    return keep


def combine(parts: Sequence[Part], elect: bool) -> TaskVector:
    """base + the sum of the parts, or with `elect` + the mean of those of the sum's sign.

    Few entries of sparse deltas are shared, so the sum is computed for those alone.

    Returns:
        The entries of all parts, each once.
    """
    position = np.concatenate([part.position for part in parts])
    order = position.argsort(kind="stable")  # which merges runs that are sorted already
    position = position[order]
    value = torch.cat([part.value for part in parts])
    base = torch.cat([part.base for part in parts])
    again = np.zeros(position.size, dtype=np.bool_)
    np.equal(position[1:], position[:-1], out=again[1:])
    if again.any():
        _combine_shared(parts, elect, order, again, base, value)
        first = np.flatnonzero(~again)
        order, position = order[first], position[first]
    return TaskVector(position, take(value, order), take(base, order))


def _combine_shared(
    parts: Sequence[Part], elect: bool, order: Integers, again: Mask, base: Tensor, value: Tensor
) -> None:
    """Compute the entries to which several parts contribute.

    Args:
        order: (n,): the entries of all parts, one part after the other, by position.
        again: (n,): whether an entry of that order has the position of the one before it.
        base: (n,), of the entries of all parts.
        value: (n,), as `base`. The first of each shared entry is written.
    """
    shared = again.copy()
    shared[:-1] |= again[1:]
    index, starts = order[shared], ~again[shared]
    slot, first = starts.cumsum() - 1, index[starts]
    ends = np.cumsum([part.position.size for part in parts])
    owner = ends.searchsorted(index, side="right")
    shares = []
    for number, part in enumerate(parts):
        mine = np.flatnonzero(owner == number)
        at = index[mine] - (ends[number] - part.position.size)
        shares.append(_Share.of(part, at, slot[mine]))
    result = _arithmetic(as_floats(take(base, first)), shares, elect)
    bits(value).numpy()[first] = bits(rounded(result, value.dtype)).numpy()


@dataclass(frozen=True)
class _Share:
    """A part at shared entries: n of them, at `slot`. `exact`: it adds tau itself."""

    slot: Integers
    value: Floats
    added: Floats
    exact: bool

    @classmethod
    def of(cls, part: Part, at: Integers, slot: Integers) -> "_Share":
        value = as_floats(take(part.value, at))
        if part.added is None:
            return cls(slot, value, value - as_floats(take(part.base, at)), True)
        return cls(slot, value, part.added[at], False)

    def where(self, keep: Mask) -> "_Share":
        return _Share(self.slot[keep], self.value[keep], self.added[keep], self.exact)


def _arithmetic(base: Floats, shares: Sequence[_Share], elect: bool) -> Floats:
    """base, (u,), + the sum or the elected mean of the shares."""
    total, count = _sum(base.size, shares)
    if elect:
        sign = np.sign(total)
        agree = [share.added * sign[share.slot] > 0 for share in shares]
        shares = [share.where(keep) for share, keep in zip(shares, agree, strict=True)]
        total, count = _sum(base.size, shares)
        total /= np.maximum(count, 1)
    result = base + total
    if elect and any(share.exact for share in shares):
        final = np.empty_like(result)  # what each entry is if its share is the only one
        for share in shares:
            final[share.slot] = share.value if share.exact else result[share.slot]
        np.copyto(result, final, where=count == 1)
    return result


def _sum(size: int, shares: Sequence[_Share]) -> tuple[Floats, Counts]:
    """What the shares add to each entry, and how many they are."""
    total, count = np.zeros(size), np.zeros(size, dtype=np.int32)
    for share in shares:
        total[share.slot] += share.added
        count[share.slot] += 1
    return total, count


def rounded(value: Floats, dtype: torch.dtype) -> Tensor:
    """float64 values in another floating-point dtype, rounded once to nearest even.

    torch rounds to narrow dtypes by way of float32. So the step to float32 rounds to odd here: an
    inexact value goes towards zero and gets an odd last bit, which the second step cannot mistake
    for a tie (Boldo and Melquiond 2008, doi:10.1109/TC.2007.70819).
    """
    pieces = [_rounded(piece, dtype) for piece in torch.from_numpy(value).split(ONE_THREAD)]
    return torch.cat(pieces) if len(pieces) > 1 else pieces[0]


def _rounded(exact: Tensor, dtype: torch.dtype) -> Tensor:
    if dtype.itemsize >= torch.float32.itemsize:
        return exact.to(dtype)
    nearest = exact.float()
    inexact = nearest.double() != exact
    beyond = nearest.double().abs() > exact.abs()
    truncated = torch.where(beyond, nearest.nextafter(torch.zeros(())), nearest)
    return (truncated.view(torch.int32) | inexact.int()).view(torch.float32).to(dtype)

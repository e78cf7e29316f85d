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

from sparse_optim.delta._values import DeltaError
from sparse_optim.delta._vectors import ONE_THREAD, Floats, Integers, Mask, Vectors

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
    """What a delta adds: n entries at `slot`. `exact`: it adds tau itself, so value is final."""

    slot: Integers
    value: Floats
    added: Floats
    exact: bool

    def where(self, keep: Mask) -> "Part":
        return Part(self.slot[keep], self.value[keep], self.added[keep], self.exact)


def part_of(vectors: Vectors, at: int, scale: float, keep: "Chooser") -> Part:
    """The scaled task vector of a delta, less what `keep` drops."""
    tau = vectors.task_vector(at)
    part = Part(vectors.slots[at], vectors.values[at], scale * tau, exact=scale == 1)
    kept = keep(tau)
    return part if kept is None else part.where(kept)


Counts = NDArray[np.int32]

# tau of the next group of parameters, (n,) float64 -> which entries stay, (n,) bool; None: all.
Chooser = Callable[[Floats], Mask | None]


def keep_all(tau: Floats) -> None:
    """Every entry stays."""


def keep_largest(taus: Sequence[Floats], density: float) -> Chooser:
    """round(density n) entries of all `taus` stay, at least one; the first of equal ones.

    Args:
        taus: the task vector by groups; the chooser is called with each of them in this order.
    """
    magnitude = np.abs(np.concatenate([np.zeros(0), *taus]))
    count = max(1, round(density * magnitude.size))
    if count >= magnitude.size:
        return keep_all
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


def combine(base: Floats, parts: Sequence[Part], elect: bool) -> Floats:
    """base + the sum of the parts, or with `elect` + the mean of those of the sum's sign."""
    total, count = _sum(base.size, parts)
    if elect:
        sign = np.sign(total)
        agree = [part.added * sign[part.slot] > 0 for part in parts]
        parts = [part.where(keep) for part, keep in zip(parts, agree, strict=True)]
        total, count = _sum(base.size, parts)
        total /= np.maximum(count, 1)
    result = base + total
    if any(part.exact for part in parts):
        final = np.empty_like(result)  # what each entry is if its part is the only one
        for part in parts:
            final[part.slot] = part.value if part.exact else result[part.slot]
        np.copyto(result, final, where=count == 1)
    return result


def _sum(size: int, parts: Sequence[Part]) -> tuple[Floats, Counts]:
    """What the parts add to each entry, and how many they are."""
    total, count = np.zeros(size), np.zeros(size, dtype=np.int32)
    for number, part in enumerate(parts):
        if number == 0:
            total[part.slot], count[part.slot] = part.added, 1
        else:
            total[part.slot] += part.added
            count[part.slot] += 1
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

"""Importances: what ranks the entries.

An importance is a function of one parameter and its gradient,

    importance(name, param, grad) -> score of every entry, >= 0; 0 is never unmasked

so any function will do. `D3` alone is ranked by the kernels as they read the
gradients. Every other one costs an extra pass, and a score of every entry while a step lasts
(2 or 4 bytes an entry), in steps that unmask something.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from sparse_optim.backends import scoring
from sparse_optim.warn import warn_user

LARGEST_FINITE_BITS = 0x7F7FFFFF


class Importance(Protocol):
    """What ranks the entries: any function of (name, param, grad).

    An object may also have an attribute `traits`, by which it says more about its scores.
    """

    def __call__(self, name: str, param: Tensor, grad: Tensor, /) -> Tensor:
        """Score of every entry, of the parameter's shape, finite, >= 0; 0 is never unmasked."""
        ...


@dataclass(frozen=True)
class Traits:
    """What an importance says about its scores; the defaults hold for any function.

    Attributes:
        in_kernel: (exp, eps), if the scores are those of `D3`: the kernels rank gradients as they
            read them, and the importance is never called.
        fixed: scores do not depend on gradients; a static set is complete after one step.
        noise_seed: entries are sampled with probabilities proportional to score^2.
        ordinal: scores are an order alone, and no weights to sample by.
        trusted: scores always have the parameter's shape and are finite and >= 0.
        uniform: every score is 1; the importance is never called.
        elementwise: the score of an entry depends on its own value and gradient alone, so that
            shards of a parameter can be scored one by one (`fully_shard`).
        check_names: called with the names of the pool when the optimizer is built.
        check: called with names and parameters that have gradients, before each ranking.
    """

    in_kernel: tuple[float, float] | None = None
    fixed: bool = False
    noise_seed: int | None = None
    ordinal: bool = False
    trusted: bool = False
    uniform: bool = False
    elementwise: bool = False
    check_names: Callable[[Sequence[str]], None] | None = None
    check: Callable[[Sequence[str], Sequence[Tensor]], None] | None = None


def traits_of(importance: Importance) -> Traits:
    """The traits of an importance; those of a plain function if it has none."""
    traits = getattr(importance, "traits", None)
    return traits if isinstance(traits, Traits) else Traits()


@dataclass(frozen=True)
class D3:
    """Rank entries by gradient magnitude, weighed by the parameter's own magnitude.

        importance = |grad| / (|param| + eps)^exp

    exp = 0 ranks by the gradient alone, exp > 0 prefers small parameters, exp < 0 large ones.

    Args:
        exp: any real number.
        eps: above 0, in units of the parameter. For eps >= 1 and exp >= 0 the expected importance
            is at most the square root of the Fisher information (Theorem 1).

    Raises:
        ValueError: if eps is not positive or a number is not finite.

    Reference: Agarwal et al. 2025, equation 1.
    """

    exp: float = 0.0
    eps: float = 1.0

    def __post_init__(self) -> None:
        if not math.isfinite(self.exp):
            raise ValueError(f"D3: exp must be a finite number, got {self.exp}")
        if not (math.isfinite(self.eps) and self.eps > 0):
            raise ValueError(f"D3: eps must be a finite number above 0, got {self.eps}")

    @property
    def traits(self) -> Traits:
        """The kernels rank by exp and eps."""
        return Traits(in_kernel=(self.exp, self.eps), trusted=True, elementwise=True)

    def __call__(self, name: str, param: Tensor, grad: Tensor) -> Tensor:
        """Scores, float32, of the parameter's shape."""
        return scoring.importance(grad, param, self.exp, self.eps)


@dataclass(frozen=True)
class Magnitude:
    """Rank the smallest |param| first; needs no data (PaFi).

    The score is the largest float32 less |param|, counted in units in the last place, so that the
    order is exact. Entries that are zero come first (with a warning, where they fill a matrix); NaN
    and infinity never.

    Reference: Liao et al. 2023, Parameter-Efficient Fine-Tuning without Introducing New Latency
    (PaFi), section 3.1.
    """

    @property
    def traits(self) -> Traits:
        """An order that no gradient changes."""
        return Traits(
            fixed=True, ordinal=True, trusted=True, elementwise=True, check=_warn_of_zeros
        )

    def __call__(self, name: str, param: Tensor, grad: Tensor) -> Tensor:
        """Scores, float32, of the parameter's shape."""
        magnitude = param.detach().float().abs()
        bits = LARGEST_FINITE_BITS - magnitude.view(torch.int32)
        return bits.clamp(min=0).view(torch.float32)


@dataclass(frozen=True)
class Random:
    """Rank entries in random order: a random mask (R-Mask), or with `Repeat` a fresh one at each
    step.

    Args:
        seed: of the order, 64 bits. The order is the same on every backend.

    Reference: Agarwal et al. 2025, section 4 (R-Mask).
    """

    seed: int = 0

    @property
    def traits(self) -> Traits:
        """Equal scores, drawn at random."""
        return Traits(fixed=True, noise_seed=self.seed, uniform=True, elementwise=True)

    def __call__(self, name: str, param: Tensor, grad: Tensor) -> Tensor:
        """Ones of the parameter's shape; the optimizer adds the noise."""
        return torch.ones_like(param, dtype=torch.bfloat16)


@dataclass(frozen=True)
class Snip:
    """Rank by how much the loss changes, to first order, if the entry is set to zero.

        importance = |grad * param|

    Reference: Lee et al. 2019, SNIP, equation 6; He et al. 2022, SparseAdapter, section 3.
    """

    traits: ClassVar[Traits] = Traits(trusted=True, elementwise=True)

    def __call__(self, name: str, param: Tensor, grad: Tensor) -> Tensor:
        """Scores, float32, of the parameter's shape."""
        return (grad.float() * param.detach().float()).abs()


class InputFeatureMeans(Protocol):
    """Where `ActivationWeightGradient` reads the means of this step."""

    def get(self, name: str, /) -> tuple[Tensor, int] | None:
        """Mean of each input feature of a weight, and the weight's dimension that counts them."""
        ...


@dataclass(frozen=True)
class ActivationWeightGradient:
    """Rank connections by what flows through them (Stochastic Tuning).

        importance = |mu * param * grad|,  mu the batch mean of the value that enters the connection

    Args:
        means: its `get(name)` gives (mu, dim) of this step, or None where mu = 1 (biases, norms,
            embeddings): mu one value for each input feature, dim the dimension of the parameter
            that counts them. An `InputMeans`, or a dict.

    Reference: Akbar-Tajari and Pilehvar, Stochastic Fine-Tuning of Language Models Using Masked
    Gradients, Algorithm 1.
    """

    means: InputFeatureMeans
    traits: ClassVar[Traits] = Traits(trusted=True)

    def __call__(self, name: str, param: Tensor, grad: Tensor) -> Tensor:
        """Scores, float32, of the parameter's shape."""
        score = (grad.float() * param.detach().float()).abs()
        found = self.means.get(name)
        if found is not None:
            mean, dim = found
            shape = [1] * param.dim()
            shape[dim] = -1
            score *= mean.float().abs().view(shape)
        return score


class Scores:
    """Scores that were computed before: by a calibration pass, or a mask (bool) to be taken.

    Args:
        scores: {parameter name: tensor of its shape, finite and >= 0}; parameters that it does not
            name are never unmasked.

    Raises:
        ValueError: a score is negative or not finite.

    Examples:
        >>> Scores({"weight": torch.tensor([0.0, 2.0])})("weight", torch.zeros(2), torch.zeros(2))
        tensor([0., 2.])
    """

    def __init__(self, scores: Mapping[str, Tensor]) -> None:
        for name, score in scores.items():
            check_scores(score, name)
        self.scores = dict(scores)

    @property
    def traits(self) -> Traits:
        """Scores that no gradient changes, and whose names must be those of the pool."""
        return Traits(fixed=True, trusted=True, check_names=self.check_names)

    def __repr__(self) -> str:
        return f"Scores(of {len(self.scores)} parameters)"

    def __call__(self, name: str, param: Tensor, grad: Tensor) -> Tensor:
        """Scores, float32, of the parameter's shape.

        Raises:
            ValueError: the scores of this parameter have another shape.
        """
        if name not in self.scores:
            return torch.zeros_like(param, dtype=torch.float32)
        score = self.scores[name]
        if score.shape != param.shape:
            raise ValueError(
                f"Scores: {name} has shape {tuple(param.shape)}, its scores {tuple(score.shape)}"
            )
        return score.to(param.device, torch.float32)

    def check_names(self, names: Sequence[str]) -> None:
        """Raise ValueError if scores of a parameter would go unused: most often a wrong name."""
        unknown = sorted(set(self.scores) - set(names))
        if unknown:
            raise ValueError(
                f"Scores: {unknown[0]} is no parameter of the pool ({len(unknown)} such names); "
                "build the optimizer from model.named_parameters(), and give scores of these alone"
            )


def check_scores(score: Tensor, name: str) -> None:
    """Raise ValueError unless all scores are finite and at least 0."""
    if score.dtype == torch.bool:
        return
    if not bool((score.isfinite() & (score >= 0)).all()):
        raise ValueError(f"the importance of {name} is negative or not finite somewhere")


def _warn_of_zeros(names: Sequence[str], params: Sequence[Tensor]) -> None:
    """Warn of matrices that are all zeros: their entries would be unmasked first."""
    zero = zero_matrices(zip(names, params, strict=True))
    if zero:
        warn_user(
            f"Magnitude: {len(zero)} of the ranked matrices are all zeros (a fresh LoRA B?; the "
            f"first is {zero[0]}), so that their entries are unmasked first, in the order of their "
            "positions; leave them out of the pool, or rank by the gradient (D3)"
        )


def zero_matrices(named_params: Iterable[tuple[str, Tensor]]) -> list[str]:
    """Names of the matrices (two dimensions or more) that are zero throughout: a fresh LoRA's B."""
    matrices = ((name, param) for name, param in named_params if param.dim() > 1 and param.numel())
    return [name for name, param in matrices if not param.any()]

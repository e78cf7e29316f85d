"""How a step ranks entries: by the gradients as they are, or by dense scores."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from sparse_optim.backends import registry as backends
from sparse_optim.backends import scoring
from sparse_optim.optim.groups import SUPPORTED_DTYPES, zero_matrices
from sparse_optim.policy.importance import (
    D3,
    ActivationWeightGradient,
    Importance,
    Magnitude,
    Random,
    Scores,
    Snip,
    check_scores,
    is_fixed,
)
from sparse_optim.policy.selection import Increment, Selection, Stochastic

if TYPE_CHECKING:
    from sparse_optim.optim.masked_adamw import MaskedAdamW

# Entries whose noise is drawn at once where it is not drawn by a kernel: it takes 100 bytes each.
NOISE_ENTRIES = 1 << 16

# Importances whose scores need no check.
OWN = (D3, Magnitude, Snip, ActivationWeightGradient, Scores)


class Ranked(NamedTuple):
    """What `cut` ranks by: see its arguments in `reference`."""

    bound: Any
    tile_max: Tensor
    exp: float
    eps: float
    noise: Tensor
    scores: Sequence[Tensor] = ()  # kept alive: the kernels hold their addresses


@dataclass
class Ranking:
    """Buffers for dense scores; empty where the kernels rank gradients by D3 as they read them.

    Attributes:
        table: as in `reference.bind`, of the scores.
        tile_max: (num_tiles,), int32, of the scores.
        noise: (2,), int64: seed and step; (0,) without sampling.
    """

    table: Tensor
    tile_max: Tensor
    noise: Tensor

    @staticmethod
    def empty(importance: Importance, selection: Selection, like: Any) -> Ranking:
        """Buffers for a pool whose work space is `like`."""
        seed = noise_seed(importance, selection)
        scored = not isinstance(importance, D3) or seed is not None
        noise = [] if seed is None else [seed, 0]
        return Ranking(
            table=torch.zeros_like(like.table[: len(like.table) if scored else 0]),
            tile_max=torch.zeros_like(like.tile_max[: like.tile_max.numel() if scored else 0]),
            noise=torch.tensor(noise, dtype=torch.int64, device=like.table.device),
        )


def needs_param_bound(importance: Importance, selection: Selection) -> bool:
    """Whether the kernels bound tiles by their greatest |param|: D3 with exp < 0."""
    if noise_seed(importance, selection) is not None:
        return False
    return isinstance(importance, D3) and importance.exp < 0


def noise_seed(importance: Importance, selection: Selection) -> int | None:
    """Seed of what samples entries, as a signed 64-bit number; None where nothing does."""
    source = selection if isinstance(selection, Stochastic) else importance
    if not isinstance(source, (Stochastic, Random)):
        return None
    return (source.seed + 2**63) % 2**64 - 2**63


def rank(optimizer: MaskedAdamW, bound: Any, grads: Sequence[Tensor]) -> Ranked | None:
    """What this step's `cut` ranks by; None if there is nothing to unmask.

    Importances other than D3, and sampling, read counts from the device: one synchronisation.
    """
    work, ranking, importance = optimizer._work, optimizer._ranking, optimizer.importance
    ops = backends.operations(optimizer.backend)
    if isinstance(importance, D3) and not ranking.noise.numel():
        return Ranked(bound, work.tile_max, importance.exp, importance.eps, ranking.noise)
    if not unmasks(optimizer) or bool(work.found_inf):
        return None
    set_noise(optimizer)
    scores = _scores(importance, optimizer._names, optimizer._pool, grads)
    scored = ops.bind(scores, optimizer._pool, ranking.table)
    active = optimizer._active
    ops.rank(
        scored, active.position, active.offsets, work.tile_offsets, ranking.noise, ops.TILE,
        ranking.tile_max, work.scratch,
    )  # fmt: skip
    warn_of_scores(optimizer, grads, any_left=bool(ranking.tile_max.any()))
    return Ranked(scored, ranking.tile_max, 0.0, 1.0, ranking.noise, scores)


def scores_of_part(
    optimizer: MaskedAdamW, first: int, grads: Sequence[Tensor]
) -> Sequence[Tensor] | None:
    """What tensors first, first + 1, ... of the pool are ranked by, noise included.

    None where the kernels rank gradients by D3 as they read them.
    """
    if isinstance(optimizer.importance, D3):
        return None
    part = slice(first, first + len(grads))
    scores = _scores(optimizer.importance, optimizer._names[part], optimizer._pool[part], grads)
    noise = optimizer._ranking.noise
    if not noise.numel():
        return scores
    found = []
    for index, score in enumerate(scores, first):
        pieces = score.reshape(-1).float().split(NOISE_ENTRIES)
        found.append(torch.cat([
            scoring.perturbed(piece, noise, index, number * NOISE_ENTRIES)
            for number, piece in enumerate(pieces)
        ]).view(score.shape))  # fmt: skip
    return found


def set_noise(optimizer: MaskedAdamW) -> None:
    """Key the noise by the step, where entries are sampled."""
    if optimizer._ranking.noise.numel():
        optimizer._ranking.noise[1].copy_(optimizer._active.progress[0])


def warn_of_scores(optimizer: MaskedAdamW, grads: Sequence[Tensor], any_left: bool) -> None:
    """Warn of scores that say little: of matrices that are all zeros, or all of them 0.

    Args:
        grads: empty where a parameter has no gradient in this step.
        any_left: whether a frozen entry scores above 0.
    """
    if isinstance(optimizer.importance, Magnitude):
        _warn_of_zeros(optimizer._names, optimizer._pool, grads)
    if not any_left:
        warnings.warn(
            f"{optimizer.importance} scores every entry 0: nothing is unmasked in this step "
            "(|grad * param| of a fresh LoRA, or a mask of parameters without gradients?)",
            UserWarning,
            stacklevel=5,
        )


def _warn_of_zeros(names: Sequence[str], params: Sequence[Tensor], grads: Sequence[Tensor]) -> None:
    ranked = zip(names, params, grads, strict=True)
    zero = zero_matrices((name, param) for name, param, grad in ranked if grad.numel())
    if zero:
        warnings.warn(
            f"Magnitude: {len(zero)} of the ranked matrices are all zeros (a fresh LoRA B?; the "
            f"first is {zero[0]}), so that their entries are unmasked first, in the order of "
            "their positions; leave them out of the pool, or rank by the gradient (D3)",
            UserWarning,
            stacklevel=6,
        )


def unmasks(optimizer: MaskedAdamW) -> bool:
    """Whether the next step is to unmask anything; reads counts from the device."""
    step, active, _ = optimizer._active.progress.tolist()
    targets, selection = optimizer._targets, optimizer.selection
    # A static set of fixed scores is complete after one step, even if it found too few above 0.
    once = is_fixed(optimizer.importance) and not isinstance(selection, Increment)
    if once and not selection.replaces and step > 0:
        return False
    return int(targets[min(step + 1, targets.numel() - 1)]) > active


def _scores(
    importance: Importance, names: Sequence[str], params: Sequence[Tensor], grads: Sequence[Tensor]
) -> list[Tensor]:
    """Scores of every parameter that has a gradient; empty tensors for the others."""
    if isinstance(importance, Random):  # views of one tensor: it need not hold the whole pool
        ones = torch.ones(
            max(grad.numel() for grad in grads), dtype=torch.bfloat16, device=params[0].device
        )
        return [ones[: grad.numel()].view(grad.shape) for grad in grads]
    if isinstance(importance, D3) and importance.exp == 0:
        return list(grads)
    scores = []
    for name, param, grad in zip(names, params, grads, strict=True):
        if not grad.numel():
            scores.append(grad)
            continue
        score = importance(name, param.detach(), grad)
        if not isinstance(importance, OWN):
            _check(score, name, param)
        scores.append(score.contiguous())
    return scores


def _check(score: object, name: str, param: Tensor) -> None:
    if not isinstance(score, Tensor):
        raise TypeError(f"the importance of {name} must be a tensor, got {type(score).__name__}")
    if score.shape != param.shape or score.device != param.device:
        raise ValueError(
            f"the importance of {name} must have shape {tuple(param.shape)} on {param.device}, "
            f"got {tuple(score.shape)} on {score.device}"
        )
    if score.dtype not in SUPPORTED_DTYPES:
        raise TypeError(
            f"the importance of {name} is {score.dtype}; expected float32, bfloat16 or float16"
        )
    check_scores(score, name)

"""Dense scores: how a step ranks entries where the kernels do not rank gradients by themselves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sparse_optim.backends import scoring
from sparse_optim.backends.operands import Rule, Tiles
from sparse_optim.engine.pool import SUPPORTED_DTYPES, Pool
from sparse_optim.policy.importance import Importance, Traits, check_scores, traits_of
from sparse_optim.policy.selection import Selection
from sparse_optim.warn import warn_user

# Entries whose noise is drawn at once where it is not drawn by a kernel: it takes 100 bytes each.
NOISE_ENTRIES = 1 << 16


def noise_seed(traits: Traits, selection: Selection) -> int | None:
    """Seed of what samples entries, as a signed 64-bit number; None where nothing does."""
    seed = traits.noise_seed if selection.noise_seed is None else selection.noise_seed
    return None if seed is None else (seed + 2**63) % 2**64 - 2**63


@dataclass
class Ranking:
    """Buffers for dense scores; empty where the kernels rank gradients by D3 as they read them.

    Attributes:
        scored: whether entries are ranked by dense scores.
        rule: what `cut` is told.
        table: as in `reference.bind`, of the scores.
        tiles: those of the pool, `max` of the scores.
    """

    scored: bool
    rule: Rule
    table: Tensor
    tiles: Tiles

    @staticmethod
    def of(traits: Traits, selection: Selection, table: Tensor, tiles: Tiles) -> Ranking:
        """Buffers for a pool whose gradients have this table and these tiles."""
        seed, exp_and_eps = noise_seed(traits, selection), traits.in_kernel
        keys = [] if seed is None else [seed, 0]
        noise = torch.tensor(keys, dtype=torch.int64, device=table.device)
        if exp_and_eps is not None and seed is None:
            return Ranking(False, Rule(*exp_and_eps, noise), table[:0], tiles)
        scores = Tiles(tiles.size, tiles.offsets, torch.zeros_like(tiles.max), tiles.param_bound)
        return Ranking(True, Rule(0.0, 1.0, noise), torch.zeros_like(table), scores)

    def set_step(self, step: Tensor) -> None:
        """Key the noise by the step, (), int64, where entries are sampled."""
        if self.rule.noise.numel():
            self.rule.noise[1].copy_(step)


def scores_of(
    importance: Importance, names: Sequence[str], params: Sequence[Tensor], grads: Sequence[Tensor]
) -> list[Tensor]:
    """Scores of every parameter that has a gradient; empty tensors for the others.

    Raises:
        TypeError, ValueError: an importance that is not `trusted` returned something else than
            finite scores >= 0 of the parameter's shape and device.
    """
    traits = traits_of(importance)
    if traits.uniform:  # views of one tensor, as large as the largest needs
        most = max((grad.numel() for grad in grads), default=0)
        ones = torch.ones(most, dtype=torch.bfloat16, device=params[0].device)
        return [ones[: grad.numel()].view(grad.shape) for grad in grads]
    if traits.in_kernel is not None and traits.in_kernel[0] == 0:
        return list(grads)
    scores = []
    for name, param, grad in zip(names, params, grads, strict=True):
        if not grad.numel():
            scores.append(grad)
            continue
        score = importance(name, param.detach(), grad)
        if not traits.trusted:
            _check(score, name, param)
        scores.append(score.contiguous())
    return scores


def perturbed(scores: Sequence[Tensor], noise: Tensor, first: int) -> list[Tensor]:
    """The scores of pool tensors first, first + 1, ... with noise, drawn piece by piece."""
    found = []
    for index, score in enumerate(scores, first):
        pieces = score.reshape(-1).float().split(NOISE_ENTRIES)
        found.append(torch.cat([
            scoring.perturbed(piece, noise, index, number * NOISE_ENTRIES)
            for number, piece in enumerate(pieces)
        ]).view(score.shape))  # fmt: skip
    return found


def warn_of_scores(
    importance: Importance, pool: Pool, grads: Sequence[Tensor], any_left: bool
) -> None:
    """Let the importance check what it ranks, and warn if it scores everything 0.

    Args:
        grads: empty where a parameter has no gradient in this step.
        any_left: whether a frozen entry scores above 0.
    """
    if check := traits_of(importance).check:
        present = [index for index, grad in enumerate(grads) if grad.numel()]
        check([pool.names[index] for index in present], [pool.params[index] for index in present])
    if not any_left:
        warn_user(
            f"{importance} scores every entry 0: nothing is unmasked in this step "
            "(|grad * param| of a fresh LoRA, or a mask of parameters without gradients?)"
        )


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

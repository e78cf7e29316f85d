"""Cumulative targets: how many entries are to be active after each step. A tensor in one of two
forms, which the kernels read.

    table      (T + 1,), int64: the target after steps 0 to T, from 0
    formula    (K, 4), int64: pieces [first step, target there, gain, power], the last one
               [T, budget, 0, 1]. Within a piece of n steps, u steps behind its first,

                   target + gain * u // n                          for power 1
                   target + gain * u * (2 n - u) // n^2            for power 2 (slower and slower)

The size of a formula does not depend on the length of the run: a table of 10^7 steps takes 80 MB,
here and in each checkpoint.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from itertools import pairwise

import torch
from torch import Tensor

COLUMNS = 4


def formula(pieces: Sequence[tuple[int, int, int]]) -> Tensor:
    """The formula of consecutive pieces.

    Args:
        pieces: (steps, gain, power) of each, steps >= 1.
    """
    rows, step, target = [], 0, 0
    for steps, gain, power in pieces:
        rows.append([step, target, gain, power])
        step, target = step + steps, target + gain
    return torch.tensor([*rows, [step, target, 0, 1]], dtype=torch.int64)


def fits(steps: int, gain: int, power: int) -> bool:
    """Whether a piece can be computed in 64 bits."""
    return bool(gain * steps**power < 2**63)


def is_formula(targets: Tensor) -> bool:
    """Whether targets are a formula, not a table."""
    return targets.dim() == 2


def signed_length(targets: Tensor) -> int:
    """T + 1 of a table, -K of a formula: how kernels are told which it is."""
    return -targets.size(0) if is_formula(targets) else targets.numel()


def total_steps(targets: Tensor) -> int:
    """T, steps of the whole run."""
    return int(targets[-1, 0]) if is_formula(targets) else targets.numel() - 1


def budget_of(targets: Tensor) -> int:
    """Entries that may ever be active."""
    return int(targets[-1, 1]) if is_formula(targets) else int(targets[-1])


def target_at(targets: Tensor, step: Tensor) -> Tensor:
    """Cumulative target after `step`, (1,), int64, on their device; reads nothing from it."""
    if not is_formula(targets):
        return targets[step.clamp(0, targets.numel() - 1)]
    step = step.clamp(min=0)
    row = (targets[:, 0] <= step).sum(0, keepdim=True) - 1
    first, target, gain, power = targets[row].unbind(1)
    last = targets[(row + 1).clamp(max=targets.size(0) - 1), 0]
    n, u = (last - first).clamp(min=1), step - first
    slower = gain * u * (2 * n - u) // (n * n)
    return target + torch.where(power == 2, slower, gain * u // n)


def ahead(targets: Tensor, steps: int) -> Tensor:
    """The targets `steps` steps later: target_at(ahead, t) = target_at(targets, t + steps)."""
    if not is_formula(targets):
        return targets[min(steps, targets.numel() - 1) :]
    shift = torch.tensor([steps, 0, 0, 0], device=targets.device)
    return targets - shift if steps else targets


def largest_quota(targets: Tensor, steps: int = 1) -> int:
    """Entries that `steps` steps unmask at most where none has found too few; of a formula, or
    one more."""
    if not is_formula(targets):
        last = targets.numel() - 1
        return int((targets[min(steps, last) :] - targets[: max(last + 1 - steps, 1)]).max())
    rows: list[list[int]] = targets.tolist()

    def at(step: int) -> Fraction:
        step = min(step, rows[-1][0])
        begun = [pair for pair in pairwise(rows) if pair[0][0] <= step]
        (first, target, gain, power), (last, *_) = begun[-1]
        n, u = last - first, step - first
        share = Fraction(u * (2 * n - u), n * n) if power == 2 else Fraction(u, n)
        return Fraction(target) + gain * share

    # Within pieces the difference is monotone, so that it is largest where a piece begins or ends.
    begin = {max(row[0] - back, 0) for row in rows for back in (0, steps)}
    most = math.ceil(max(at(t + steps) - at(t) for t in begin))
    return min(most, budget_of(targets))


def same_targets(first: Tensor, second: Tensor) -> bool:
    """Whether two schedules are the same, in one form or in two."""
    if first.shape == second.shape:
        return torch.equal(first.cpu(), second.cpu())
    ends = ((total_steps(each), budget_of(each)) for each in (first, second))
    return is_formula(first) != is_formula(second) and len(set(ends)) == 1


def check_targets(targets: Tensor, most: int) -> None:
    """Raise ValueError unless targets rise from 0 to a budget of at most `most` entries."""
    good = bool(
        targets[:, :3].ge(0).all()
        and (targets[:, 0].diff() > 0).all()
        and (targets[:, 1].diff() == targets[:-1, 2]).all()
        and ((targets[:, 3] == 1) | (targets[:, 3] == 2)).all()
        and targets[0, :2].eq(0).all()
        and targets[-1, 2] == 0
        if is_formula(targets) and targets.shape[0] >= 2 and targets.shape[1] == COLUMNS
        else targets.dim() == 1
        and targets.numel() >= 2
        and not (targets.diff() < 0).any()
        and targets[0] == 0
    )
    if good and is_formula(targets):
        rows = pairwise(targets.tolist())
        good = all(fits(last[0] - first[0], first[2], first[3]) for first, last in rows)
    if not good or budget_of(targets) > most:
        raise ValueError(f"targets do not rise from 0 to a budget of at most {most} entries")

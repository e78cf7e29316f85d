"""Defaults that the library and `finetune` share; ID3's paper has rank "all", share 1.0, every 1.

They need no torch: help texts show them.
"""

from __future__ import annotations

# Which parameters compete: weights of Linear modules. Embeddings have a gradient only where their
# token occurs, so that half of a random mask over a small encoder would not move (it scores 1.0 and
# 1.3 points less on two tasks: see bench/results/quality, MiniLM); and steps that unmask nothing
# then need no weight gradients at all.
RANK = "linear"

# Share of the run in which the budget is spent. Entries that are unmasked late have few steps left,
# at a decayed learning rate: see bench/results/ablation and bench/results/quality (MiniLM).
UNMASK_SHARE = 0.2

# Steps from one that unmasks to the next, at most, where those between need no weight gradients. It
# scored like 1: see bench/results/every (MiniLM, budget spent in half of the run).
SAMPLED_EVERY = 16

# Steps that unmask something, at least: by one batch alone ID3 would be static D3.
LEAST_LOUD = 4


def default_every(unmask_steps: int, sampled: bool) -> int:
    """Steps from one that unmasks to the next, if the user gave none.

    Args:
        unmask_steps: steps in which the budget is spent.
        sampled: whether the steps between compute the weight gradients of active entries alone.
    """
    return min(SAMPLED_EVERY, max(1, unmask_steps // LEAST_LOUD)) if sampled else 1

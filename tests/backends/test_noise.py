"""The noise that samples entries: generator, distribution, and samples without replacement.

What planted faults were seen by: a multiplier of Philox off by one, and keys not advanced:
test_known_answers; the complement of the word left out: test_follows_the_logarithm; probabilities
proportional to the score instead of its square: test_subsets_have_their_probabilities.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter

import pytest
import torch
from op_cases import assert_same_bits, make_case

from sparse_optim.backends import reference
from sparse_optim.backends.noise import exponential, noise, philox

ONES = 0xFFFFFFFF


@pytest.mark.parametrize(
    ("word", "seed", "expected"),
    [
        (0, 0, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        (ONES, -1, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    ],
)
def test_known_answers(word, seed, expected):
    """The known-answer vectors that Salmon et al. publish with their Random123 library."""
    counter = torch.tensor([word])
    assert philox((counter, counter, counter, counter), seed)[0].tolist() == expected


def test_follows_the_logarithm():
    """Relative error of a few units over the whole range: both ends, the middle, the refined."""
    generator = torch.Generator().manual_seed(0)
    edges = [0, 2**16, 2**24, 2**31, 2**32]
    near = torch.cat([edge + torch.arange(-500, 500) for edge in edges])
    word = torch.cat([near, torch.randint(0, 2**32, (100_000,), generator=generator)])
    word = word.clamp(0, ONES)
    second = torch.randint(0, 2**32, word.shape, generator=generator)
    fraction = torch.where(word < 2**16, (second.double() + 0.5) / 2**32, 0.5)
    value = (torch.where(word < 2**31, word, ONES - word).double() + fraction) / 2**32
    exact = torch.where(word < 2**31, -torch.log1p(-value), -torch.log(value))
    error = (exponential(word, second).double() - exact).abs() / exact
    assert error.max() <= 4 * 2**-24


def test_each_entry_has_its_own_noise():
    """Seeds, steps, tensors, positions: each changes it; a longer tensor only continues it."""
    cpu = torch.device("cpu")
    base = noise(1, 2, 3, 1000, cpu)
    assert base.unique().numel() > 990
    for other in [(9, 2, 3), (1 + 2**40, 2, 3), (1, 9, 3), (1, 2, 9)]:
        assert (noise(*other, 1000, cpu) != base).float().mean() > 0.99
    assert_same_bits(noise(1, 2, 3, 1003, cpu)[:1000], base)


@pytest.mark.parametrize("weights", [(1, 1, 1, 1, 1, 1), (1, 2, 3, 4, 5, 6), (9, 1, 1, 1, 1, 0.1)])
def test_subsets_have_their_probabilities(weights):
    """Chi-square over the 20 subsets of 3 out of 6, against exact sequential sampling.

    Seed fixed; 19 degrees of freedom, so that 43.8 is passed by one sampler in a thousand.
    """
    draws, probability = 20_000, [weight / sum(weights) for weight in weights]
    expected = dict.fromkeys(itertools.combinations(range(6), 3), 0.0)
    for order in itertools.permutations(range(6), 3):
        chance, left = 1.0, 1.0
        for entry in order:
            chance *= probability[entry] / left
            left -= probability[entry]
        expected[tuple(sorted(order))] += chance
    assert math.isclose(sum(expected.values()), 1.0)
    # One step's noise of a long tensor: six entries at a time, none used twice.
    energy = noise(seed=11, step=5, tensor=0, numel=6 * draws, device=torch.device("cpu"))
    perturbed = torch.tensor(weights).sqrt() / energy.view(draws, 6).sqrt()
    chosen = perturbed.topk(3).indices.sort(dim=1).values
    seen = Counter(map(tuple, chosen.tolist()))
    chi_square = sum(
        (seen[subset] - draws * chance) ** 2 / (draws * chance)
        for subset, chance in expected.items()
    )
    assert chi_square < 43.8


def test_cut_samples_by_the_noise():
    """`rank` and `cut` together: the top k of score / sqrt(E) among frozen entries."""
    case = make_case([700, 30, 513], quota=60, num_active=50, missing=[1], seed=3)
    case.noise = torch.tensor([17, 4])
    case.grads = [grad.abs() for grad in case.grads]
    scores = []
    for index, grad in enumerate(case.grads):
        score = torch.zeros(case.params[index].numel())
        if grad.numel():
            score = grad / noise(17, 4, index, grad.numel(), grad.device).double().sqrt().float()
        first, last = case.active.offsets[index : index + 2].tolist()
        score[case.active.position[first:last].long()] = 0
        scores.append(score)
    reference.rank(*case.rank_args(reference))
    for index, score in enumerate(scores):
        first, last = case.work.tiles.offsets[index : index + 2].tolist()
        tiles = [float(tile.max()) for tile in score.split(case.tile)]
        assert case.work.tiles.max[first:last].view(torch.float32).tolist() == tiles
    reference.cut(*case.cut_args(reference))
    top = torch.cat(scores).topk(60).indices.sort().values
    starts = (0, 700, 730)
    found = [starts[tensor] + position for tensor, position in case.new_entries()]
    assert found == top.tolist()

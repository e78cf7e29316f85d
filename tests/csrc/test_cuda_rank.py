"""Ranking and sampling of dense scores by the CUDA kernels, run on the CPU by the emulator.

`rank` draws noise for four entries at a time, `cut` for each entry by itself: both must equal the
reference bit for bit. What the emulator can show, and what not: test_cuda_emulator.py.

Faults planted by hand, one at a time, and what caught them:

    words of a group in another order, in either      18 tests
    no second draw, or the first again, in `cut`      second_draws_are_in_the_threshold
    no second draw, or the first again, in `rank`     sizes_dtypes, equal_scores, tiles_of_4096
    tensor missing from the counter, in either        sizes_dtypes, equal_scores, tiles_of_4096
    groups of four counted from the tile's start      sizes_dtypes, equal_scores, second_draws
"""

from __future__ import annotations

import emulated_cuda
import pytest
import torch
from cuda_cases import FLOAT, TILE, Case, check_cut, check_exact, run_both

from sparse_optim.backends.noise import REFINED_BELOW, philox

DTYPES = (FLOAT, torch.bfloat16, torch.float16)
# Seed and step for which entries 19 and 101 of tensor 0, alone among its first 160, have a second
# draw.
REFINED = (86, 2**32 - 399)
NOISES = {"none": (), "noise": (5, 3), "last step": (-(2**62), 2**32 - 1), "refined": REFINED}


@pytest.fixture(autouse=True)
def _device(cuda_emulator):
    emulated_cuda.configure(multiprocessors=2, seed=1)


def check_sample(case, found=None):
    expected, actual = run_both(case, "rank", "cut")
    check_exact(expected, actual, "tile_max")
    check_cut(expected, actual)
    if found is not None:
        assert int(actual.work.new.count) == found


def test_the_refined_case_has_second_draws():
    group = torch.arange(40)
    zero = torch.tensor(0)
    words = philox((group, zero, torch.tensor(REFINED[1]), zero), REFINED[0]).view(-1)
    assert (words < REFINED_BELOW).nonzero().view(-1).tolist() == [19, 101]


@pytest.mark.parametrize("quota", [1, 2])
def test_second_draws_are_in_the_threshold(quota):
    case = Case([160], noise=REFINED, quota=quota, active=0.0)
    case.grads[0].fill_(0.25)
    check_sample(case, found=quota)
    actual = run_both(case, "rank", "cut")[1]
    assert set(actual.work.new.position.tolist()) <= {19, 101}


@pytest.mark.parametrize("tile", [1, 7, TILE])
@pytest.mark.parametrize("noise", NOISES)
def test_sizes_dtypes_and_unaligned_views(noise, tile):
    """Tiles of 7 begin within a group of four entries; views shifted by one are not aligned."""
    sizes = [150, 0, 1, TILE + 1, 31, 2 * TILE + 2]
    for shift in (0, 1):
        check_sample(
            Case(
                sizes, tile=tile, noise=NOISES[noise], grad_dtypes=DTYPES, missing=(4,),
                shift=shift, quota=60, active=0.3, seed=shift,
            ),
            found=60,
        )  # fmt: skip


def test_tiles_of_4096():
    for dtype in (FLOAT, torch.bfloat16):
        case = Case([2 * 4096 + 7, 50], tile=4096, noise=REFINED, grad_dtypes=(dtype,), quota=90)
        check_sample(case, found=90)


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("value", [0.0, 0.25])
def test_equal_scores(value, noise):
    """Without noise all tie; with it the sample is uniform. Zeros are never unmasked."""
    case = Case([150, 3 * TILE], noise=NOISES[noise], quota=33, active=0.2)
    for score in case.grads:
        score.fill_(value)
    check_sample(case, found=33 if value else 0)


@pytest.mark.parametrize("noise", NOISES)
def test_ties_and_a_quota_beyond_the_candidates(noise):
    for quota in (5, 300):
        check_sample(Case([150, 90], noise=NOISES[noise], levels=2, quota=quota))


def test_active_entries_at_tile_edges_are_not_ranked():
    case = Case([3 * TILE, TILE], active=0.0, noise=(1, 2), quota=9, max_quota=20)
    state = case.active
    edges = torch.tensor([0, TILE - 1, TILE, 2 * TILE - 1, 2 * TILE, 3 * TILE - 1, 0, TILE - 1])
    state.position[:8] = edges.int()
    state.offsets.copy_(torch.tensor([0, 6, 8]))
    state.progress[1] = 8
    case.targets += 8
    for score in case.grads:  # they would win, whatever their noise
        score[::TILE] = 1e9
        score[TILE - 1 :: TILE] = 1e9
    check_sample(case, found=9)


def test_the_order_of_threads_and_blocks_does_not_matter():
    case = Case([6 * TILE, 2 * TILE + 1], noise=(3, 4), quota=50, levels=5)
    for multiprocessors in (1, 2, 5):
        emulated_cuda.configure(multiprocessors, seed=multiprocessors)
        check_sample(case)


def test_no_more_entries_are_collected_than_can_win():
    """Maxima with noise in them are exact, as those of gradients are."""
    case = Case([40 * TILE], noise=(1, 1), quota=7)
    case.bind(emulated_cuda)
    case.rank(emulated_cuda)
    case.cut(emulated_cuda)
    # `num_candidates` of the Selection that the scratch memory begins with (csrc/cuda/select.h)
    assert 7 <= case.work.scratch[: 8 * 2053].view(torch.int64)[2048 + 4] < 14

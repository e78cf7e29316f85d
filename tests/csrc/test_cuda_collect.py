"""A running selection by the CUDA kernels, in the emulator, against a full sort.

Faults planted by hand, one at a time, and what caught them:

    last entry that ties dropped                   ties_go_to_the_lower, room_is_made_many_times
    ties to the higher tensor                      a crash
    entries that found no room not noticed         more_entries_in_a_call_than_there_is_room_for
    those that found room before that kept, too    a crash
    room in the end not looked at                  less_room_in_the_end
    scores in place of gradients, in either way    entries_ranked_by_scores_keep_their_gradients

And in what large quotas take (collect_many.cu, collect_order.cu, entry_rank.h):

    last entry that ties dropped                   ties_go_to_the_lower, less_room_in_the_end
    ties to the higher place                       ties_go_to_the_lower, then a crash
    a call's bits of tensors, or positions, lost   few_ties_in_each_part, ties_go_to_the_lower
    digits behind the 64th wrong                   a crash in tensors_of_large_numbers
    words behind the 64th bit not compared         tensors_of_large_numbers
    entries that found no room not noticed         best_of_all_parts, more_entries_in_a_call_than
    no digits by one block where four leave many   ties_go_to_the_lower, tensors_of_large_numbers
    candidates left out of the selection           best_of_all_parts, room_is_made_many_times
    first digits of candidates that move lost      a crash
    candidates counted beside those that move      a crash
    halves not changed                             best_of_all_parts, few_ties_in_each_part
    floor not raised                               tiles_below_the_floor alone: it costs only time
    entries below the floor counted; floor lowered nothing: they cost only time
    tiles that just reach the floor not opened     ties_go_to_the_lower, few_ties_in_each_part
    bound of a tile without its parameters         best_of_all_parts, random_large_quotas
    quota + 1 left in the end                      a crash
    room in the end not looked at                  less_room_in_the_end
    found_inf not looked at                        no_quota_and_a_skipped_step
    gradient in place of the score's own           entries_ranked_by_scores_keep_their_gradients
    least importance not noted                     best_of_all_parts
    a run compared with itself, or left out        best_of_all_parts, random_large_quotas
    no barrier after a run was read                best_of_all_parts
    no barrier before the first digit              a hang
"""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import replace
from itertools import pairwise

import emulated_cuda
import pytest
import torch
from cuda_cases import FLOAT, TILE, Case
from oracle import score
from repository import ROOT

from sparse_optim.backends.operands import Rule


@pytest.fixture(autouse=True)
def _device(cuda_emulator):
    emulated_cuda.configure(multiprocessors=2, seed=0)


def expected(case, order, scored=False):
    """(tensor, position, gradient) of the best frozen entries by a stable full sort.

    `scored`: the case's gradients are scores, and its parameters gradients.
    """
    entries = []
    for tensor in order:
        grad, param = case.grads[tensor], case.params[tensor]
        if not grad.numel():
            continue
        values = torch.from_numpy(score(grad, param, case.exp, 1e-3))
        first, last = case.active.offsets[tensor : tensor + 2].tolist()
        values[case.active.position[first:last].long()] = 0
        entries += [(-value, tensor, i) for i, value in enumerate(values.tolist()) if value > 0]
    best = sorted(sorted(entries)[: int(case.targets[-1]) - case.num_active], key=lambda e: e[1:])
    grads = case.params if scored else case.grads
    return [(t, i, float(grads[t][i])) for _, t, i in best], best


def collected(case, parts, found_inf=0.0, room=None, scored=False, scanned=None, number=0):
    """The same by the kernels, of tensors first..last - 1 for each part.

    `room`: entries that there is room for in the end; as many as in the beginning, if None.
    `scanned`: called after the scan. `number`: of the first tensor in the pool.
    """
    work, active = case.work, case.active
    case.bind(emulated_cuda)
    case.scan(emulated_cuda)
    if scanned is not None:
        scanned()
    most, rule = work.new.position.numel(), Rule(case.exp, 1e-3, torch.zeros(0))
    held = torch.full((emulated_cuda.collected_bytes(most) + 64,), 0x5A, dtype=torch.uint8)
    emulated_cuda.collect_begin(active, case.targets, most, held)
    for first, last in parts:
        tiles = work.tiles.offsets[[first, last]].tolist()
        emulated_cuda.collect(
            case.bound[first:last], work.tiles.of_tensors(first, last, slice(*tiles)),
            active.of_tensors(first, last), rule, scored, number + first, most, held,
            work.scratch,
        )  # fmt: skip
    room = most if room is None else room
    grad, new = torch.full((most,), torch.nan), work.new
    new.tensor.fill_(-1), new.position.fill_(-1)
    last = replace(new, tensor=new.tensor[:room], position=new.position[:room])
    emulated_cuda.collect_end(torch.tensor(found_inf), last, grad[:room], held, most)
    assert (held[-64:] == 0x5A).all()
    assert (torch.cat([new.tensor[room:], new.position[room:]]) == -1).all()
    assert grad[room:].isnan().all()
    count = int(work.new.count)
    found = zip(
        work.new.tensor[:count].tolist(), work.new.position[:count].tolist(), grad.tolist(),
        strict=False,
    )  # fmt: skip
    return list(found)


def check(case, parts, scored=False):
    order = [tensor for first, last in parts for tensor in range(first, last)]
    want, best = expected(case, order, scored)
    assert collected(case, parts, scored=scored) == want
    if best:
        assert float(case.work.new.threshold) == pytest.approx(-max(best)[0], rel=1e-6)


SIZES = [700, 0, 33, 2000, 5, 1500, 1024, 40, 3000]
BACKWARD = [(index, index + 1) for index in reversed(range(len(SIZES)))]
TOGETHER = [(8, 9), (4, 8), (3, 4), (0, 3)]


@pytest.mark.parametrize("exp", [-1.0, -0.5, 0.0, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("quota", [1, 7, 20, 21, 100, 700])
def test_best_of_all_parts(exp, quota):
    emulated_cuda.configure(multiprocessors=1 + quota % 3, seed=quota)
    case = Case(
        SIZES, exp=exp, quota=quota, seed=quota, missing=(5,) if quota == 7 else (),
        grad_dtypes=(torch.bfloat16, FLOAT), param_dtypes=(FLOAT, torch.float16),
    )  # fmt: skip
    check(case, TOGETHER if quota == 7 else BACKWARD)


@pytest.mark.parametrize("quota", [9, 60])
@pytest.mark.parametrize("growth", [0.5, 3.0, 40.0])
def test_gradients_that_shrink_or_grow_from_part_to_part(growth, quota):
    """If they grow, all entries of a part may reach the floor, and there is no room for them."""
    case = Case(SIZES, quota=quota)
    for number, (first, _) in enumerate(BACKWARD):
        case.grads[first].mul_(growth**number)
    check(case, BACKWARD)


@pytest.mark.parametrize("quota", [13, 90, 900])
@pytest.mark.parametrize("levels", [1, 2, 30])
@pytest.mark.parametrize("exp", [0.0, 1.0])
@pytest.mark.parametrize("parts", [BACKWARD, TOGETHER, sorted(BACKWARD)], ids=["9_0", "4", "9_1"])
def test_ties_go_to_the_lower_global_index(levels, exp, parts, quota):
    case = Case(SIZES, exp=exp, quota=quota, levels=levels, seed=levels)
    for param in case.params:
        param.fill_(0.5)
    check(case, parts)


@pytest.mark.parametrize("quota", [20, 60, 9000])
@pytest.mark.parametrize("each", [2, 5000])
def test_fewer_entries_than_the_quota(each, quota):
    case = Case(SIZES, quota=quota)
    for grad in case.grads:
        grad[each:] = 0
    check(case, BACKWARD)


@pytest.mark.parametrize("quota", [20, 40])
def test_first_parts_that_are_smaller_than_the_quota(quota):
    case = Case([1500, 5, 3, 9, 2], quota=quota, active=0.0)
    check(case, [(4, 5), (3, 4), (2, 3), (1, 2), (0, 1)])


@pytest.mark.parametrize("quota", [20, 25])
def test_room_is_made_many_times(quota):
    """Each part has about as many entries above the floor as the quota."""
    case = Case([300] * 40, quota=quota, active=0.0)
    for number, grad in enumerate(reversed(case.grads)):
        grad.mul_(1e-3)
        grad[::16] = 1.0 + number + torch.rand(19)
    check(case, [(index, index + 1) for index in reversed(range(40))])


@pytest.mark.parametrize("quota", [25, 70])
def test_few_ties_in_each_part(quota):
    """None has as many as the quota; in the end, the first of them all belong."""
    case = Case([400] * 30, quota=quota, active=0.0)
    for grad in case.grads:
        grad.mul_(1e-3)
        grad[7::29] = 2.0
    order = torch.randperm(30).tolist()
    check(case, [(index, index + 1) for index in order])


@pytest.mark.parametrize("quota", [20, 50, 300])
def test_more_entries_in_a_call_than_there_is_room_for(quota):
    """In few tiles; and in the call after it."""
    case = Case([90 * TILE, 700, 300], quota=quota, active=0.0)
    for grad in case.grads:
        grad.mul_(1e-3)
    case.grads[2][:150] = 1.0 + torch.rand(150)
    case.grads[0][TILE : 5 * TILE] = 1.0 + torch.rand(4 * TILE)
    case.grads[1][:500] = 1.0 + torch.rand(500)
    check(case, [(2, 3), (0, 1), (1, 2)])


@pytest.mark.parametrize("quota", [60, 200])
@pytest.mark.parametrize("exp", [0.0, 1.0])
def test_tiles_below_the_floor_are_not_read(exp, quota):
    """Of a large quota, which raises the floor in the first part."""
    case = Case([1500, 900, 1500, 900], exp=exp, quota=quota, active=0.0, spread=0.0)
    for param in case.params:
        param.fill_(0.5)
    case.grads[1].mul_(1e-6)
    case.grads[3].mul_(1e-6)
    want, _ = expected(case, range(4))

    def change():
        case.grads[1].fill_(100.0)
        case.grads[3].fill_(100.0)

    assert collected(case, [(0, 1), (1, 2), (2, 3), (3, 4)], scanned=change) == want


@pytest.mark.parametrize("quota", [13, 60, 400])
@pytest.mark.parametrize("levels", [1, None])
def test_tensors_of_large_numbers(levels, quota):
    """Places then take more than 64 bits, with the keys."""
    case = Case(SIZES, quota=quota, levels=levels)
    want, _ = expected(case, range(len(SIZES)))
    number = 2**31 - 1 - len(SIZES)
    found = collected(case, BACKWARD, number=number)
    assert found == [(number + tensor, *rest) for tensor, *rest in want]


@pytest.mark.parametrize("most", [5, 50])
def test_no_quota_and_a_skipped_step(most):
    case = Case(SIZES, quota=0, max_quota=most)
    assert collected(case, BACKWARD) == []
    case = Case(SIZES, quota=most)
    assert collected(case, BACKWARD, found_inf=1.0) == []


@pytest.mark.parametrize("quota", [1, 11, 150])
def test_a_quota_far_below_the_largest(quota):
    check(Case(SIZES, quota=quota, max_quota=1000), BACKWARD)


@pytest.mark.parametrize("quota", [13, 130])
@pytest.mark.parametrize("levels", [None, 1])
def test_entries_ranked_by_scores_keep_their_gradients(levels, quota):
    """With room for all that reach the limit in a call, and without."""
    case = Case(
        SIZES, quota=quota, levels=levels, grad_dtypes=(FLOAT, torch.bfloat16),
        param_dtypes=(torch.bfloat16, FLOAT),
    )  # fmt: skip
    check(case, TOGETHER, scored=True)


@pytest.mark.parametrize("quota", [17, 80])
@pytest.mark.parametrize("room", [0, 1, 7])
@pytest.mark.parametrize("exp", [0.0, 2.0])
def test_less_room_in_the_end_than_in_the_beginning(exp, room, quota):
    """The best are left, as many as there is room for; nothing is written behind."""
    case = Case(SIZES, exp=exp, quota=quota, levels=9)
    _, best = expected(case, range(len(SIZES)))
    found = collected(case, BACKWARD, room=room)
    assert int(case.work.new.count) == room
    assert [entry[:2] for entry in found] == sorted(entry[1:] for entry in sorted(best)[:room])


@pytest.mark.parametrize("seed", range(12))
def test_random_large_quotas(seed):
    """Any order of the calls, one tensor or more in each, ties or none."""
    emulated_cuda.configure(multiprocessors=1 + seed % 5, seed=seed)
    torch.manual_seed(seed)
    sizes = torch.randint(0, 900, (14,)).tolist()
    case = Case(
        sizes, quota=21 + int(torch.randint(0, 400, ())), levels=(None, 3, 50)[seed % 3], seed=seed,
        exp=(0.0, 2.0, 1.0, -0.5)[seed % 4], active=0.3 if seed % 2 else 0.01,
        grad_dtypes=(torch.bfloat16, FLOAT, torch.float16), shift=seed % 2,
    )  # fmt: skip
    ends = sorted({0, 14, *torch.randint(0, 14, (8,)).tolist()})
    parts = list(pairwise(ends))
    check(case, [parts[index] for index in torch.randperm(len(parts)).tolist()])


def launches_of(case, calls):
    before = emulated_cuda.launches()
    collected(case, [(index, index + 1) for index in range(calls)])
    return emulated_cuda.launches() - before


@pytest.mark.parametrize(
    ("exp", "quota", "each"), [(0.0, 9, 3), (2.0, 9, 4), (0.0, 90, 6), (2.0, 90, 6)]
)
def test_launches_of_a_tensor(exp, quota, each):
    """Whether room is made, as for the second of four, or not; ties or none."""
    for levels in (None, 1):
        counts = [
            launches_of(Case([15 * TILE] * 4, exp=exp, quota=quota, levels=levels), calls)
            for calls in range(1, 5)
        ]
        assert [more - less for less, more in pairwise(counts)] == [each] * 3


def test_launches_of_the_end():
    """Of few: the selection, and all in order. Of many: digits, and one launch for each factor by
    which sorted runs become longer (here three, of 16)."""
    few = launches_of(Case([TILE], quota=9), 0) - 4  # bind, scan (2), clip
    assert few == 1 + 2
    for quota, merges in ((30, 1), (100, 2), (144, 2), (145, 3)):
        many = launches_of(Case([TILE], quota=quota, active=0.0), 0) - 4
        assert many == 1 + 1 + 14 + 3 + merges  # begin, end, digits of 6 bits, move, sort, write


def test_the_order_of_entries_by_the_digits_of_a_gpu(tmp_path):
    """The emulator's digits are smaller: those of a GPU are 11 bits, cut where a word ends."""
    if shutil.which("g++") is None:
        pytest.skip("needs g++")
    flags = [
        "-std=c++17",
        "-O1",
        "-w",
        "-DSPARSE_OPTIM_EMULATED",
        "-DSPARSE_OPTIM_RANK_DIGIT_BITS=11",
    ]
    places = [ROOT / "csrc", ROOT / "tests/support/cuda_emulator"]
    source, program = ROOT / "tests/support/entry_rank.cpp", tmp_path / "entry_rank"
    includes = [f"-I{place}" for place in places]
    subprocess.run(["g++", *flags, *includes, source, "-o", program], check=True)
    shown = subprocess.run([program], capture_output=True, text=True, check=True).stdout
    assert shown.splitlines() == ["11 11 11 11 11 9 11 11 7 ", "0 faults"]

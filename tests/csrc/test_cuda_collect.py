"""A running selection by the CUDA kernels, in the emulator, against a full sort.

Faults planted by hand, one at a time, and what caught them:

    last entry that ties dropped                   ties_go_to_the_lower, room_is_made_many_times
    ties to the higher tensor                      a crash
    entries that found no room not noticed         more_entries_in_a_call_than_there_is_room_for
    those that found room before that kept, too    a crash
    room in the end not looked at                  less_room_in_the_end
    scores in place of gradients, in either way    entries_ranked_by_scores_keep_their_gradients
"""

from __future__ import annotations

from dataclasses import replace

import emulated_cuda
import pytest
import torch
from cuda_cases import FLOAT, TILE, Case
from oracle import score

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


def collected(case, parts, found_inf=0.0, room=None, scored=False):
    """The same by the kernels, of tensors first..last - 1 for each part.

    `room`: entries that there is room for in the end; as many as in the beginning, if None.
    """
    work, active = case.work, case.active
    case.bind(emulated_cuda)
    case.scan(emulated_cuda)
    most, rule = work.new.position.numel(), Rule(case.exp, 1e-3, torch.zeros(0))
    held = torch.full((emulated_cuda.collected_bytes(most) + 64,), 0x5A, dtype=torch.uint8)
    emulated_cuda.collect_begin(active, case.targets, most, held)
    for first, last in parts:
        tiles = work.tiles.offsets[[first, last]].tolist()
        emulated_cuda.collect(
            case.bound[first:last], work.tiles.of_tensors(first, last, slice(*tiles)),
            active.of_tensors(first, last), rule, scored, first, most, held, work.scratch,
        )  # fmt: skip
    room = most if room is None else room
    grad, new = torch.full((most,), torch.nan), work.new
    new.tensor.fill_(-1), new.position.fill_(-1)
    last = replace(new, tensor=new.tensor[:room], position=new.position[:room])
    emulated_cuda.collect_end(torch.tensor(found_inf), last, grad[:room], held)
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
@pytest.mark.parametrize("quota", [1, 7, 20])
def test_best_of_all_parts(exp, quota):
    emulated_cuda.configure(multiprocessors=1 + quota % 3, seed=quota)
    case = Case(
        SIZES, exp=exp, quota=quota, seed=quota, missing=(5,) if quota == 7 else (),
        grad_dtypes=(torch.bfloat16, FLOAT), param_dtypes=(FLOAT, torch.float16),
    )  # fmt: skip
    check(case, TOGETHER if quota == 7 else BACKWARD)


@pytest.mark.parametrize("growth", [0.5, 3.0, 40.0])
def test_gradients_that_shrink_or_grow_from_part_to_part(growth):
    """If they grow, all entries of a part may reach the floor, and there is no room for them."""
    case = Case(SIZES, quota=9)
    for number, (first, _) in enumerate(BACKWARD):
        case.grads[first].mul_(growth**number)
    check(case, BACKWARD)


@pytest.mark.parametrize("levels", [1, 2, 30])
@pytest.mark.parametrize("exp", [0.0, 1.0])
@pytest.mark.parametrize("parts", [BACKWARD, TOGETHER, sorted(BACKWARD)], ids=len)
def test_ties_go_to_the_lower_global_index(levels, exp, parts):
    case = Case(SIZES, exp=exp, quota=13, levels=levels, seed=levels)
    for param in case.params:
        param.fill_(0.5)
    check(case, parts)


def test_fewer_entries_than_the_quota():
    case = Case(SIZES, quota=20)
    for grad in case.grads:
        grad[2:] = 0
    check(case, BACKWARD)


def test_first_parts_that_are_smaller_than_the_quota():
    case = Case([1500, 5, 3, 9, 2], quota=20, active=0.0)
    check(case, [(4, 5), (3, 4), (2, 3), (1, 2), (0, 1)])


def test_room_is_made_many_times():
    """Each part has as many entries above the floor as the quota."""
    case = Case([300] * 40, quota=20, active=0.0)
    for number, grad in enumerate(reversed(case.grads)):
        grad.mul_(1e-3)
        grad[::16] = 1.0 + number + torch.rand(19)
    check(case, [(index, index + 1) for index in reversed(range(40))])


def test_more_entries_in_a_call_than_there_is_room_for():
    """In few tiles; and in the call after it."""
    case = Case([90 * TILE, 700, 300], quota=20, active=0.0)
    for grad in case.grads:
        grad.mul_(1e-3)
    case.grads[2][:150] = 1.0 + torch.rand(150)
    case.grads[0][TILE : 5 * TILE] = 1.0 + torch.rand(4 * TILE)
    case.grads[1][:500] = 1.0 + torch.rand(500)
    check(case, [(2, 3), (0, 1), (1, 2)])


def test_no_quota_and_a_skipped_step():
    case = Case(SIZES, quota=0, max_quota=5)
    assert collected(case, BACKWARD) == []
    case = Case(SIZES, quota=5)
    assert collected(case, BACKWARD, found_inf=1.0) == []


@pytest.mark.parametrize("levels", [None, 1])
def test_entries_ranked_by_scores_keep_their_gradients(levels):
    """With room for all that reach the limit in a call, and without."""
    case = Case(
        SIZES, quota=13, levels=levels, grad_dtypes=(FLOAT, torch.bfloat16),
        param_dtypes=(torch.bfloat16, FLOAT),
    )  # fmt: skip
    check(case, TOGETHER, scored=True)


@pytest.mark.parametrize("room", [0, 1, 7])
@pytest.mark.parametrize("exp", [0.0, 2.0])
def test_less_room_in_the_end_than_in_the_beginning(exp, room):
    """The best are left, as many as there is room for; nothing is written behind."""
    case = Case(SIZES, exp=exp, quota=17, levels=9)
    _, best = expected(case, range(len(SIZES)))
    found = collected(case, BACKWARD, room=room)
    assert int(case.work.new.count) == room
    assert [entry[:2] for entry in found] == sorted(entry[1:] for entry in sorted(best)[:room])


def test_launches_of_a_tensor():
    for exp, most in ((0.0, 3), (2.0, 4)):
        case = Case([15 * TILE], exp=exp, quota=9)
        before = emulated_cuda.launches()
        collected(case, [(0, 1)])
        own = emulated_cuda.launches() - before - 4  # bind, scan (2), clip
        assert own - 3 <= most  # less begin and end

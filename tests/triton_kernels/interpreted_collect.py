"""A running selection by the Triton kernels, interpreted, against a full sort.

Run by test_interpreter.py. There is room for four times the quota, few programs share the tiles,
and a program selects in small rounds: room is made many times even in small cases.

Faults planted by hand, one at a time, and what caught them:

    limit: one bin up                              ties_go_to_the_lower, 21 tests in all
    limit: the running floor not looked at         what_is_below_the_floor
    floor not raised                               what_is_below_the_floor
    floor one too high                             ties_go_to_the_lower, 14 in all
    floor of the last step kept                    a crash; 48 tests where memory was positive
    histogram of the last call not cleared         gradients_that_shrink_or_grow[0.5]
    histogram not cleared in the beginning         room_is_made_many_times
    tiles, or entries, that equal the limit left   ties_go_to_the_lower, 16 in all
    calls of few tiles: maxima of tiles counted    room_is_made_many_times
    groups counted twice                           best_of_all_parts, 9 in all
    exp < 0 without param_bound                    best_of_all_parts, 4 in all
    more entries than there is room for unnoticed  ties_go_to_the_lower, 14 in all
    those that found room before that kept, too    crowded_calls[0.01]
    crowded call: entries at its limit left out    ties_go_to_the_lower, 7 in all
    crowded call: last entry that ties dropped     ties_go_to_the_lower
    crowded call: ties counted anew in each tile   ties_go_to_the_lower
    crowded call: last ones of a tile that tie     crowded_calls[0.0]
    candidates before a call not remembered        ties_go_to_the_lower, 5 in all
    ties to the higher place                       ties_go_to_the_lower, 18 in all
    a digit of places skipped, or the last one     a crash
    places not looked at where keys tie            a crash
    places compared whatever the key               best_of_all_parts[9-parts1-0.0]
    only the first round of candidates counted     a crash
    index of the call's first tensor forgotten     a crash
    room in the end not looked at                  a crash
    found_inf not looked at                        no_quota_and_a_skipped_step
    places behind the winners left as they were    fewer_entries_than_the_quota
    gradients in the order of the list             best_of_all_parts, 28 in all
    scores in place of gradients                   entries_ranked_by_scores, both
    parameters in place of gradients               best_of_all_parts, 45 in all
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from triton_cases import BF16, F16, F32, STEP, TILE, Case, make_case

from sparse_optim.backends import scoring
from sparse_optim.backends.operands import Rule
from sparse_optim.backends.targets import formula

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("run by test_interpreter.py", allow_module_level=True)
importlib.import_module("triton_interpreter").install()
kernels = importlib.import_module("sparse_optim.triton_kernels")
collect, settle, candidate_list = (
    importlib.import_module(f"sparse_optim.triton_kernels.{name}")
    for name in ("collect", "settle", "candidate_list")
)

GUARD = 64  # bytes behind what is held
SIZES = (70, 0, 5, 130, TILE, 40, 3)
BACKWARD = [(index, index + 1) for index in reversed(range(len(SIZES)))]
TOGETHER = [(5, 7), (3, 5), (0, 3)]
Parts = Sequence[tuple[int, int]]
Entry = tuple[int, int, float]


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    for name, value in {
        "NUM_PROGRAMS": 2, "GROUPS": 4, "SELECT_BLOCK": 16, "WRITE_BLOCK": 8,
        "LOCATE_BLOCK": 16,
    }.items():  # fmt: skip
        monkeypatch.setattr(collect, name, value)
    monkeypatch.setattr(candidate_list, "ROOM", 4)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """How often room was made, and how often a call found more than there was room for."""
    calls = dict.fromkeys(("keep_best", "add_best"), 0)

    def counting(name: str, function: Any, *args: Any) -> Any:
        calls[name] += 1
        return function(*args)

    for name in calls:
        monkeypatch.setattr(settle, name, partial(counting, name, getattr(settle, name)))
    return calls


def expected(case: Case, scored: bool = False) -> tuple[list[Entry], float]:
    """(tensor, position, gradient) of the best frozen entries by a full sort; least importance.

    `scored`: the case's gradients are scores, and its parameters gradients.
    """
    entries = []
    for tensor, (grad, param) in enumerate(zip(case.grads, case.params, strict=True)):
        if not grad.numel():
            continue
        score = scoring.importance(grad, param, case.exp, case.eps)
        first, last = case.active.offsets[tensor : tensor + 2].tolist()
        score[case.active.position[first:last].long()] = 0
        entries += [(-value, tensor, i) for i, value in enumerate(score.tolist()) if value > 0]
    quota = int(case.targets[-1]) - int(case.active.progress[1])
    best = sorted(entries)[:quota]
    grads = case.params if scored else case.grads
    found = [(t, i, float(grads[t][i])) for _, t, i in sorted(best, key=lambda each: each[1:])]
    return found, -best[-1][0] if best else 0.0


def collected(
    case: Case,
    parts: Parts,
    scored: bool = False,
    found_inf: float = 0.0,
    room: int | None = None,
    counts: list[int] | None = None,
) -> tuple[list[Entry], float]:
    """The same by the kernels, of tensors first to last - 1 for each part.

    `room`: entries that there is room for in the end; as many as in the beginning, if None.
    `counts`: gets how many candidates there are after each part.
    """
    case = case.run(kernels, "scan")
    work, active, rule = case.work, case.active, Rule(case.exp, case.eps, torch.zeros(0))
    most = work.new.position.numel()
    size = kernels.collected_bytes(most)
    memory = torch.full((size + GUARD,), 0xA5, dtype=torch.uint8)  # places before all others
    held, bound = memory[:size], case.bound(kernels)
    kernels.collect_begin(active, case.targets, most, held)
    for first, last in parts:
        tiles = slice(*work.tiles.offsets[[first, last]].tolist())
        work.scratch.fill_(0x5A)
        kernels.collect(
            bound[first:last], work.tiles.of_tensors(first, last, tiles),
            active.of_tensors(first, last), rule, scored, first, most, held, work.scratch,
        )  # fmt: skip
        if counts is not None:
            counts.append(int(held.view(torch.int64)[candidate_list.COUNT.value]))
    room = most if room is None else room
    new, grad = work.new, torch.full((most,), torch.nan)
    new.tensor.fill_(-1), new.position.fill_(-1), new.threshold.zero_()
    last_new = replace(new, tensor=new.tensor[:room], position=new.position[:room])
    kernels.collect_end(torch.tensor(found_inf), last_new, grad[:room], held)
    assert (memory[size:] == 0xA5).all()
    count = int(new.count)
    assert (new.tensor[count:] == -1).all()
    assert (new.position[count:] == -1).all()
    assert grad[count:].isnan().all()
    columns = (new.tensor[:count], new.position[:count], grad[:count])
    found = zip(*(column.tolist() for column in columns), strict=True)
    return list(found), float(new.threshold)


def check(case: Case, parts: Parts = BACKWARD, scored: bool = False) -> None:
    assert collected(case, parts, scored) == expected(case, scored)


@pytest.mark.parametrize("exp", [-1.0, -0.5, 0.0, 0.5, 1.0, 2.0])
@pytest.mark.parametrize(("quota", "parts"), [(3, BACKWARD), (9, TOGETHER), (30, BACKWARD)])
def test_best_of_all_parts(exp: float, quota: int, parts: Parts) -> None:
    """Quotas below the number of tiles, below that of their groups, and above."""
    case = make_case(
        SIZES, exp=exp, quota=quota, seed=quota, dtypes=(F32, F16), grad_dtypes=(BF16, F32, F16),
        missing=(5,) if quota == 9 else (), kind="rows" if quota == 3 else "normal",
    )  # fmt: skip
    check(case, parts)


def test_any_exponent() -> None:
    """As `cut` does: no other way to compute its powers promises the same bits."""
    case = make_case(SIZES, exp=1.7, quota=9)
    ordinary = case.run(kernels, "scan", "cut")
    found, threshold = collected(case, BACKWARD)
    assert [entry[:2] for entry in found] == ordinary.new_entries()
    assert threshold == float(ordinary.work.new.threshold)


@pytest.mark.parametrize("growth", [0.5, 3.0, 40.0])
def test_gradients_that_shrink_or_grow_from_part_to_part(
    growth: float, counted: dict[str, int]
) -> None:
    case = make_case((60,) * 7, quota=9, num_active=5)
    for number, grad in enumerate(reversed(case.grads)):
        grad.mul_(growth**number)
    check(case)
    assert counted["keep_best"] > 0


@pytest.mark.parametrize("kind", ["equal", "ties"])
@pytest.mark.parametrize("exp", [0.0, 1.0])
@pytest.mark.parametrize("parts", [BACKWARD, TOGETHER, sorted(BACKWARD)], ids=len)
def test_ties_go_to_the_lower_global_index(
    kind: str, exp: float, parts: Parts, counted: dict[str, int]
) -> None:
    """Also where they are more than there is room for: in the calls of the larger tensors."""
    case = make_case(SIZES, exp=exp, quota=13, kind=kind)
    for param in case.params:
        param.fill_(0.5)
    check(case, parts)
    assert counted["add_best"] > 0


@pytest.mark.parametrize("quota", [1, 2])
def test_ties_in_tensors_and_positions_far_apart(quota: int) -> None:
    """The digits of places are told apart one by one."""
    case = make_case((1100, *[1] * 40, 20, 1), kind="zeros", quota=quota, num_active=0)
    for tensor, position in ((0, 1099), (0, 1050), (0, 7), (9, 0), (40, 0), (41, 17), (42, 0)):
        case.grads[tensor][position] = -1.5
    check(case, [(41, 43), (20, 41), (1, 20), (0, 1)])


@pytest.mark.parametrize("spread", [0.01, 0.0])
def test_crowded_calls(spread: float, counted: dict[str, int]) -> None:
    """Entries that no upper bits tell apart, more than there is room for, one call after another;
    the best of a call do not tie, or all do."""
    case = make_case((90, 200, 50, 120), quota=6, num_active=0)
    for grad in case.grads:
        grad.uniform_(1.0, 1.0 + spread)
    check(case, [(3, 4), (2, 3), (1, 2), (0, 1)])
    assert counted["add_best"] > 2


def test_room_is_made_many_times(counted: dict[str, int]) -> None:
    """Each part has as many entries above the floor as the quota."""
    case = make_case((30,) * 20, quota=6, num_active=0)
    for number, grad in enumerate(reversed(case.grads)):
        grad.mul_(1e-3)
        grad[::5] = 1.0 + number + torch.rand(6)
    check(case, [(index, index + 1) for index in reversed(range(20))])
    assert counted["keep_best"] > 5
    assert counted["add_best"] == 0


def test_what_is_below_the_floor_is_not_collected() -> None:
    """Else the result would be the same, later."""
    case = make_case((60,) * 4, quota=5, num_active=0)
    for grad in case.grads[:3]:
        grad.mul_(1e-3)
    counts: list[int] = []
    parts = [(index, index + 1) for index in reversed(range(4))]
    assert collected(case, parts, counts=counts) == expected(case)
    assert counts[1:] == [5] * 3


def test_fewer_entries_than_the_quota() -> None:
    check(make_case(SIZES, kind="few", quota=60))


def test_quota_of_everything() -> None:
    check(make_case(SIZES, quota=sum(SIZES), num_active=0))


def test_first_parts_that_are_smaller_than_the_quota() -> None:
    case = make_case((150, 5, 3, 9, 2), quota=20, num_active=0)
    check(case, [(index, index + 1) for index in reversed(range(5))])


def test_quota_of_a_formula() -> None:
    case = make_case(SIZES, quota=9)
    total = int(case.targets[-1])
    case.targets = formula([(STEP, 0, 1), (1, total, 1)])
    found, _ = collected(case, BACKWARD)
    case.targets = torch.tensor([total])
    assert found == expected(case)[0]


def test_no_quota_and_a_skipped_step() -> None:
    case = make_case(SIZES, quota=5)
    assert collected(case, BACKWARD, found_inf=1.0) == ([], 0.0)
    case.targets[-1] -= 5
    assert collected(case, BACKWARD) == ([], 0.0)
    case.grads[3][7] = torch.inf  # what it may have collected does no harm
    case.grads[0][7] = torch.nan
    case.targets[-1] += 5
    assert collected(case, BACKWARD, found_inf=1.0) == ([], 0.0)


@pytest.mark.parametrize("kind", ["normal", "equal"])
def test_entries_ranked_by_scores_keep_their_gradients(kind: str) -> None:
    """With room for all that reach the limit in a call, and without."""
    case = make_case(SIZES, quota=13, kind=kind, grad_dtypes=(F32, BF16), dtypes=(BF16, F32, F16))
    check(case, TOGETHER, scored=True)


@pytest.mark.parametrize("room", [0, 1, 7])
@pytest.mark.parametrize("exp", [0.0, 2.0])
def test_less_room_in_the_end_than_in_the_beginning(exp: float, room: int) -> None:
    """The best are left, as many as there is room for."""
    case = make_case(SIZES, exp=exp, quota=17, kind="ties")
    found, _ = collected(case, BACKWARD, room=room)
    case.targets[-1] -= 17 - room
    assert found == expected(case)[0]

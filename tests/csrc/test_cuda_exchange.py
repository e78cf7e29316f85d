"""exchange by the CUDA kernel, run on the CPU by the emulator.

What the emulator can show, and what not: test_cuda_emulator.py.

Faults planted by hand, one at a time, and what caught them (sizes: sizes_dtypes_views):

    sign of a 16-bit value carried into the upper half    sizes
    float32 read as 16 bits                               sizes (a crash)
    entries beyond the last tensor's exchanged            sizes (room behind the entries, a crash)
    positions outside of the tensor not passed over       positions_outside_of_their_tensor
"""

from __future__ import annotations

from dataclasses import replace

import emulated_cuda
import pytest
import torch
from delta_cases import assert_identical, clone, example_base, example_delta
from exchange_cases import assert_exchanged, bits_of, exchange_cases, make_exchange

from sparse_optim.delta import DeltaSwitcher, _exchange, merge

CASES = dict(exchange_cases())


@pytest.fixture(autouse=True)
def _device(cuda_emulator):
    emulated_cuda.configure(multiprocessors=1, seed=0)


@pytest.mark.parametrize("name", CASES)
def test_sizes_dtypes_views(name):
    assert_exchanged(emulated_cuda, name, CASES[name])


def test_one_launch_whatever_the_number_of_tensors_and_the_order_of_threads():
    case = make_exchange([30] * 300, 0.5)
    for seed in range(1, 4):
        emulated_cuda.configure(multiprocessors=seed, seed=seed)
        own = case.copy()
        table = torch.zeros(300, 4, dtype=torch.int64)
        bound = emulated_cuda.bind([p[:0] for p in own.params], own.params, table)
        before = emulated_cuda.launches()
        emulated_cuda.exchange(bound, own.position, own.offsets, own.value)
        assert emulated_cuda.launches() == before + 1
        assert_exchanged(emulated_cuda, str(seed), case)


def test_positions_outside_of_their_tensor_are_left_out():
    case = make_exchange([40, 40], 1.0, [torch.bfloat16])
    wrong = case.copy()
    places = {3: -(2**31), 39: 40, 40: -1, 79: 2**31 - 1}
    for entry, place in places.items():
        wrong.position[entry] = place
    value, params = wrong.value.clone(), [param.clone() for param in wrong.params]
    read = wrong.copy()
    read.run(emulated_cuda, "gather")
    wrong.run(emulated_cuda)
    assert torch.equal(read.value, wrong.value)
    want = case.expected()
    for entry in range(80):
        at = divmod(entry, 40)
        outside = entry in places
        assert wrong.value[entry] == (value if outside else want.value)[entry]
        found = bits_of(wrong.params[at[0]])[at[1]]
        assert found == bits_of((params if outside else want.params)[at[0]])[at[1]]


def test_a_switch_is_two_launches(monkeypatch):
    monkeypatch.setattr(_exchange, "backend_of", lambda device: emulated_cuda)
    base = example_base()
    pristine = clone(base)
    deltas = {str(seed): replace(example_delta(base, seed=seed), dense={}) for seed in (5, 6)}
    tasks = DeltaSwitcher(base, deltas)
    tasks.use("5")
    for name in ("6", "5", "6"):
        before = emulated_cuda.launches()
        tasks.use(name)
        assert emulated_cuda.launches() == before + 2
        assert_identical(base, merge(deltas[name], pristine))
    tasks.use(None)
    assert_identical(base, pristine)
